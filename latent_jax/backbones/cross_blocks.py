"""Gated cross-attention in front of chosen layers of a frozen decoder.

As in Flamingo (Alayrac et al. 2022): a block reads a memory and adds what it makes of it to the
residual stream, attention and MLP each behind a gate. With gates of 0 the decoder is as it was. The
blocks travel with a prefix (`KV.cross`), because what they read differs from row to row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from latent_jax.ops import attention, rope


class CrossBlocks(NamedTuple):
    """Blocks of all layers, and the memory that they read.

    Attributes:
      on: in front of which layers there is one; the numbers of the others are not looked at.
      weights: ``norm, mlp_norm [l d]``, ``q [l d e]``, ``out [l e d]``, ``up [l d f]``,
        ``down [l f d]``, ``gate, mlp_gate [l]``.
      k: keys, rotated to the memory's places.
      v: values.
      mask: which entries are real.
    """

    on: Bool[Array, " l"]
    weights: Mapping[str, Array]
    k: Float[Array, "l b m h d"]
    v: Float[Array, "l b m h d"]
    mask: Bool[Array, "b m"]

    def rows(self, at: Int[Array, " n"]) -> CrossBlocks:
        """The memories of some rows of the batch."""
        return self._replace(k=self.k[:, at], v=self.v[:, at], mask=self.mask[at])


def _norm(x: Array, scale: Array, eps: float) -> Array:
    x32 = x.astype(jnp.float32)
    x32 *= jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * scale).astype(x.dtype)


def apply(
    x: Float[Array, "b t d"],
    own: CrossBlocks,
    positions: Int[Array, "b t"],
    inv_freq: Float[Array, " d2"],
    eps: float,
) -> Float[Array, "b t d"]:
    """One layer's block on the residual stream; the stream itself where the layer has none.

    Args:
      own: the layer's (without the leading axis).
      positions: of the stream's tokens.
      inv_freq: rotary frequencies of the layer.
      eps: of the norms.
    """
    w = {name: value.astype(x.dtype) for name, value in own.weights.items()}
    b, t, _ = x.shape
    visible = jnp.broadcast_to(own.mask[:, None], (b, t, own.mask.shape[1]))

    def block(x: Array) -> Array:
        q = _norm(x, w["norm"], eps) @ w["q"]
        q = rope.rotate(q.reshape(b, t, *own.k.shape[2:]), positions, inv_freq)
        read = attention.attend(q, own.k.astype(x.dtype), own.v.astype(x.dtype), visible)
        # Who has no memory reads nothing.
        read = jnp.where(own.mask.any(-1)[:, None, None], read.reshape(b, t, -1), 0)
        x = x + w["gate"] * (read @ w["out"])
        inner = jax.nn.gelu(_norm(x, w["mlp_norm"], eps) @ w["up"])
        return x + w["mlp_gate"] * (inner @ w["down"])

    return jax.lax.cond(own.on, block, lambda x: x, x)
