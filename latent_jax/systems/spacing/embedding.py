"""What a position, or a slot, knows of the gaps up to it before any attention."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from latent_jax.systems.spacing import kernels
from latent_jax.systems.spacing.config import SpacingModelConfig, lengths


class GapEmbedding(nn.Module):
    """Near gaps as they are, far ones through learned kernels of physical distance.

    Returns the embedding and, with kernels, a linear prediction of the next gap at each position
    and its log scale: from summaries that least squares has found (see `start.embedding`), with
    weights for each length of the past; 1 and 0 before that.

    With ``claims``, shares of each past gap (``[b c m lags]``, the latest first) that slots hold at
    ``cuts``, it gives ``[b c m ...]``: what each slot holds of these three. All is linear, and
    constants go by a slot's mean share, so that they add up to the above where shares add up to 1.
    """

    config: SpacingModelConfig
    reach: float | Float[Array, ""]
    heights: tuple[Any, Any, Any, Any]  # mean, deviation, least and greatest ln(t / 2 pi)
    context: int

    @nn.compact
    def __call__(
        self,
        gaps: Float[Array, "b t"],
        log_height: Float[Array, " b"],
        cuts: Int[Array, " c"] | None = None,
        claims: Float[Array, "b c m lags"] | None = None,
    ) -> tuple[Array, Array | None, Array | None]:
        """Embeds every position, or what slots hold at cuts."""
        c = self.config.embed
        deviation = gaps - 1.0
        b, t = gaps.shape
        seen = np.minimum(np.arange(1, t + 1), self.context)
        past = [kernels.lagged(deviation, c.near)]
        if c.kernels:
            past = kernels.channels(deviation, self.context, c.products)
        share = jnp.ones((b, t))
        if claims is not None:
            seen = jnp.repeat(jnp.asarray(seen)[cuts], claims.shape[2])
            held = claims.reshape(b, len(seen), -1)
            past = [held * jnp.repeat(x[:, cuts], claims.shape[2], axis=1) for x in past]
            inside = jnp.arange(self.context) < seen[:, None]
            share = jnp.sum(held * inside, axis=-1) / seen
        # Of a past of so many gaps here, what is known is known of one as long in distance.
        span = kernels.equivalent(seen, log_height, self.context, self.reach)
        of_span = functools.partial(jnp.take, indices=span - 1, axis=0)
        parts = [past[0][..., : c.near]]
        line = spread = None
        if c.kernels:
            init, zeros = nn.initializers.normal(c.knots**-0.5), nn.initializers.zeros
            h = self.param("kernels", init, (1 + c.products, c.knots, c.kernels))
            offset = self.param("offset", zeros, (c.kernels,))
            summaries = share[..., None] * offset + sum(
                kernels.summarise(x, h[i], log_height, self.reach) for i, x in enumerate(past)
            )
            parts.append(summaries)
            fitted = len(lengths(self.context)[: c.kernels])
            gate = self.param("gate", zeros, (self.context, fitted))
            level = self.param("level", zeros, (self.context,))
            line = jnp.einsum("btr,btr->bt", summaries[..., :fitted], of_span(gate))
            line = line + share * (1.0 + of_span(level))
            spread = share * of_span(self.param("spread", zeros, (self.context,)))
        # How much past there is: summaries of a short one are small for want of terms.
        parts.append((share * span / self.context)[..., None])
        if c.height:
            mean, std, least, most = self.heights
            # Heights beyond those of training are as unknown as any: the nearest stands for them.
            level = (jnp.clip(log_height, least, most)[:, None] - mean) / std
            parts.append((share * level)[..., None])
        if claims is not None:
            parts.append(share[..., None])  # in place of a bias
        dense = nn.Dense(self.config.width, use_bias=claims is None, name="embed")
        made = (dense(jnp.concatenate(parts, axis=-1)), line, spread)
        if claims is None:
            return made
        return jax.tree.map(lambda x: x.reshape(*claims.shape[:3], *x.shape[2:]), made)
