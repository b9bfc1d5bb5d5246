"""`latent-jax sweep`: a config at every point of a grid, one run folder each."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from latent_jax import run as runs
from latent_jax.commands import work
from latent_jax.commands.show import console
from latent_jax.core import files
from latent_jax.core.config import parse_yaml
from latent_jax.core.errors import ConfigError, RunError, UserError
from latent_jax.report import sweep as page
from latent_jax.report.sweep import Cell, short
from latent_jax.train.checkpoints import resume_hash
from latent_jax.train.preemption import Preempted


def parse_grid(texts: Sequence[str]) -> dict[str, list[Any]]:
    """``a.b=1,2`` → ``{"a.b": [1, 2]}``; values are YAML, so ``eval.arms=[a],[a, b]`` has two.

    Raises:
      ConfigError: no ``=``, no values, a setting or a value given twice.
    """
    grid: dict[str, list[Any]] = {}
    for text in texts:
        name, equals, listed = text.partition("=")
        name = name.strip()
        if not equals or not name:
            raise ConfigError(f"--grid {text!r}: write setting=value,value")
        values = parse_yaml(f"[{listed}]", f"--grid {name}")
        if not values:
            raise ConfigError(f"--grid {name}: no values; write {name}=1,2")
        if name in ("out", "name"):
            raise ConfigError(f"--grid {name}: every run of a sweep has its own; use --out for all")
        if name in grid:
            raise ConfigError(f"--grid {name} is given twice: list its values in one")
        if len({json.dumps(v, default=str) for v in values}) < len(values):
            raise ConfigError(f"--grid {name}={listed}: a value is given twice")
        grid[name] = values
    return grid


def cells(
    config: str, grid: Mapping[str, Sequence[Any]], overrides: Sequence[str], out: Path
) -> list[tuple[Cell, Any]]:
    """Every point of the grid with its resolved config; nothing has run when one is refused.

    Raises:
      ConfigError: naming the point.
    """
    names = [short(a) for a in grid]
    labels = [n if names.count(n) == 1 else a for n, a in zip(names, grid, strict=True)]
    found, folders = [], set()
    for values in itertools.product(*grid.values()):
        label = ", ".join(f"{n}={v}" for n, v in zip(labels, values, strict=True))
        folder = re.sub(r"[^\w.=+-]+", "-", "_".join(label.split(", "))).strip("-")[:100]
        if folder in folders:
            raise ConfigError(f"--grid: two points would share the folder {folder}")
        folders.add(folder)
        point = dict(zip(grid, values, strict=True))
        settings = [f"{a}={json.dumps(v)}" for a, v in point.items()]
        place = [f"out={json.dumps(str(out / folder))}", f"name={json.dumps(folder)}"]
        try:
            resolved = runs.resolve(config, [*overrides, *settings, *place])
        except ConfigError as error:
            raise ConfigError(f"{label}: {error}") from None
        found.append((Cell(point, folder), resolved))
    return found


def _finished(out: Path, config: Any) -> dict[str, Any]:
    """Results of a cell that has been run already with this configuration."""
    where = out / "config.hash"
    if not where.is_file() or where.read_text().strip() != resume_hash(config):
        return {}
    try:
        return json.loads((out / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def sweep(
    config: str,
    grid_texts: Sequence[str],
    overrides: Sequence[str],
    out: str | None = None,
    metrics: Sequence[str] = (),
    quiet: bool = False,
    dry_run: bool = False,
    only: int | None = None,
) -> None:
    """Runs what is missing of a grid, then writes its table and plot.

    Args:
      config: as of `run`.
      grid_texts: of `parse_grid`.
      overrides: settings of all cells.
      out: directory of the sweep; default ``runs/<name>_sweep``.
      metrics: results to show first; the first is drawn.
      quiet: no progress.
      dry_run: list the cells, run nothing.
      only: number of the one cell to run, from 0 (for job arrays); no table then.

    Raises:
      ConfigError: a bad grid, before anything runs.
      RunError: cells that failed; the others are done and in the table.
    """
    grid = parse_grid(grid_texts)
    base = runs.resolve(config, overrides)
    folder = Path(out) if out is not None else Path("runs") / f"{base.name}_sweep"
    points = cells(config, grid, overrides, folder)
    if only is not None and not 0 <= only < len(points):
        raise ConfigError(f"--cell {only}: this grid has cells 0 to {len(points) - 1}")
    if dry_run:
        for number, (cell, _) in enumerate(points):
            done = " (finished)" if _finished(folder / cell.run, points[number][1]) else ""
            print(f"{number}: {folder / cell.run}{done}")
        return
    files.make_dir(folder)
    done = []
    for number, (cell, resolved) in enumerate(points):
        if only is None or only == number:
            done.append(_run(folder, cell, resolved, quiet, f"{number + 1}/{len(points)}"))
    failed = [cell for cell in done if cell.error]
    if only is None:
        path = page.write_sweep(folder, config, grid, done, metrics)
        _show(done, list(grid), metrics)
        print(f"sweep: {path}")
    if failed:
        raise RunError(
            f"{len(failed)} of {len(done)} runs failed, the first ({failed[0].run}): "
            f"{failed[0].error}; the same command tries them again"
        )


def _run(folder: Path, cell: Cell, config: Any, quiet: bool, count: str) -> Cell:
    """One cell, run unless it has been."""
    results, error = _finished(folder / cell.run, config), ""
    how = "finished before"
    if not results:
        how = "done"
        try:
            system, state, out = work.train(config, quiet)
            with work.evaluating(quiet) as progress:
                results = dict(runs.finish(system, state.variables, config, out, progress))
        except Preempted:
            raise
        except UserError as problem:
            how, error = "failed", " ".join(str(problem).split())
    if not quiet:
        print(f"[{count}] {cell.run}: {how}", flush=True)
    return Cell(cell.values, cell.run, results, error)


def _show(done: Sequence[Cell], axes: Sequence[str], metrics: Sequence[str]) -> None:
    from rich.markup import escape
    from rich.table import Table

    names = page.columns(done, metrics)
    grid = Table()
    for name in (*axes, *names):
        grid.add_column(escape(name), justify="left" if name in axes else "right")
    for cell, found in zip(done, page.rows(done, names), strict=True):
        texts = [f"{c.text} ({c.interval})" if c.interval else c.text for c in found]
        values = [escape(str(v)) for v in cell.values.values()]
        grid.add_row(*values, *([escape(cell.error)] if cell.error else texts))
    console().print(grid)
