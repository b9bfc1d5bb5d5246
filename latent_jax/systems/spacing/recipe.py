"""Gaps to windows: training slides over every start, evaluation is spread over what is held out."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import numpy as np
from jaxtyping import Float, Int

from latent_jax import data
from latent_jax.core.errors import DataError
from latent_jax.data.windows import (
    Split,
    check_disjoint,
    split_interleaved,
    split_tail,
    window_starts,
)
from latent_jax.data.zeros import Spacings, load_spacings
from latent_jax.systems.spacing.config import SpacingDataConfig, SpacingRun
from latent_jax.train.protocol import BatchSpec

Part = Literal["train", "validation", "calibration"]


@dataclasses.dataclass(frozen=True)
class Gaps:
    """All gaps of a run and where its windows start.

    Attributes:
      values: normalised gaps.
      log_height: ``ln(t / 2 pi)`` of each; ``2 pi``, a distance of 1 per gap, where there is none.
      source: the same in double precision, zero heights where there are none.
      split: which ranges are trained on.
      train: starts of every training window.
      validation: starts of every held-out window.
      calibration: starts of the windows that a calibration is fitted to, none by default.
    """

    values: Float[np.ndarray, " n"]
    log_height: Float[np.ndarray, " n"]
    source: Spacings
    split: Split
    train: Int[np.ndarray, " a"]
    validation: Int[np.ndarray, " b"]
    calibration: Int[np.ndarray, " c"] = dataclasses.field(
        default_factory=lambda: np.zeros(0, np.int64)
    )

    def windows(self, starts: Int[np.ndarray, " b"], length: int) -> dict[str, np.ndarray]:
        """``gaps [b, length]`` and ``log_height [b]`` of windows."""
        index = np.asarray(starts)[:, None] + np.arange(length)
        middle = np.asarray(starts) + length // 2
        return {"gaps": self.values[index], "log_height": self.log_height[middle]}

    def spread(self, count: int, part: Part = "validation") -> Int[np.ndarray, " m"]:
        """At most ``count`` starts, evenly spaced over a part."""
        starts = getattr(self, part)
        at = np.linspace(0, len(starts) - 1, min(count, len(starts))).astype(int)
        return starts[np.unique(at)]

    @property
    def heights(self) -> tuple[float, float, float, float]:
        """Mean, (positive) standard deviation, least and greatest ``log_height`` in training."""
        h = self.log_height[self.spread(4096, "train")]
        return float(h.mean()), float(max(h.std(), 1e-3)), float(h.min()), float(h.max())

    def reach(self, window: int) -> float:
        """Physical distance that the gaps before a target span at every height in use.

        That of the greatest height, where they lie closest. Kernels that reached farther would be
        cut off by the window's end elsewhere at each height: least squares bends them to suit the
        ends that it sees, and at heights above those the error grows.
        """
        used = self.log_height[np.concatenate([self.train, self.validation])]
        return 2 * np.pi * (window - 1) / float(used.max())


def load(config: SpacingDataConfig) -> Gaps:
    """Loads and splits.

    Raises:
      DataError: no such source, damaged, too short, or windows that training and evaluation share.
    """
    found = load_spacings(config.source, config.root, config.window)
    n = len(found.values)
    if config.split == "tail":
        # A border inside a run of dependent gaps would put neighbours on both sides of it.
        unit = found.run if found.run < n else config.window
        split = split_tail(n, config.held_out, unit)
    else:
        split = split_interleaved(n, fraction=config.held_out)
    longer = config.train_window or config.window
    apart = None
    if config.calibration:
        split, apart = _set_apart(split, config.calibration, found.run if found.run < n else 1)
    starts = {
        "train": window_starts(split.train, longer, run=found.run),
        "validation": window_starts(split.validation, config.window, run=found.run),
    }
    if apart is not None:
        starts["calibration"] = window_starts(apart, config.window, run=found.run)
        check_disjoint(starts["calibration"], starts["validation"], config.window)
    if config.recent is not None:
        starts["train"] = starts["train"][-config.recent :]
    for held in [starts[k] for k in starts if k != "train"]:
        for part in {*range(0, longer - config.window, config.window), longer - config.window}:
            check_disjoint(starts["train"] + part, held, config.window)
    height = np.where(found.log_height > 0, found.log_height, 2 * np.pi)
    if not np.isfinite(height).all():
        raise DataError(f"data.source={config.source}: heights are not finite")
    values = found.values.astype(np.float32)
    return Gaps(values, height.astype(np.float32), found, split, **starts)


def _set_apart(split: Split, share: float, unit: int) -> tuple[Split, Int[np.ndarray, "a 2"]]:
    """The split without the end of every training stretch, and these ends."""
    low, high = split.train.T
    border = low + ((high - low) * (1 - share)).astype(np.int64) // unit * unit
    rest = Split(np.stack([low, border], axis=1), split.validation)
    return rest, np.stack([border, high], axis=1)


def batch_specs(config: SpacingRun, phase: str) -> tuple[BatchSpec, ...]:
    """Shapes of the batches of `train_stream`, from the configuration alone."""
    rows, length = config.train.batch_size, config.data.train_window or config.data.window
    arrays = {
        "gaps": jax.ShapeDtypeStruct((rows, length), np.float32),
        "log_height": jax.ShapeDtypeStruct((rows,), np.float32),
    }
    return (BatchSpec(phase, 1.0, arrays),)


def train_stream(config: SpacingRun, gaps: Gaps):
    """Endless shuffled windows; row ``i`` of a batch belongs to seed ``i // (rows / seeds)``."""

    def get(i: int):
        length = config.data.train_window or config.data.window
        row = gaps.windows(gaps.train[i : i + 1], length)
        return {"gaps": row["gaps"][0], "log_height": row["log_height"][0]}

    return data.pipeline(
        get,
        config.train.batch_size,
        size=len(gaps.train),
        seed=config.seed,
        remainder="drop" if len(gaps.train) >= config.train.batch_size else "wrap",
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
