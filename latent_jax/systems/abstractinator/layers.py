"""What compressor, expander and row model are built of."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from latent_jax.nn.cross_attention import CrossAttention
from latent_jax.nn.transformer import Block, Cache
from latent_jax.ops.attention import attend
from latent_jax.ops.rope import inverse_frequencies

ROPE_THETA = 10_000.0


def sliding_mask(valid: Bool[Array, "b t"], reach: int) -> Bool[Array, "b t t"]:
    """Each byte sees itself and the valid ones among the ``reach - 1`` before it."""
    at = jnp.arange(valid.shape[1])
    behind = at[:, None] - at
    return ((behind >= 0) & (behind < reach))[None] & valid[:, None, :]


class Stack(nn.Module):
    """Pre-norm blocks and a final norm, each block after a look at a memory where there is one.

    Attributes:
      layers: blocks.
      width: residual stream.
      heads: attention heads.
      ff: hidden width of the MLPs.
    """

    layers: int
    width: int
    heads: int
    ff: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t c"],
        mask: Bool[Array, "#b t t"],
        memory: Float[Array, "b m c"] | None = None,
        seen: Bool[Array, "b m"] | None = None,
        cache: tuple[Cache, ...] | None = None,
        at: Int[Array, " b"] | None = None,
    ) -> Float[Array, "b t c"] | tuple[Float[Array, "b t c"], tuple[Cache, ...]]:
        """Applies the blocks; positions are places along ``t``.

        Args:
          x: residual stream.
          mask: what each place may see.
          memory: what every place reads besides.
          seen: which of its entries are there; given with it.
          cache: of earlier places, from `empty`; the mask covers its places.
          at: how many earlier places there are; given with it.

        Returns:
          The residual stream, with a cache also that of the next places.
        """
        places = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        if cache is not None:
            places = places + at[:, None]
        new = []
        waves = jnp.asarray(inverse_frequencies(self.width // self.heads, ROPE_THETA))
        scale = (2 * max(self.layers, 1)) ** -0.5
        for i in range(self.layers):
            if memory is not None:
                x = CrossAttention(self.width, self.heads, name=f"cross{i}")(x, memory, seen)
            block = Block(self.width, self.heads, self.ff, scale, name=f"block{i}")
            if cache is None:
                x = block(x, places, mask, waves)
            else:
                x, held = block(x, places, mask, waves, cache[i], at)
                new.append(held)
        x = nn.LayerNorm(name="final_norm")(x)
        return x if cache is None else (x, tuple(new))

    @nn.nowrap
    def empty(self, batch: int, size: int) -> tuple[Cache, ...]:
        """A cache of ``size`` places with nothing in it."""
        return (Cache.empty(batch, size, self.heads, self.width),) * self.layers


class QueryPool(nn.Module):
    """Learned queries that attend to a set and are joined into one vector.

    Attributes:
      queries: how many.
      width: of what is pooled.
      heads: attention heads.
      out: width of the vector.
    """

    queries: int
    width: int
    heads: int
    out: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "n l c"], mask: Bool[Array, "n l"]
    ) -> Float[Array, "n o"]:
        """Pools the valid entries of each set; a set without any gives a constant."""
        n = x.shape[0]
        shape = (self.heads, self.width // self.heads)
        q = self.param("query", nn.initializers.normal(1.0), (self.queries, *shape))
        k, v = jnp.split(nn.Dense(2 * self.width, use_bias=False, name="kv")(x), 2, -1)
        seen = attend(
            jnp.broadcast_to(q, (n, *q.shape)), k.reshape(n, -1, *shape), v.reshape(n, -1, *shape),
            jnp.broadcast_to(mask[:, None], (n, self.queries, mask.shape[-1])),
        )  # fmt: skip
        # An empty set has weights of masked entries; what they hold must not leak.
        seen = jnp.where(mask.any(-1)[:, None, None, None], seen, 0.0)
        return nn.Dense(self.out, name="join")(seen.reshape(n, -1))
