"""How commands talk to a person: consoles, progress of an evaluation, tables of results."""

from __future__ import annotations

import codecs
import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

# Line feeds and tabs stay; C0 and DEL have pictures, C1 has none.
_PICTURES = {c: 0x2400 + c for c in range(32) if c not in b"\n\t"}
_PICTURES |= {127: 0x2421, **dict.fromkeys(range(128, 160), 0xFFFD)}


class Screen:
    r"""Bytes as they come, as text that a terminal can be given.

    A character that is not complete waits for its other bytes; bytes that are no UTF-8 become
    replacement characters, and control characters, which could move the cursor or worse, pictures.

    Example:
      >>> screen = Screen()
      >>> [screen(b"caf\xc3"), screen(b"\xa9\x1b[2J\xff"), screen(b"\xe2", last=True)]
      ['caf', 'é␛[2J�', '�']
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def __call__(self, raw: bytes, last: bool = False) -> str:
        """The characters that these bytes complete; ``last``: no more will come."""
        return self._decoder.decode(raw, last).translate(_PICTURES)


class Bytes:
    """Writes bytes to standard output as they come: themselves, or as text for a terminal."""

    def __init__(self, raw: bool) -> None:
        self._screen = None if raw else Screen()

    def __enter__(self) -> Bytes:
        return self

    def __call__(self, raw: bytes) -> None:
        if self._screen is None:
            sys.stdout.buffer.write(raw)
        else:
            sys.stdout.write(self._screen(raw))
        sys.stdout.flush()

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self._screen is not None and kind is None:
            sys.stdout.write(self._screen(b"", last=True) + "\n")
            sys.stdout.flush()


def console(stderr: bool = False) -> Console:
    """A console for now: pipes get plain text that is not cut at 80 columns."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else 160
    return Console(stderr=stderr, width=width, highlight=False, soft_wrap=not stream.isatty())


class EvalProgress:
    """Called as progress(what, done, total): a bar on a terminal, else lines."""

    def __init__(self, interval: float = 10.0) -> None:
        self._console = console(stderr=True)
        self._interval = interval
        self._bar: Any = None
        self._tasks: dict[str, Any] = {}
        self._last = ("", 0.0)

    def __call__(self, what: str, done: int | None = None, total: int | None = None) -> None:
        if self._console.is_terminal:
            self._live(what, done, total)
            return
        name, at = self._last
        now = time.monotonic()
        finished = total is not None and done == total
        if what != name or finished or now - at >= self._interval:
            self._last = (what, now)
            count = f" {done}/{total}" if total else ""
            print(f"evaluate: {what}{count}", file=sys.stderr, flush=True)

    def _live(self, what: str, done: int | None, total: int | None) -> None:
        from rich import progress as rp

        if self._bar is None:
            self._bar = rp.Progress(
                rp.TextColumn("{task.description}", markup=False),
                rp.BarColumn(bar_width=24),
                rp.MofNCompleteColumn(),
                rp.TimeElapsedColumn(),
                console=self._console,
                transient=True,
            )
            self._bar.start()
        if what not in self._tasks:
            self._tasks[what] = self._bar.add_task(what, total=total)
        self._bar.update(self._tasks[what], completed=done or 0, total=total)

    def close(self) -> None:
        """Takes the bar off the terminal."""
        if self._bar is not None:
            self._bar.stop()


def results_table(
    results: Mapping[str, Any], config: Mapping[str, Any] | None = None
) -> list[Table]:
    """Results as terminal tables, laid out as in the report; see `report.tables.sections`."""
    from latent_jax.report import tables  # brings matplotlib, which --help can do without

    made = []
    for section in tables.sections(results, config):
        for table in section.tables:
            grid = Table(title=f"{section.title}: {table.title}", title_justify="left")
            grid.add_column("")
            for column in table.columns:
                grid.add_column(column, justify="right")
            for name, _, cells in table.rows:
                values = [f"{c.text} ({c.interval})" if c.interval else c.text for c in cells]
                style = "bold" if name.startswith("latent") else None
                grid.add_row(escape(name), *values, style=style)
            made.append(grid)
        if section.facts:
            grid = Table(title=section.title, title_justify="left", show_header=False)
            grid.add_column()
            grid.add_column(justify="right")
            for name, cell in section.facts:
                grid.add_row(escape(name), f"{cell.text} {cell.interval}".strip())
            made.append(grid)
    return made


def present(
    value: Any, where: Console | None = None, config: Mapping[str, Any] | None = None
) -> None:
    """Prints what a system's hook returned: text, a mapping, a list, or anything rich can show;
    a run's ``config`` says what is not in its results.
    """
    where = where or console()
    if value is None:
        return
    if isinstance(value, str):
        where.print(value, markup=False)
    elif isinstance(value, Mapping):
        lines = {k: v for k, v in value.items() if _is_lines(v)}
        numbers = {
            k: v
            for k, v in value.items()
            if isinstance(v, (int, float, list)) and k not in lines
        }
        for table in results_table(numbers, config):
            where.print(table)
        for key, entry in value.items():
            if key in lines:
                where.print(f"[bold]{escape(str(key))}[/bold]:")
                for line in entry:
                    where.print(f"  {line}", markup=False)
            elif key not in numbers:
                where.print(f"[bold]{escape(str(key))}[/bold]", end=": ")
                where.print(str(entry), markup=False)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            present(entry, where)
    else:
        where.print(value)


def _is_lines(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)


def settings(rows: list[tuple[str, str, Any, str]]) -> None:
    """Prints settings as a tree: name, value, what is allowed, and the meaning."""
    out = console()
    grid = Table(box=None, padding=(0, 2, 0, 0), show_edge=False)
    for column in ("setting", "value", "meaning", "allowed"):
        grid.add_column(column, overflow="fold")
    shown: tuple[str, ...] = ()
    for path, kind, value, meaning in rows:
        *parents, last = path.split(".")
        for depth, parent in enumerate(parents):
            if tuple(parents[: depth + 1]) != shown[: depth + 1]:
                grid.add_row(f"{'  ' * depth}[bold]{escape(parent)}[/bold]")
        shown = tuple(parents)
        text = "null" if value is None else str(value).lower() if isinstance(value, bool) else value
        grid.add_row(
            f"{'  ' * len(parents)}{escape(last)}",
            escape(str(text)),
            escape(meaning),
            f"[dim]{escape(kind)}[/dim]",
        )
    out.print(grid)
