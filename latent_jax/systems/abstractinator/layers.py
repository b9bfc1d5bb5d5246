"""What compressor, expander and row model are built of."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from latent_jax.nn.cross_attention import CrossAttention
from latent_jax.nn.transformer import Block, Cache
from latent_jax.ops.attention import MASKED
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


def shares(width: int, stages: int, taper: float) -> Float[np.ndarray, " d"]:
    """Scale of each number of a row: equal shares, each ``taper`` times as large as the next.

    A quantiser whose first stage sees one share far larger than the rest spends that stage on it,
    the next stage on the next share, and so on: the stages start as a product of codebooks, each
    of which only has to tell a few bytes apart, instead of each refining all of them.
    """
    return taper ** -np.floor(np.arange(width) * stages / width).astype(np.float32)


class QueryPool(nn.Module):
    """Learned queries that attend to a set and are joined into one vector.

    Attributes:
      queries: how many; each starts at places of its own, the last at all that are left.
      typical: places that a usual set fills, which the queries start spread over.
      width: of what is pooled.
      heads: attention heads.
      out: width of the vector.
      parts: equal parts of the vector, each made of equally many queries and of no others.
    """

    queries: int
    typical: int
    width: int
    heads: int
    out: int
    parts: int = 1

    @nn.compact
    def __call__(
        self, x: Float[Array, "n l c"], mask: Bool[Array, "n l"]
    ) -> Float[Array, "n o"]:
        """Pools the valid entries of each set; a set without any gives a constant."""
        n, places, _ = x.shape
        shape = (self.heads, self.width // self.heads)
        q = self.param("query", nn.initializers.normal(1.0), (self.queries, *shape))
        bias = self.param("place", self._own_place, (self.queries, places))
        k, v = jnp.split(nn.Dense(2 * self.width, use_bias=False, name="kv")(x), 2, -1)
        k, v = (part.reshape(n, places, *shape) for part in (k, v))
        scores = jnp.einsum("qhd,nlhd->nhql", q * shape[1] ** -0.5, k) + bias
        weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, MASKED), -1)
        seen = jnp.einsum("nhql,nlhd->nqhd", weights, v)
        # An empty set has weights of masked entries; what they hold must not leak.
        seen = jnp.where(mask.any(-1)[:, None, None, None], seen, 0.0)
        seen = seen.reshape(n, self.parts, -1)
        shape = (self.parts, seen.shape[-1], self.out // self.parts)
        join = self.param("join", nn.initializers.lecun_normal(batch_axis=0), shape)
        return jnp.einsum("npi,pio->npo", seen, join).reshape(n, -1)

    @nn.nowrap
    def _own_place(self, key: Array, shape: tuple[int, int]) -> Float[Array, "q l"]:
        queries, places = shape
        place, query = np.minimum(np.arange(places), self.typical - 1), np.arange(queries)[:, None]
        own = (place * queries // self.typical == query) | (
            place == query * self.typical // queries
        )
        return jnp.where(own, 4.0, 0.0)
