"""Attention from outside: the queries of a frozen decoder, and what its keys get of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from latent_jax.backbones.decoder import KV, Decoder, inverse_frequencies
from latent_jax.ops import rope
from latent_jax.ops.attention import MASKED


class Watched(NamedTuple):
    """What a frozen decoder does not hand out.

    Attributes:
      q: rotated attention queries at the rows asked for.
      kv: the call's own keys and values.
      power: mean squared norm of the residual stream before each layer, over each row's tokens.
    """

    q: Float[Array, "l b w h d"]
    kv: KV
    power: Float[Array, "l b"]


def watch(
    decoder: Decoder,
    params: Any,
    embeds: Float[Array, "b t d"],
    positions: Int[Array, "b t"],
    mask: Bool[Array, "b t"],
    rows: Int[Array, "b w"],
    prefix: KV | None = None,
    attention_mask: Bool[Array, "b t t"] | None = None,
) -> Watched:
    """Runs a decoder and sees its queries at ``rows``.

    A method interceptor takes them from the projection named ``q`` (or its ``q_norm``) and returns
    them beside the values, so that the scan over layers stacks them.
    """
    config = decoder.config
    source = "q_norm" if config.qk_norm else "q"
    taken: list[jax.Array] = []

    def intercept(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if context.method_name != "__call__":
            return out
        if context.module.name == source:
            shape = (*out.shape[:2], config.num_heads, config.head_dim)
            # Only the observed rows: all of them would be as large as the whole prefill.
            taken.append(jnp.take_along_axis(out.reshape(shape), rows[:, :, None, None], axis=1))
        elif context.module.name == "layers" and taken:
            hidden, (k, v) = out
            size = jnp.square(args[0].astype(jnp.float32)).sum(-1)
            power = (size * mask).sum(-1) / jnp.maximum(mask.sum(-1), 1)
            return hidden, (k, (v, taken.pop(), power))
        return out

    with nn.intercept_methods(intercept):
        out = decoder.apply({"params": params}, embeds, positions, mask, attention_mask, prefix)
    values, q, power = out.kv.v
    at = jnp.take_along_axis(positions, rows, axis=1)
    q = rope.rotate_layers(q, at, jnp.asarray(inverse_frequencies(config)))
    return Watched(q, KV(out.kv.k, values, mask), power)


def queries(
    decoder: Decoder,
    params: Any,
    embeds: Float[Array, "b t d"],
    positions: Int[Array, "b t"],
    mask: Bool[Array, "b t"],
    rows: Int[Array, "b w"],
    prefix: KV | None = None,
    attention_mask: Bool[Array, "b t t"] | None = None,
) -> tuple[Float[Array, "l b w h d"], KV]:
    """Rotated attention queries of every layer at ``rows``, and the call's own keys and values."""
    return watch(decoder, params, embeds, positions, mask, rows, prefix, attention_mask)[:2]


def stream_power(
    decoder: Decoder, params: Any, embeds: Float[Array, "b t d"], prefix: KV | None = None
) -> Float[Array, " l"]:
    """Mean squared norm of the residual stream before each layer, over all tokens."""

    def intercept(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if context.method_name == "__call__" and context.module.name == "layers":
            hidden, (k, _) = out
            return hidden, (k, jnp.square(args[0].astype(jnp.float32)).sum(-1).mean())
        return out

    with nn.intercept_methods(intercept):
        return decoder.apply({"params": params}, embeds, prefix=prefix).kv.v


def attention_mass(
    q: Float[Array, "l b w h d"], k: Float[Array, "l b s g d"], visible: Bool[Array, "b w s"],
) -> Float[Array, "l b s g"]:  # fmt: skip
    """Attention each key receives, summed over the queries and over its query heads.

    Args:
      q: rotated queries.
      k: rotated keys.
      visible: which keys each query sees; a query that sees none counts for nothing.
    """
    b, w, s = visible.shape
    heads, groups, width = q.shape[3], k.shape[3], q.shape[4]

    def layer(pair):
        q, k = pair
        q = q.reshape(b, w, groups, heads // groups, width) * width**-0.5
        logits = jnp.einsum("bwgrd,bsgd->bgrws", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(jnp.where(visible[:, None, None], logits, MASKED), axis=-1)
        weights = weights * visible.any(-1)[:, None, None, :, None]  # rows that stand for no token
        return jnp.moveaxis(weights.sum((2, 3)), 1, -1)

    return jax.lax.map(layer, (q, k))
