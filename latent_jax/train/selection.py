"""Which checkpoint is the best: by the raw metric, and by its smoothed value (the peak)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from latent_jax.train.config import CheckpointConfig


class Selection:
    """Tracks the metric of ``train.checkpoint`` over evaluations (or saves).

    The peak is chosen by an EMA over observations, so that one lucky batch does not win; until two
    observations exist the EMA is the raw value. A metric that is not there gives no observation.
    """

    def __init__(self, cfg: CheckpointConfig) -> None:
        self._cfg = cfg
        self._sign = 1.0 if cfg.mode == "max" else -1.0
        self._state: dict[str, Any] = {"ema": None, "best": None, "peak": None,
                                       "best_value": None, "peak_value": None}

    def observe(self, step: int, metrics: Mapping[str, Any]) -> dict[str, float] | None:
        """Takes the metric at ``step``; returns ``{"value", "smoothed"}`` or ``None``."""
        value = metrics.get(self._cfg.metric)
        if not isinstance(value, int | float) or not math.isfinite(value):
            return None
        s = self._state
        a = self._cfg.smoothing
        s["ema"] = value if s["ema"] is None else a * s["ema"] + (1.0 - a) * value
        for name, score in (("best", value), ("peak", s["ema"])):
            old = s[f"{name}_value"]
            if old is None or self._sign * score >= self._sign * old:
                s[name], s[f"{name}_value"] = step, score
        return {"value": float(value), "smoothed": float(s["ema"])}

    def improved(self, step: int) -> bool:
        """True if ``step`` is now the best or the peak."""
        return step in (self._state["best"], self._state["peak"])

    @property
    def observed(self) -> bool:
        """True if the metric has ever been there."""
        return self._state["ema"] is not None

    def get_state(self) -> dict[str, Any]:
        return dict(self._state)

    def set_state(self, state: Mapping[str, Any]) -> None:
        self._state.update(state)
