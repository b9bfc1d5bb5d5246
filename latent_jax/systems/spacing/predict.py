"""Predictions of all seeds on many windows, in compiled batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from latent_jax.core.types import PyTree
from latent_jax.ops import mdn
from latent_jax.systems.spacing import losses
from latent_jax.systems.spacing.config import SpacingRun
from latent_jax.systems.spacing.model import Ablation, SpacingModel
from latent_jax.systems.spacing.recipe import Gaps, Part

_PLACES = 16  # of a window, from which the slots of a postfix predict


class Predicted(NamedTuple):
    """Scores of the last gap of each window, and the NLL at every scored position.

    Leading axis: seeds.
    """

    nll: Float[np.ndarray, "s n"]
    everywhere: Float[np.ndarray, "s n p"]
    mean: Float[np.ndarray, "s n"]
    pit: Float[np.ndarray, "s n"]
    crps: Float[np.ndarray, "s n"] | None


def scored(config: SpacingRun) -> Int[np.ndarray, " p"]:
    """Positions of a window that are scored, the last among them.

    All; of a postfix, where each costs a pass of the slots, some, close together where the past is
    short and each further gap says much.
    """
    inputs = config.data.window - 1
    if config.model.memory.kind != "postfix":
        return np.arange(inputs)
    return np.unique(np.geomspace(1, inputs, _PLACES).round().astype(int)) - 1


def averaging(at: Int[np.ndarray, " p"]) -> Float[np.ndarray, " p"]:
    """Weights of scored positions in a mean over all up to the last, those between interpolated."""
    every = np.arange(at[-1] + 1)
    return np.stack([np.interp(every, at, unit) for unit in np.eye(len(at))]).mean(1)


def predictor(
    model: SpacingModel, config: SpacingRun, last_only: bool = False
) -> Callable[[PyTree, Array, Array, Array, Ablation | None], dict[str, Array]]:
    """A compiled function ``(params, gaps, log_height, key, ablation) -> scores``.

    Args:
      model: the architecture.
      config: the run.
      last_only: score the last position of each window only, not all of `scored`.

    Returns:
      A function of parameters with a leading axis of seeds and windows with one gap more than the
      input; its scores have the axes seed, window (and position, for ``everywhere``).
    """
    family = config.model.head.family
    at = scored(config)[-1:] if last_only else scored(config)
    postfix = config.model.memory.kind == "postfix"
    cuts = jnp.asarray(at) if postfix else None

    def one(params: PyTree, gaps: Array, log_height: Array, key: Array, ablation: Any):
        out = model.apply(
            {"params": params["model"]}, gaps[:, :-1], log_height,
            cuts=cuts, ablation=ablation, rngs={"sample": key},
        )  # fmt: skip
        density = losses.mixture(config, out.raw if postfix else out.raw[:, at])
        truth = gaps[:, at + 1]
        last = jax.tree.map(lambda x: x[:, -1], density)
        scores = {
            "everywhere": -mdn.log_prob(density, truth, family),
            "mean": mdn.moments(last, family)[0],
            "pit": mdn.cdf(last, truth[:, -1], family),
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
        joined["everywhere"][..., -1], joined["everywhere"], joined["mean"], joined["pit"],
        joined.get("crps"),
    )  # fmt: skip


def densities(
    model: SpacingModel, config: SpacingRun, params: PyTree, gaps: Gaps, part: Part, count: int
) -> tuple[mdn.Mixture, Float[np.ndarray, " n"]]:
    """Mixtures (axes seed, target, component) of about ``count`` gaps of a part, and these gaps.

    Each has a whole window of past. Where blocks do not attend, every position of a long window
    looks back as far, so that one such window gives as many targets as it has gaps beyond that.
    """
    window = config.data.window
    ahead = 1 if len(config.model.attending) else window
    starts = getattr(gaps, part)
    run = gaps.source.run
    last = starts + ahead - 1
    starts = starts[np.isin(last, starts) & (starts // run == (last + window - 1) // run)]
    most = min(-(-count // ahead), len(starts))
    starts = starts[np.linspace(0, len(starts) - 1, most).astype(int)]

    def one(params: PyTree, row: Array, log_height: Array, key: Array) -> mdn.Mixture:
        out = model.apply(
            {"params": params["model"]}, row[None, :-1], log_height[None], rngs={"sample": key}
        )
        return jax.tree.map(lambda x: x[0, -ahead:], losses.mixture(config, out.raw))

    rows = gaps.windows(starts, window + ahead - 1)
    keys = jax.random.split(jax.random.key(0), len(starts))

    def each(params: PyTree, *inputs: Array) -> mdn.Mixture:
        return jax.lax.map(lambda x: one(params, *x), inputs, batch_size=16)

    over_seeds = jax.jit(jax.vmap(each, in_axes=(0, None, None, None)))
    found = jax.device_get(over_seeds(params, rows["gaps"], rows["log_height"], keys))
    flat = jax.tree.map(lambda x: x.reshape(len(x), -1, x.shape[-1]), found)
    return flat, rows["gaps"][:, -ahead:].ravel()
