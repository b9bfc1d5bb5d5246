"""Metrics of steps that the device may still be working on, until they are written."""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax

from latent_jax.train.guards import Guards
from latent_jax.train.meter import Meter
from latent_jax.train.step import drop_empty
from latent_jax.train.writers import Writers

# Steps that may wait on the device before the host pauses; bounds queued batches and the delay
# until a preemption signal is seen.
_MAX_IN_FLIGHT = 8


class _Row(NamedTuple):
    step: int
    phase: str
    metrics: dict[str, jax.Array]  # on the device
    units: dict[str, int]  # of the batch


class Rows:
    """A queue of steps that have been started.

    Attributes:
      latest: the newest metrics that are known, with those of the last evaluation.
      writers: where rows go, once it is open.
      logged: when something was last written, in seconds of `time.perf_counter`.

    Args:
      meter: what the host waits for is put down there.
      guards: see every row.
    """

    def __init__(self, meter: Meter, guards: Guards):
        self._meter, self._guards = meter, guards
        self._pending: collections.deque[_Row] = collections.deque()
        self.latest: dict[str, float] = {}
        self.writers: Writers | None = None
        self.logged = time.perf_counter()

    def add(
        self, step: int, phase: str, metrics: dict[str, jax.Array], units: dict[str, int]
    ) -> None:
        """Takes in a step; waits for an older one where too many are under way."""
        self._pending.append(_Row(step, phase, metrics, units))
        if len(self._pending) > _MAX_IN_FLIGHT:
            with self._waiting():
                jax.block_until_ready(self._pending[-_MAX_IN_FLIGHT - 1].metrics["loss"])

    def write(self, keep: int) -> int | None:
        """Writes all but the newest ``keep`` steps, and waits for those; the last one's number."""
        n = max(len(self._pending) - keep, 0)
        rows = [self._pending.popleft() for _ in range(n)]
        if not rows:
            return None
        self.logged = time.perf_counter()
        with self._waiting():
            values = jax.device_get([row.metrics for row in rows])
        self._meter.seen(rows[-1].step)
        for (step, phase, _, units), found in zip(rows, values, strict=True):
            row = drop_empty({k: float(v) for k, v in found.items()})
            row |= {f"units.{k}": float(v) for k, v in units.items()}
            self.latest = {k: v for k, v in self.latest.items() if k.startswith("eval.")} | row
            if self.writers is not None:
                self.writers.write(step, {"phase": phase, **row})
            self._guards.observe(step, row)
        if self.writers is not None:
            self.writers.flush()
        return rows[-1].step

    def evaluated(self, step: int, row: dict[str, float]) -> None:
        """Writes what an evaluation found."""
        if self.writers is not None:
            self.writers.write(step, row)
        self._guards.observe(step, row)
        self.latest |= row

    def running(self) -> int:
        """How many steps are not known to be finished."""
        flags = [row.metrics["loss"].is_ready() for row in self._pending]
        return len(flags) - flags.index(False) if False in flags else 0

    def clear(self) -> None:
        """Forgets what was not written."""
        self._pending.clear()

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        """Time in which the host only waits for the device."""
        began = time.perf_counter()
        yield
        self._meter.wait(time.perf_counter() - began)
