"""A sweep's one table and one plot, from what its runs left behind."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from latent_jax.core.errors import RunError
from latent_jax.core.files import write_json, write_text
from latent_jax.core.yamlio import suggest
from latent_jax.report import figures, html, tables, units
from latent_jax.report.load import is_number
from latent_jax.report.names import HEADLINES

#: An axis over which a score is averaged rather than drawn.
SEED = "seed"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
      values: setting → value, one per axis.
      run: its directory, inside the sweep's.
      results: its ``results.json``; empty if it has none.
      error: why it has none, if it failed.
    """

    values: Mapping[str, Any]
    run: str
    results: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    error: str = ""


def columns(cells: Sequence[Cell], metrics: Sequence[str] = ()) -> list[str]:
    """Which results to show: the asked ones, else the headlines that the runs have.

    Raises:
      RunError: a result that no run has, with the nearest that there is.
    """
    known = {n: None for c in cells for n, v in c.results.items() if is_number(v)}
    for name in metrics:
        if known and name not in known:
            raise RunError(
                f"--metric {name}: no run of this sweep has it{suggest(name, known)}; the runs are "
                "kept, the same command with another --metric shows them"
            )
    found = [name for name in HEADLINES if name in known]
    return list(dict.fromkeys([*metrics, *(found or list(known)[:5])]))


def rows(cells: Sequence[Cell], names: Sequence[str]) -> list[list[tables.Cell]]:
    """The cells' results as text with intervals; one that a run lacks is empty."""
    return [
        [tables.cell(c.results, n) if n in c.results else tables.Cell() for n in names]
        for c in cells
    ]


def lines(
    cells: Sequence[Cell], axes: Mapping[str, Sequence[Any]], metric: str
) -> tuple[str, dict[str, dict[str, tuple[float, tuple[float, float] | None]]]]:
    """A metric over the axis with most values, one line per setting of the others.

    Several seeds are one point: their mean, from the least to the greatest.

    Returns:
      The axis, and line → value → (score, interval).
    """
    drawn = [a for a in axes if a != SEED] or list(axes)
    across = max(drawn, key=lambda a: len(axes[a]))
    found: dict[str, dict[str, list[Cell]]] = {}
    for cell in cells:
        if is_number(cell.results.get(metric)):
            rest = [f"{short(a)}={cell.values[a]}" for a in drawn if a != across]
            points = found.setdefault(", ".join(rest) or metric, {})
            points.setdefault(str(cell.values[across]), []).append(cell)
    return across, {
        line: {x: _point(group, metric) for x, group in points.items()}
        for line, points in found.items()
    }


def _point(group: Sequence[Cell], metric: str) -> tuple[float, tuple[float, float] | None]:
    values = [float(cell.results[metric]) for cell in group]
    if len(values) == 1:
        return values[0], tables.interval_of(group[0].results, metric)
    return sum(values) / len(values), (min(values), max(values))


def short(axis: str) -> str:
    """The last part of a dotted setting."""
    return axis.rpartition(".")[2]


def write_sweep(
    out: str | Path,
    config: str,
    axes: Mapping[str, Sequence[Any]],
    cells: Sequence[Cell],
    metrics: Sequence[str] = (),
) -> Path:
    """Writes ``sweep.json`` and ``sweep.html`` into a directory; returns the page's path.

    Raises:
      RunError: a metric that no run has.
    """
    out = Path(out)
    write_json(
        out / "sweep.json",
        {"config": config, "grid": axes, "cells": [dataclasses.asdict(c) for c in cells]},
    )
    names = columns(cells, metrics)
    picture: Markup | None = None
    if names:
        across, drawn = lines(cells, axes, names[0])
        if drawn:
            picture = figures.against(
                names[0], across, [str(v) for v in axes[across]], drawn, units.unit(names[0])
            )
            seeds = len(axes.get(SEED, ()))
            picture = figures.captioned(
                picture,
                f"a point: the mean of {seeds} seeds, from the least to the greatest"
                if seeds > 1
                else "a point: one run, with its 95 % interval where it has one",
            )
    page = html.templates().get_template("sweep.html.j2").render(
        title=out.resolve().name, config=config, axes=list(axes),
        columns=[(name, units.unit(name)) for name in names], picture=picture,
        made=datetime.datetime.now().astimezone().isoformat(" ", "minutes"),
        rows=[
            {
                "settings": [str(v) for v in c.values.values()], "cells": found, "error": c.error,
                "link": f"{c.run}/report.html" if (out / c.run / "report.html").is_file() else "",
            }
            for c, found in zip(cells, rows(cells, names), strict=True)
        ],
    )  # fmt: skip
    return write_text(out / "sweep.html", page)
