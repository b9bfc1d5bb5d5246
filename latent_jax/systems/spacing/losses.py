"""Loss terms of one seed on its windows."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from latent_jax.core.types import Mean, PyTree
from latent_jax.ops import mdn
from latent_jax.systems.spacing import auxiliary
from latent_jax.systems.spacing.config import AUXILIARY_SPAN, MemoryConfig, SpacingRun
from latent_jax.systems.spacing.model import Output, SpacingModel


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def clip_gradient(tree: PyTree, longest: float) -> PyTree:
    """The tree itself; the gradient that comes back through it is at most ``longest`` long."""
    return tree


def _clip(longest: float, _: None, gradient: PyTree) -> tuple[PyTree]:
    clipped, _ = optax.clip_by_global_norm(longest).update(gradient, optax.EmptyState())
    return (clipped,)


clip_gradient.defvjp(lambda tree, longest: (tree, None), _clip)


def mixture(config: SpacingRun, raw: Array) -> mdn.Mixture:
    """The head's output as a mixture."""
    head = config.model.head
    return mdn.from_raw(raw, head.floor, head.positive_mean)


def draw_cuts(key: jax.Array, count: int, inputs: int) -> Int[Array, " c"]:
    """Places from which postfix slots predict: one in each of ``count`` equal parts, the last last.

    Parts and not free draws, so that short and long pasts are in every step.
    """
    edges = jnp.linspace(0, inputs, count + 1)
    at = edges[:-1] + jax.random.uniform(key, (count,)) * (edges[1:] - edges[:-1])
    return jnp.minimum(at.astype(jnp.int32), inputs - 1).at[-1].set(inputs - 1)


def orthogonality(slots: Float[Array, "b c m w"]) -> Float[Array, "b c"]:
    """Mean squared cosine between different slots of a window."""
    unit = slots * jax.lax.rsqrt(jnp.sum(slots**2, -1, keepdims=True) + 1e-8)
    cosine = jnp.einsum("bciw,bcjw->bcij", unit, unit)
    m = slots.shape[-2]
    return (jnp.sum(cosine**2, (-2, -1)) - m) / max(m * (m - 1), 1)


def auxiliary_errors(
    slots: Float[Array, "b c m w"],
    targets: Float[Array, "b c 8"],
    readers: dict[str, Array],
    memory: MemoryConfig,
) -> Float[Array, "b c"]:
    """Mean squared error of linear read-outs of (standardised) statistics from the slots."""
    if memory.assignment == "mean":
        guess = jnp.einsum("bcw,wk->bck", slots.mean(2), readers["kernel"]) + readers["bias"]
        return jnp.mean((guess - targets) ** 2, -1)
    k = min(memory.slots, targets.shape[-1])
    read = jnp.einsum("bckw,wk->bck", slots[:, :, :k], readers["kernel"][:, :k])
    return jnp.mean((read + readers["bias"][:k] - targets[..., :k]) ** 2, -1)


def terms(
    model: SpacingModel,
    config: SpacingRun,
    params: PyTree,
    gaps: Float[Array, "b t"],
    log_height: Float[Array, " b"],
    statistics: tuple[Array, Array],
    key: jax.Array,
    train: bool,
) -> tuple[dict[str, Mean], dict[str, Any]]:
    """The weighted terms and what is only logged.

    Args:
      model: the architecture.
      config: the run.
      params: ``{"model": …, "auxiliary": …}`` of one seed.
      gaps: windows; the last gap is only a target.
      log_height: their heights.
      statistics: mean and standard deviation of the auxiliary targets in training.
      key: for cuts, dropout and permutations.
      train: whether dropout and permutations are drawn.
    """
    memory = config.model.memory
    inputs = gaps.shape[1] - 1
    key, cut_key = jax.random.split(key)
    at = jnp.arange(inputs)
    if memory.kind == "postfix":
        at = draw_cuts(cut_key, memory.cuts, inputs)
    out: Output = model.apply(
        {"params": params["model"]}, gaps[:, :-1], log_height,
        cuts=at if memory.kind == "postfix" else None, train=train, rngs={"sample": key},
    )  # fmt: skip
    density = mixture(config, out.raw)
    truth = gaps[:, at + 1]
    nll = -mdn.log_prob(density, truth, config.model.head.family)
    late = jnp.broadcast_to(at >= (config.data.window - 1) * 3 // 4, nll.shape)
    weight = jnp.exp(density.log_weight)
    found = {
        "nll": Mean.of(nll),
        "last": Mean.of(nll, late),
        "entropy": Mean.of(jnp.sum(weight * density.log_weight, -1)),
    }
    if out.slots is not None:
        found["orthogonality"] = Mean.of(orthogonality(out.slots))
        if "auxiliary" in params:
            cuts = at if memory.kind == "postfix" else at[-1:]
            mean, std = statistics
            wanted = (auxiliary.targets(gaps[:, :-1], cuts) - mean) / std
            error = auxiliary_errors(out.slots, wanted, params["auxiliary"], memory)
            whole = jnp.broadcast_to(cuts >= AUXILIARY_SPAN - 1, error.shape)
            found["auxiliary"] = Mean.of(error, whole)
    return found, {"nll_last": Mean.of(nll[:, -1])}
