"""Progress of training: what the loop tells, and how a terminal shows it."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO


@dataclasses.dataclass(frozen=True)
class ProgressEvent:
    """One report of the loop, at most every ``log_every`` steps.

    Attributes:
      step: finished steps.
      total: steps in all.
      phase: name of the current phase.
      metrics: latest values (the names in ``metrics.jsonl``).
      rates: units per second, e.g. ``{"steps": 3.2, "tokens": 13107.2}``, without compile time.
      eta: seconds left, ``None`` while unknown.
      host: share of the time in which the loop kept the host busy, ``None`` while unknown.
      message: a line to show once (resume, warning, saved checkpoint), else ``None``.
    """

    step: int
    total: int
    phase: str = "main"
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    rates: Mapping[str, float] = dataclasses.field(default_factory=dict)
    eta: float | None = None
    host: float | None = None
    message: str | None = None


ProgressFn = Callable[[ProgressEvent], None]


def duration(seconds: float | None) -> str:
    """``75`` → ``1:15``; ``None`` → ``-:--``."""
    if seconds is None:
        return "-:--"
    minutes, secs = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"


def summary(event: ProgressEvent) -> str:
    """One plain line: loss, terms, rates."""
    parts = []
    if "loss" in event.metrics:
        parts.append(f"loss {event.metrics['loss']:.4g}")
    parts += [
        f"{key[5:]} {value:.3g}"
        for key, value in event.metrics.items()
        if key.startswith("term.") and isinstance(value, int | float)
    ]
    parts += [f"{value:,.4g} {unit}/s" for unit, value in event.rates.items()]
    return "  ".join(parts)


class PlainProgress:
    """A line every ``interval`` seconds; for logs and pipes."""

    def __init__(self, interval: float = 10.0, file: TextIO | None = None) -> None:
        self._interval = interval
        self._file = file or sys.stderr
        self._last = float("-inf")

    def __call__(self, event: ProgressEvent) -> None:
        if event.message:
            print(event.message, file=self._file, flush=True)
            return
        now = time.monotonic()
        if now - self._last < self._interval and event.step < event.total:
            return
        self._last = now
        print(
            f"step {event.step}/{event.total} [{event.phase}]  {summary(event)}  "
            f"eta {duration(event.eta)}",
            file=self._file,
            flush=True,
        )

    def close(self) -> None:
        pass


class RichProgress:
    """A live bar with loss terms, throughput and ETA."""

    def __init__(self, console: Any = None) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TextColumn("eta {task.fields[eta]}"),
            TextColumn("{task.fields[line]}"),
            console=console,
            refresh_per_second=4,
        )
        self._task: Any = None

    def __call__(self, event: ProgressEvent) -> None:
        if self._task is None:
            self._progress.start()
            self._task = self._progress.add_task("train", total=event.total, eta="-:--", line="")
        if event.message:
            self._progress.console.print(event.message, markup=False, highlight=False)
            return
        self._progress.update(
            self._task,
            description=event.phase,
            completed=event.step,
            total=event.total,
            eta=duration(event.eta),
            line=summary(event),
        )

    def close(self) -> None:
        if self._task is not None:
            self._progress.stop()


def make_progress(quiet: bool = False, console: Any = None) -> Any:
    """A rich bar on a terminal, plain lines elsewhere, ``None`` when quiet."""
    if quiet:
        return None
    if sys.stderr.isatty() if console is None else console.is_terminal:
        return RichProgress(console)
    return PlainProgress()
