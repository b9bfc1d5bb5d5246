"""Diagnoses of several configurations side by side; runs that differ by their seed are one row.

A system says what belongs into the tables through one more hook, a function of the class:

    compare(found) -> {table: {row: {column: (mean, standard deviation or None)}}}

``found`` maps the name of each configuration to its results and diagnosis, flat dotted name →
number, with ``<name>.std`` between seeds. Rows and columns are shown in their order; a row may lack
a column.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from latent_jax import run as runs
from latent_jax.commands import inspect
from latent_jax.core import files
from latent_jax.core.config import config_hash
from latent_jax.report import load_run, side_by_side

Tables = Mapping[str, Mapping[str, Mapping[str, Sequence[float | None]]]]


def diagnose(
    names: Sequence[str],
    overrides: Iterable[str] = (),
    checkpoint: str = "last",
    out: str | None = None,
) -> Any:
    """The hook ``diagnose`` on runs: numbers of one configuration, or tables of several.

    Args:
      names: runs, or globs.
      overrides: dotted settings that differ from the runs'.
      checkpoint: `last`, `best`, `peak` or a step.
      out: file, or folder, that gets everything as JSON; tables also as a page beside it.

    Returns:
      See `inspect.call_each`; for several configurations of a system that has ``compare``,
      something rich can print.

    Raises:
      RunError: no such run, or its system cannot ``diagnose``.
    """
    overrides = list(overrides)
    found = inspect.expand(names)
    groups = _alike(found, overrides)
    classes = {runs.system_class(config.system) for config, _ in groups.values()}
    compare = getattr(classes.pop(), "compare", None) if len(classes) == 1 else None
    if compare is None or len(groups) == 1:
        return inspect.call_each("diagnose", found, {}, overrides, checkpoint, out)
    rows: dict[str, dict[str, Any]] = {}
    findings = []
    for config, members in groups.values():
        own = inspect.call_each("diagnose", members, {}, overrides, checkpoint)
        results = inspect.joined([load_run(run).results for run in members])
        name = config.name if config.name and config.name not in rows else members[0]
        rows[name] = {**results, **own}
        findings += [f"{name}: {text}" for text in inspect.lines(own.get("findings", ()))]
    tables = compare(rows)
    inspect.write("diagnose", {"tables": tables, "found": rows, "findings": findings}, out)
    if out is not None:
        target = Path(out)
        target = target / "diagnose" if target.is_dir() else target
        made = datetime.datetime.now().astimezone().isoformat(" ", "minutes")
        page = side_by_side.render(f"{len(rows)} configurations", made, tables, findings)
        files.write_text(target.with_suffix(".html"), page)
    return Group(*_shown(tables), *map(escape, ["findings:", *(f"  {x}" for x in findings)]))


def _alike(
    found: Sequence[str], overrides: Sequence[str]
) -> dict[str, tuple[Any, list[str]]]:
    """Runs by what was computed but for the seed: a configuration, and the runs of it."""
    groups: dict[str, tuple[Any, list[str]]] = {}
    for run in found:
        _, config = runs.open_run(run, overrides)
        key = config_hash(config, exclude=("out", "name", "seed"))
        groups.setdefault(key, (config, []))[1].append(run)
    return groups


def _shown(tables: Tables) -> Iterable[Table]:
    for title, rows in tables.items():
        columns = side_by_side.columns(rows)
        grid = Table(title=escape(title), title_justify="left")
        grid.add_column("", overflow="fold")
        for column in columns:
            grid.add_column(escape(column), justify="right")
        for name, row in rows.items():
            grid.add_row(escape(name), *(side_by_side.text(row.get(c)) for c in columns))
        yield grid
