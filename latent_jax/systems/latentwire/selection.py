"""Keeping some of a frozen prefill's keys and values: the untrained rivals of a deep prefix."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from latent_jax.backbones.attention_probe import attention_mass, queries
from latent_jax.backbones.decoder import KV, Decoder


def keep_positions(kv: KV, index: Int[Array, "b m"], valid: Bool[Array, "b m"]) -> KV:
    """The entries at ``index`` of each row, the same for all layers and heads."""
    where = index[None, :, :, None, None]
    return KV(
        jnp.take_along_axis(kv.k, where, axis=2), jnp.take_along_axis(kv.v, where, axis=2), valid
    )


def keep_best(
    kv: KV, score: Float[Array, "l b t g"], budget: Int[Array, " b"], slots: int,
    first: bool = True,
) -> KV:  # fmt: skip
    """Each head's own ``budget[i]`` best-scored entries, in ``slots`` places.

    Args:
      first: position 0 is kept whatever its score, because without a token of its own for it
        decoders park attention there (`latent_jax.backbones.sink`) and any selection
        without it fails for a reason that has nothing to do with the text.
    """
    score = jnp.where(kv.mask[None, :, :, None], score, -jnp.inf)
    if first:
        score = score.at[:, :, 0].set(jnp.inf)
    index = jax.lax.top_k(jnp.moveaxis(score, 2, -1), slots)[1]
    index = jnp.moveaxis(index, -1, 2)[..., None]  # l b m g 1
    valid = jnp.arange(slots)[None] < budget[:, None]
    return KV(
        jnp.take_along_axis(kv.k, index, axis=2), jnp.take_along_axis(kv.v, index, axis=2), valid
    )


def mass_from_tail(
    decoder: Decoder,
    params: Any,
    ids: Int[Array, "b t"],
    mask: Bool[Array, "b t"],
    window: int = 16,
    sink: KV | None = None,
) -> Float[Array, "l b t g"]:
    """Attention mass that each position receives from the text's last ``window`` tokens.

    The observation window of SnapKV (Li et al. 2024), question-agnostic: what a stored cache could
    have done.
    """
    b, t = ids.shape
    window = min(window, t)
    length = mask.sum(-1)
    rows = length[:, None] - window + jnp.arange(window)
    real, rows = rows >= 0, jnp.maximum(rows, 0)
    positions = jnp.broadcast_to(jnp.arange(t), (b, t))
    embeds = decoder.apply({"params": params}, ids, method="embed")
    q, kv = queries(decoder, params, embeds, positions, mask, rows, sink)
    visible = (jnp.arange(t)[None, None] <= rows[:, :, None]) & real[:, :, None] & mask[:, None]
    if sink is None:
        return attention_mass(q, kv.k, visible)
    visible = jnp.concatenate([real[:, :, None], visible], axis=-1)
    return attention_mass(q, jnp.concatenate([sink.k, kv.k], axis=2), visible)[:, :, 1:]


def mass_from_question(
    decoder: Decoder,
    params: Any,
    context: KV,
    start: Int[Array, " b"],
    ids: Int[Array, "b p"],
    mask: Bool[Array, "b p"],
) -> Float[Array, "l b t g"]:
    """Attention mass that each context position receives from the question's tokens.

    It sees the question before it selects, which no stored latent can: an upper reference, not an
    equal.
    """
    b, p = ids.shape
    positions = start[:, None] + jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    rows = jnp.broadcast_to(jnp.arange(p), (b, p))
    embeds = decoder.apply({"params": params}, ids, method="embed")
    q, own = queries(decoder, params, embeds, positions, mask, rows, context)
    causal = jnp.tril(jnp.ones((p, p), bool))[None] & mask[:, None]
    before = jnp.broadcast_to(context.mask[:, None], (b, p, context.mask.shape[1]))
    visible = jnp.concatenate([before, causal], axis=-1) & mask[:, :, None]
    mass = attention_mass(q, jnp.concatenate([context.k, own.k], axis=2), visible)
    return mass[:, :, : context.mask.shape[1]]
