"""A trace of a few steady steps, and what it says in a few lines."""

from __future__ import annotations

import collections
import dataclasses
import gzip
import json
import time
from pathlib import Path
from typing import Any

import jax

from latent_jax.core import files

# Steps before the trace: the first compiles, the next fill the queue.
_WARM = 3


@dataclasses.dataclass
class StepProfile:
    """Traces ``steps`` steps of a run and sums them up.

    Attributes:
      folder: where the trace and ``summary.json`` go.
      first: the step after which the trace begins.
      steps: how many it holds, less where the run ends before.
    """

    folder: Path
    first: int
    steps: int
    _began: float = 0.0
    _busy: float = 0.0
    _running: bool = False

    @classmethod
    def of(cls, folder: Path, start: int, total: int, steps: int = 5) -> StepProfile | None:
        """For a run that goes from ``start`` to ``total`` steps; None if that is too short."""
        first = min(start + _WARM, total - steps - 1)
        first = max(first, start + 1)
        return cls(folder, first, min(steps, total - first)) if first < total else None

    def after(self, step: int, done: Any, busy: float) -> str | None:
        """Called when a step has been dispatched.

        Args:
          step: its number.
          done: a result of it, to wait for.
          busy: seconds that the host has been busy so far, without waiting for the device.

        Returns:
          The summary when the trace has ended, else None.
        """
        if step == self.first:
            jax.block_until_ready(done)
            jax.profiler.start_trace(str(self.folder))
            self._began, self._busy, self._running = time.perf_counter(), busy, True
        elif step == self.first + self.steps:
            jax.block_until_ready(done)
            seconds = time.perf_counter() - self._began
            self.close()
            return self._summary(seconds / self.steps, (busy - self._busy) / seconds)
        return None

    def close(self) -> None:
        """Ends a trace that a stopped run left open."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()

    def _summary(self, seconds: float, host: float) -> str:
        ops = _slowest(self.folder)
        total = sum(ops.values())
        files.write_json(
            self.folder / "summary.json",
            {
                "step_seconds": seconds, "host_share": host, "steps": self.steps,
                "ops": [{"name": name, "share": t / total} for name, t in ops.most_common(20)],
            },
        )  # fmt: skip
        shown = ", ".join(f"{name} {t / total:.0%}" for name, t in ops.most_common(5))
        return (
            f"profile of {self.steps} steps: {1e3 * seconds:,.4g} ms each, host busy {host:.1%}"
            + (f"; longest operations: {shown}" if shown else "")
            + f"; trace for TensorBoard or Perfetto: {self.folder}"
        )


def _slowest(folder: Path) -> collections.Counter[str]:
    """Microseconds by operation in the newest trace: events that carry an HLO operation's name."""
    found: collections.Counter[str] = collections.Counter()
    traces = sorted(folder.glob("plugins/profile/*/*.trace.json.gz"))
    if not traces:
        return found
    with gzip.open(traces[-1], "rt", encoding="utf-8") as file:
        for event in json.load(file).get("traceEvents", []):
            name = (event.get("args") or {}).get("hlo_op")
            if name:
                found[str(name).split(".")[0]] += float(event.get("dur", 0.0))
    return found
