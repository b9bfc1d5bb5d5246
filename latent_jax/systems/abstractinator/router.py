"""Segments that a model learns: cosine routing, and how it gets a gradient (H-Net, 2507.07955).

A byte starts a segment where its state is unlike the one before it. That choice is hard and the
rows are codes, so the rows pass on what they would lose by another choice, without a change of
their values: as if each were smoothed toward the row before it by the probability of its start,
and as if it weighed as much as the choices within it were sure.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from latent_jax.core.types import Mean
from latent_jax.systems.abstractinator import segment
from latent_jax.systems.abstractinator.config import RouterConfig
from latent_jax.systems.abstractinator.layers import Stack, sliding_mask
from latent_jax.systems.abstractinator.segment import Segments
from latent_jax.systems.abstractinator.tokenizer import VOCAB


def _identity(key: Array, shape: tuple[int, int], dtype: jnp.dtype = jnp.float32) -> Array:
    return jnp.eye(*shape, dtype=dtype)


class Router(nn.Module):
    """Probability that a byte starts a segment, from it and those before it.

    ``p_t = (1 - cos(W_q x_t, W_k x_(t-1))) / 2`` (H-Net, equation 4), with states ``x`` of a causal
    sliding-window transformer; the first byte always starts one. Both matrices begin as the
    identity, so that an untrained router compares the states themselves.

    Attributes:
      config: size of the transformer.
    """

    config: RouterConfig

    @nn.compact
    def __call__(self, ids: Int[Array, "b t"], valid: Bool[Array, "b t"]) -> Float[Array, "b t"]:
        """Probabilities; see the class."""
        c = self.config
        x = nn.Embed(VOCAB, c.width, name="bytes")(ids)
        x = Stack(c.layers, c.width, c.heads, c.ff, name="stack")(x, sliding_mask(valid, c.reach))
        q = nn.Dense(c.width, use_bias=False, kernel_init=_identity, name="q")(x[:, 1:])
        k = nn.Dense(c.width, use_bias=False, kernel_init=_identity, name="k")(x[:, :-1])
        length = jnp.sum(q**2, -1) * jnp.sum(k**2, -1)
        cosine = jnp.sum(q * k, -1) * jax.lax.rsqrt(length + 1e-12)
        return jnp.pad((1 - cosine) / 2, ((0, 0), (1, 0)), constant_values=1.0)


def ratio_loss(
    p: Float[Array, "b t"], valid: Bool[Array, "b t"], starts: Bool[Array, "b t"], wanted: float
) -> Mean:
    """Draws the share of starts toward one in ``wanted`` bytes; 1 where it is that.

    ``N / (N - 1) ((N - 1) F G + (1 - F) (1 - G))`` with the share ``F`` of bytes that start a
    segment and the mean probability ``G`` (H-Net, equation 10). It is a mean over bytes, and its
    gradient is that of ``G`` alone: too many starts lower every probability, too few raise them.

    Args:
      p: of a start, per byte.
      valid: which are bytes.
      starts: of segments, also where one only has its greatest length: left out, they would come on
        top of what is wanted (H-Net's segments have no greatest length).
      wanted: bytes per segment.
    """
    share = Mean.of(starts, valid).value
    each = (wanted - 1) * share * p + (1 - share) * (1 - p)
    return Mean.of(each * wanted / (wanted - 1), valid)


def pass_on(
    rows: Float[Array, "b s d"], p: Float[Array, "b t"], found: Segments, longest: int
) -> Float[Array, "b s d"]:
    """The same rows to the bit, with a gradient to the probabilities that made their segments.

    Args:
      rows: quantised rows.
      p: of a start, per byte.
      found: the segments.
      longest: most bytes of one.
    """
    laid, there = segment.grid(p, found, longest)
    starts = jnp.arange(longest) == 0
    # A segment that is only full (see `longest`) starts where the router would not.
    smooth = laid[..., :1]
    held = jax.lax.stop_gradient(rows)
    last = jnp.pad(held[:, :-1], ((0, 0), (1, 0), (0, 0)))
    sure = jnp.where(starts, laid, 1 - laid)
    sure = jnp.sum(jnp.where(there, sure, 0.0), -1) / jnp.maximum(there.sum(-1), 1)
    ghost = smooth * held + (1 - smooth) * last + sure[..., None] * held
    ghost = jnp.where(found.rows[..., None], ghost, 0.0)
    return rows + (ghost - jax.lax.stop_gradient(ghost))
