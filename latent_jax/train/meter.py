"""Throughput of the loop."""

from __future__ import annotations

import collections
import time


class Meter:
    """Throughput over finished steps, without compile time and evaluations."""

    def __init__(self) -> None:
        self._units: collections.Counter[str] = collections.Counter()
        self._queue: collections.deque[dict[str, int]] = collections.deque()
        self._began: float | None = None
        self._rates: dict[str, float] = {}

    def start(self, step: int) -> None:
        self._step = step

    def count(self, units: dict[str, int]) -> None:
        self._queue.append({"steps": 1, **units})

    def pause(self, seconds: float) -> None:
        if self._began is not None:
            self._began += seconds

    def seen(self, step: int) -> None:
        """Steps up to ``step`` are finished; the first call only starts the clock (compiling)."""
        now = time.perf_counter()
        first = self._began is None
        while self._step < step and self._queue:
            units = self._queue.popleft()
            self._step += 1
            if not first:
                self._units.update(units)
        if first:
            self._began = now
            return
        seconds = max(now - self._began, 1e-9)
        self._rates = {k: v / seconds for k, v in self._units.items()}

    def rates(self) -> dict[str, float]:
        return dict(self._rates)


