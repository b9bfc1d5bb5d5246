"""What a quantiser returns: vectors, digits, losses and figures."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from latent_jax.core.types import Mean
from latent_jax.nn.vq_config import VQConfig
from latent_jax.nn.vq_step import live_mask
from latent_jax.ops import rvq, vq_losses, vq_metrics
from latent_jax.ops.vq_state import Codebooks


class Quantized(NamedTuple):
    """What every quantiser of this library returns.

    Attributes:
      quantized: vectors made of codes, zero at padding, with a gradient to the input.
      indices: digits, group by group and stage by stage; -1 at padding and where a stage did not
        quantise (dropped, or not yet initialised).
      loss: the losses under the module's own schedules, ready to be added to a model's.
      losses: each without its weight, for a trainer that has its own.
      metrics: ``Mean``s, and figures per digit.
    """

    quantized: Float[Array, "*b d"]
    indices: Int[Array, "*b s"]
    loss: Float[Array, ""]
    losses: dict[str, Mean]
    metrics: dict[str, Any]


def losses(
    config: VQConfig,
    table: rvq.Stages,
    live: np.ndarray,
    sizes: tuple[int, ...],
    z: Float[Array, "n d"],
    keep: Bool[Array, " n"],
    found: rvq.Pass,
    weights: Float[Array, " s"],
    train: bool,
) -> dict[str, Mean]:
    """The unweighted losses of one group of codebooks.

    ``commitment`` sums over stages and is a mean over kept rows and dimensions; its gradient goes
    to ``z`` alone. ``codebook`` is the same number with its gradient in the codes. ``entropy`` is
    minus the entropy of each stage's mean soft assignment over ``log k``. ``orthogonality`` is the
    mean squared cosine of two codes less that of orthogonal ones.
    """
    count = keep.sum().astype(jnp.float32) * z.shape[-1]
    error = jnp.sum(weights * found.error)
    out = {"commitment": Mean(vq_losses.attach(error, z, found.pull), count)}
    if config.learn == "gradient":
        value = vq_losses.codebook(found, table.code) if train else found.error.sum()
        out["codebook"] = Mean(value, count)
    if config.entropy.used and train:
        entropy, rows = vq_losses.usage_entropy(
            z, table, found.indices, config.entropy_temperature, config.distance == "cosine"
        )
        most = jnp.log(jnp.maximum(jnp.asarray(sizes, jnp.float32), 2.0))
        out["entropy"] = Mean(-jnp.sum(entropy / most), jnp.sum(rows > 0).astype(jnp.float32))
    if config.orthogonality.used:
        code = table.code[: live.shape[0]]
        value = vq_losses.orthogonality(code, jnp.asarray(live))
        out["orthogonality"] = Mean(value.sum(), jnp.float32(value.size))
    return out


def metrics(
    config: VQConfig,
    live: np.ndarray,
    sizes: tuple[int, ...],
    found: rvq.Pass,
    keep: Bool[Array, " n"],
    indices: Int[Array, "*b s"],
    state: Codebooks,
) -> dict[str, Any]:
    """Figures of the present batch, with one entry per digit, groups in front of stages.

    Perplexity comes from the indices of this batch and not from moving averages, which say nothing
    about a frozen codebook. What nobody reads is not computed under jit.

    Returns:
      ``usage`` (histogram; add those of several batches and give them to `vq_metrics.usage`),
      ``perplexity``, ``entropy_ratio``, ``dead`` (share of codes nothing chose), ``stale`` (share
      unchosen for ``reset.stale`` steps), ``resets`` (so far), ``commitment`` and ``error`` (mean
      squared error of a stage's codes, and what is left after it, as `Mean`s) per digit; then
      ``quantisation_error`` of the whole as a `Mean`, ``joint_perplexity`` of whole rows of digits
      and ``perplexity_product`` of the digits taken one by one.
    """
    groups, stages = found.error.shape
    width = found.gap.shape[-1]
    every = jnp.tile(jnp.asarray(live_mask(sizes)), (groups, 1))
    count = vq_metrics.histogram(indices, every.shape[1])
    figures = vq_metrics.usage(count, every)
    rows = keep.sum().astype(jnp.float32)
    values = rows * width
    stale = (state.stale >= config.reset.stale) & jnp.asarray(live)
    stale = stale.sum(-1) / jnp.asarray(live).sum(-1)

    def spread(a: Array) -> Array:  # a shared codebook's figure stands at each of its stages
        return jnp.broadcast_to(a, (groups, stages)).reshape(-1)

    left = jnp.sum(found.distortion[:, -1])
    return jax.lax.stop_gradient(
        {
            **figures,
            "usage": count,
            "commitment": Mean(found.error.reshape(-1), values),
            "error": Mean(found.distortion.reshape(-1), values),
            "quantisation_error": Mean(left, values * groups),
            "stale": spread(stale),
            "resets": spread(state.resets),
            "joint_perplexity": vq_metrics.joint_perplexity(indices),
            "perplexity_product": jnp.prod(figures["perplexity"]),
        }
    )
