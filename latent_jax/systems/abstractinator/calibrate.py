"""The limit of entropy or learned segments that gives a wanted number of bytes per segment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from latent_jax.core.errors import ConfigError, DataError
from latent_jax.systems.abstractinator import segment

_BATCH = 64
_HALVINGS = 24  # of 16 bits: to a millionth of a bit
_WIDEST = 40  # characters of a bar


def scores(
    system: Any, variables: Mapping[str, Any], windows: int, method: str
) -> tuple[Float[np.ndarray, "w t"], Bool[np.ndarray, "w t"]]:
    """What boundaries are made of, of evenly spread training windows, and which are bytes."""
    train = system.windows("train")
    chosen = train.spread(windows)
    measure = jax.jit(
        lambda ids, valid: system.model.apply(variables, ids, valid, method=method)
    )
    bits, there = [], []
    for batch, valid in train.batches(chosen, min(_BATCH, len(chosen))):
        bits.append(np.asarray(measure(jnp.asarray(batch), jnp.asarray(valid))))
        there.append(valid)
    return np.concatenate(bits), np.concatenate(there)


def calibrate(
    system: Any,
    variables: Mapping[str, Any],
    bytes_per_segment: float,
    delta: bool = False,
    windows: int = 512,
) -> dict[str, Any]:
    """Finds the limit by bisection: with a higher one segments are longer.

    Args:
      system: an abstractinator with an entropy model, or with learned segments.
      variables: trained.
      bytes_per_segment: wanted mean length on training text.
      delta: find ``segments.delta`` rather than ``segments.threshold``.
      windows: training windows that are measured, evenly spread.

    Returns:
      The limit (bits, or a probability) under its name in a config, ``set`` (the same as an
      option), the mean length found, with a limit in the run also the length that this one gives
      (``bytes_per_segment_now``), the share of bytes beyond the run's budget of segments, and how
      long segments are.

    Raises:
      ConfigError: no entropy model, or a length that no limit gives.
    """
    c = system.config
    learned = c.segments.rule == "learned"
    if c.entropy is None and not learned:
        raise ConfigError("calibrate-segments: this run has no section entropy, so no model for it")
    if learned and delta:
        raise ConfigError("calibrate-segments: --delta is of entropies, this run's are learned")
    if not windows >= 1:
        raise DataError(f"calibrate-segments: --windows {windows}: at least 1")
    method = "scores" if learned else "entropies"
    measured, there = scores(system, variables, windows, method)
    bits, valid = jnp.asarray(measured), jnp.asarray(there)
    longest = c.segments.longest or 16

    @jax.jit
    def cut(above: Float[Array, ""], limit: Float[Array, ""]) -> Array:
        surprise = segment.surprising(bits, above, limit)
        # Without a budget: what does not fit one is a matter of the run, not of the limit.
        found = segment.segment(valid, valid, "entropy", longest, bits.shape[1], surprise)
        return jnp.bincount(found.length.reshape(-1), length=longest + 1)

    def pair(limit: float) -> tuple[float, float]:
        return (limit, jnp.inf) if delta else (jnp.inf, limit)

    def mean(counts: np.ndarray) -> float:
        return float((counts * np.arange(longest + 1)).sum() / max(counts[1:].sum(), 1))

    low, high = (-8.0, 8.0) if delta or c.gaussian else (-1.0, 1.0 if learned else 8.0)
    shortest, most = (mean(np.asarray(cut(*pair(limit)))) for limit in (low, high))
    if not shortest <= bytes_per_segment <= most:
        raise ConfigError(
            f"calibrate-segments: --bytes-per-segment {bytes_per_segment:g}: limits give "
            f"{shortest:.2f} to {most:.2f} with segments of at most {longest} bytes "
            "(segments.longest)"
        )
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if mean(np.asarray(cut(*pair(middle)))) < bytes_per_segment:
            low = middle
        else:
            high = middle
    limit = round(high, 5)
    counts = np.asarray(cut(*pair(limit)))
    name = "segments.delta" if delta else "segments.threshold"
    budget = c.segments.budget or max(1, -(-c.data.window // 3))
    over = segment.segment(
        valid, valid, "entropy", longest, budget, segment.surprising(bits, *pair(limit))
    ).overflow
    rule = "learned" if learned else "entropy"
    score = " --set segments.score=gaussian" if c.gaussian and not learned else ""
    now = {}
    if c.segments.rule in ("learned", "entropy"):
        limits = c.segments.delta, c.segments.cut if learned else c.segments.threshold
        found = cut(*(jnp.inf if held is None else held for held in limits))
        now = {"bytes_per_segment_now": mean(np.asarray(found))}
    return {
        name: limit,
        "set": f"--set segments.rule={rule}{score} --set {name}={limit}",
        "bytes_per_segment": mean(counts),
        **now,
        "overflow_share": float(over.sum() / max(there.sum(), 1)),
        "lengths": _bars(counts[1:]),
    }


def _bars(counts: np.ndarray) -> list[str]:
    """Share of segments of each length, as lines."""
    share = counts / max(counts.sum(), 1)
    scale = _WIDEST / max(share.max(), 1e-9)
    return [
        f"{length:3d} bytes {100 * s:5.1f} % {'#' * round(s * scale)}"
        for length, s in enumerate(share, 1)
    ]
