"""Which checkpoints stay: the newest, the best by metric, and the smoothed peak.

Orbax forgets metrics when a manager is made again (it stores them only beside its own ``best_fn``),
so a continued run would drop its best checkpoint. Here they lie in each checkpoint's ``meta``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from latent_jax.train.config import CheckpointConfig


class Retention:
    """An Orbax preservation policy.

    Args:
      cfg: how many to keep, and which way the metric is good.
      directory: ``<run>/checkpoints``, whose metrics are read.
    """

    def __init__(self, cfg: CheckpointConfig, directory: Path) -> None:
        self._cfg = cfg
        self._sign = 1.0 if cfg.mode == "max" else -1.0
        self._metrics: dict[int, Mapping[str, float]] = {}
        self._pinned: set[int] = set()
        for step in directory.glob("*"):
            if step.name.isdigit():
                self.note(int(step.name), *_recorded(step))

    def note(
        self, step: int, metrics: Mapping[str, float] | None, pinned: bool = False
    ) -> None:
        """Says what ``step`` is judged by: ``{"value", "smoothed"}``; without it, by nothing.

        Args:
          pinned: it stays, whatever it is judged by.
        """
        self._metrics.pop(step, None)
        if metrics:
            self._metrics[step] = dict(metrics)
        if pinned:
            self._pinned.add(step)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any = None) -> list[bool]:
        """Whether each of ``checkpoints`` (anything with a ``step``) stays, in their order."""
        kept = self.kept([info.step for info in checkpoints])
        return [info.step in kept for info in checkpoints]

    def kept(self, steps: Sequence[int]) -> set[int]:
        """Those of ``steps`` that stay."""
        steps = sorted(steps)
        kept = set(steps[-self._cfg.keep_last :]) | (self._pinned & set(steps))
        for name, n in (("value", self._cfg.keep_best), ("smoothed", 1)):
            # Of equal ones the later: as train.selection chooses.
            ranked = sorted(
                (self._sign * self._metrics[s][name], s) for s in steps if s in self._metrics
            )
            kept |= {step for _, step in ranked[max(len(ranked) - n, 0) :]}
        return kept


def _recorded(step: Path) -> tuple[Mapping[str, float] | None, bool]:
    """The metrics in a checkpoint's meta, none where they cannot be read, and whether it stays."""
    try:
        meta = json.loads((step / "meta" / "metadata").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None, False
    if not isinstance(meta, dict):
        return None, False
    pinned = meta.get("pinned") is True
    try:
        return {name: float(meta["metrics"][name]) for name in ("value", "smoothed")}, pinned
    except (ValueError, KeyError, TypeError):
        return None, pinned
