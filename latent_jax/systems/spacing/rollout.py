"""Continuing a window with the model's own predictions: error growth, and statistics of samples."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from latent_jax.core.types import PyTree
from latent_jax.ops import mdn
from latent_jax.systems.spacing import losses
from latent_jax.systems.spacing.config import SpacingRun
from latent_jax.systems.spacing.kernels import prime_powers
from latent_jax.systems.spacing.model import SpacingModel

HORIZONS = (1, 10, 50, 200)
_VARIANCE_LENGTHS = (1, 2, 5, 10, 20)
_LINES = 6
_DIVERGED = 50.0  # mean gaps: no gap is as long, and a continuation with one has run away


def continuations(
    model: SpacingModel,
    config: SpacingRun,
    params: PyTree,
    gaps: Float[np.ndarray, "b t"],
    log_height: Float[np.ndarray, " b"],
    horizon: int,
    key: jax.Array,
) -> tuple[Float[np.ndarray, "b h"], Float[np.ndarray, "b h"]]:
    """Continues windows by sampling, and by always taking the mean.

    Each step reads the last ``t`` gaps, so that no prediction sees a longer past than in training.

    Args:
      model: the architecture.
      config: the run.
      params: of one seed.
      gaps: windows of as many gaps as the model reads.
      log_height: their heights.
      horizon: gaps to add.
      key: of the draws.

    Returns:
      (sampled, mean) continuations.
    """
    family = config.model.head.family

    def step(params: PyTree, window: Array, key: Array, sampled: bool):
        out = model.apply({"params": params["model"]}, window, height, rngs={"sample": key})
        density = jax.tree.map(lambda x: x[:, -1], losses.mixture(config, out.raw))
        if sampled:
            following = mdn.sample(key, density, family=family)
        else:
            following = mdn.moments(density, family)[0]
        following = jnp.maximum(following, 1e-3)
        return jnp.concatenate([window[:, 1:], following[:, None]], axis=1), following

    @jax.jit
    def both(params: PyTree, window: Array, key: Array):
        keys = jax.random.split(key, horizon)
        sampled = jax.lax.scan(lambda w, k: step(params, w, k, True), window, keys)[1]
        mean = jax.lax.scan(lambda w, k: step(params, w, k, False), window, keys)[1]
        return sampled.T, mean.T

    height = jnp.asarray(log_height)
    sampled, mean = jax.device_get(both(params, jnp.asarray(gaps), key))
    return sampled, mean


def number_variance(gaps: Float[np.ndarray, "b h"], length: float) -> float:
    """Variance of the number of points in intervals of ``length`` mean gaps."""
    counts = []
    for row in gaps:
        points = np.cumsum(row)
        starts = np.arange(0.0, points[-1] - length, length / 2)
        inside = np.searchsorted(points, starts + length) - np.searchsorted(points, starts)
        counts.append(inside)
    joined = np.concatenate(counts)
    return float(joined.var()) if len(joined) > 1 else float("nan")


def pair_correlation(
    gaps: Float[np.ndarray, "b h"], edges: Float[np.ndarray, " e"]
) -> Float[np.ndarray, " e-1"]:
    """Density of points at a distance from a point; 1 far away, 0 nearby (repulsion)."""
    total, starts = np.zeros(len(edges) - 1), 0
    for row in gaps:
        points = np.cumsum(row)
        for i in np.flatnonzero(points < points[-1] - edges[-1]):
            total += np.histogram(points[i + 1 :] - points[i], bins=edges)[0]
            starts += 1
    return total / max(starts, 1) / np.diff(edges)


def line_power(
    gaps: Float[np.ndarray, "b h"], log_height: Float[np.ndarray, " b"], q: float
) -> float:
    """Mean power of the points' fluctuation at ``ln q`` per unit of physical distance.

    ``|sum_n delta_n exp(i ln q x_n)|^2 / h`` with deviations ``delta_n`` from an even spacing and
    ``x_n = 2 pi n / L``: prime powers stand out (explicit formula), other frequencies do not.
    """
    h = gaps.shape[1]
    delta = np.cumsum(gaps - gaps.mean(1, keepdims=True), axis=1)
    phase = np.log(q) * 2 * np.pi * np.arange(h) / log_height[:, None]
    wave = np.abs((delta * np.exp(1j * phase)).sum(1)) ** 2 / h
    return float(wave.mean())


def statistics(
    model: SpacingModel,
    config: SpacingRun,
    params: PyTree,
    rows: dict[str, np.ndarray],
) -> dict[str, Any]:
    """Error growth of mean continuations; statistics of sampled ones beside the truth's.

    Args:
      model: the architecture.
      config: the run.
      params: of one seed.
      rows: windows of ``data.window - 1 + eval.horizon`` gaps.

    Returns:
      ``rollout.error.h<h>`` (mean distance of the h-th point from its place, mean gaps), their
      ``rollout.slope`` (of ln error over ln h), and for sampled and true continuations
      ``rollout.number_variance.l<L>``, ``rollout.pair_correlation`` and ``rollout.line.<q>``; all
      of those that stay near the truth, ``rollout.diverged.mean`` and ``.sampled`` are the shares
      of the others.
    """
    inputs = config.data.window - 1
    past, future = rows["gaps"][:, :inputs], rows["gaps"][:, inputs:]
    horizon = future.shape[1]
    sampled, mean = continuations(
        model, config, params, past, rows["log_height"], horizon, jax.random.key(config.seed)
    )
    # Not a number is no small gap either.
    stays, sane = ((gaps < _DIVERGED).all(1) for gaps in (mean, sampled))
    found: dict[str, Any] = {
        "rollout.diverged.mean": float(1 - stays.mean()),
        "rollout.diverged.sampled": float(1 - sane.mean()),
    }
    apart = np.abs(np.cumsum(mean[stays], 1) - np.cumsum(future[stays], 1))
    at = [h for h in HORIZONS if h <= horizon and stays.any()]
    found |= {f"rollout.error.h{h}": float(apart[:, h - 1].mean()) for h in at}
    if len(at) > 1:
        growth = np.log([found[f"rollout.error.h{h}"] for h in at])
        found["rollout.slope"] = float(np.polyfit(np.log(at), growth, 1)[0])
    edges = np.linspace(0, 3, 31)
    for name, gaps in (("sampled", sampled[sane]), ("true", future[sane])):
        if not len(gaps):
            continue
        for length in _VARIANCE_LENGTHS:
            if 4 * length < horizon:
                key = f"rollout.number_variance.l{length}.{name}"
                found[key] = number_variance(gaps, length)
        for q in prime_powers(_LINES):
            power = line_power(gaps, rows["log_height"][sane], q)
            found[f"rollout.line.{int(q)}.{name}"] = power
        found[f"rollout.pair_correlation.{name}"] = pair_correlation(gaps, edges).tolist()
    return found
