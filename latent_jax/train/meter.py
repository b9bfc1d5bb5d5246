"""Throughput of the loop."""

from __future__ import annotations

import collections
import time


class Meter:
    """Throughput over finished steps, without compile time and evaluations.

    Attributes:
      host: share of that time in which the host was busy with the loop (data, dispatch, logs), an
        upper bound of what it costs: while the device computes it costs nothing. None at first.
    """

    def __init__(self) -> None:
        self._units: collections.Counter[str] = collections.Counter()
        self._queue: collections.deque[dict[str, int]] = collections.deque()
        self._began: float | None = None
        self._rates: dict[str, float] = {}
        self._waited = self._paused = 0.0
        self._made = time.perf_counter()
        self.host: float | None = None

    def start(self, step: int) -> None:
        self._step = step

    def count(self, units: dict[str, int]) -> None:
        self._queue.append({"steps": 1, **units})

    def wait(self, seconds: float) -> None:
        """The host has waited so long for the device."""
        self._waited += seconds

    @property
    def busy(self) -> float:
        """Seconds that the host was busy so far: neither waiting for the device nor paused."""
        return time.perf_counter() - self._made - self._waited - self._paused

    def pause(self, seconds: float) -> None:
        self._paused += seconds
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
            self._began, self._busy = now, self.busy
            return
        seconds = max(now - self._began, 1e-9)
        self._rates = {k: v / seconds for k, v in self._units.items()}
        self.host = min(1.0, (self.busy - self._busy) / seconds)

    def rates(self) -> dict[str, float]:
        return dict(self._rates)
