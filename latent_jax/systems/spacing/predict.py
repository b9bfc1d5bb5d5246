"""Predictions of all seeds on many windows, in compiled batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from latent_jax.core.types import PyTree
from latent_jax.ops import mdn
from latent_jax.systems.spacing import losses
from latent_jax.systems.spacing.config import SpacingRun
from latent_jax.systems.spacing.model import Ablation, SpacingModel


class Predicted(NamedTuple):
    """Scores of the last gap of each window, and the NLL at every scored position.

    Leading axis: seeds.
    """

    nll: Float[np.ndarray, "s n"]
    everywhere: Float[np.ndarray, "s n p"]
    mean: Float[np.ndarray, "s n"]
    pit: Float[np.ndarray, "s n"]
    crps: Float[np.ndarray, "s n"] | None
    density: mdn.Mixture  # of the last gap, axes s n k


def predictor(
    model: SpacingModel, config: SpacingRun, positions: int | None = None
) -> Callable[[PyTree, Array, Array, Array, Ablation | None], dict[str, Array]]:
    """A compiled function ``(params, gaps, log_height, key, ablation) -> scores``.

    Args:
      model: the architecture.
      config: the run.
      positions: postfix only: places of the window that are scored, evenly spread, the last among
        them (others score every position); default 16.

    Returns:
      A function of parameters with a leading axis of seeds and windows with one gap more than the
      input; its scores have the axes seed, window (and position, for ``everywhere``; component, for
      the last gap's mixture).
    """
    family = config.model.head.family
    memory = config.model.memory
    inputs = config.data.window - 1
    at = np.arange(inputs)
    if memory.kind == "postfix":
        at = np.unique(np.linspace(inputs - 1, 0, positions or 16).astype(int))

    def one(params: PyTree, gaps: Array, log_height: Array, key: Array, ablation: Any):
        out = model.apply(
            {"params": params["model"]}, gaps[:, :-1], log_height,
            cuts=jnp.asarray(at) if memory.kind == "postfix" else None,
            ablation=ablation, rngs={"sample": key},
        )  # fmt: skip
        density = losses.mixture(config, out.raw)
        truth = gaps[:, at + 1]
        last = jax.tree.map(lambda x: x[:, -1], density)
        scores = {
            "everywhere": -mdn.log_prob(density, truth, family),
            "expected": mdn.moments(last, family)[0],
            "pit": mdn.cdf(last, truth[:, -1], family),
            **last._asdict(),
        }
        if family == "gaussian":
            scores["crps"] = mdn.crps(last, truth[:, -1])
        return scores

    return jax.jit(jax.vmap(one, in_axes=(0, None, None, None, None)))


def predict(
    score: Callable[..., dict[str, Array]],
    params: PyTree,
    rows: dict[str, np.ndarray],
    batch: int,
    ablation: Ablation | None = None,
    progress: Callable[..., None] | None = None,
) -> Predicted:
    """Runs a `predictor` over windows, a batch at a time (the last one padded)."""
    n = len(rows["gaps"])
    parts = []
    for i, at in enumerate(range(0, n, batch)):
        index = np.arange(at, at + batch) % n
        key = jax.random.fold_in(jax.random.key(0), i)
        gaps, height = jnp.asarray(rows["gaps"][index]), jnp.asarray(rows["log_height"][index])
        parts.append(jax.device_get(score(params, gaps, height, key, ablation)))
        if progress is not None:
            progress("windows", min(at + batch, n), n)
    joined = {k: np.concatenate([p[k] for p in parts], axis=1)[:, :n] for k in parts[0]}
    return Predicted(
        joined["everywhere"][..., -1], joined["everywhere"], joined["expected"], joined["pit"],
        joined.get("crps"), mdn.Mixture(*(joined[name] for name in mdn.Mixture._fields)),
    )  # fmt: skip
