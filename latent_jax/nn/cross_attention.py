"""Attention of one set on another."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from latent_jax.ops.attention import attend


class CrossAttention(nn.Module):
    """Residual attention on a memory; who sees nothing reads nothing.

    Attributes:
      width: residual stream.
      heads: attention heads.
      norm_memory: normalise the memory, too, where it is a residual stream itself.
    """

    width: int
    heads: int
    norm_memory: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t c"],
        memory: Float[Array, "b m c"],
        mask: Bool[Array, "b m"] | Bool[Array, "b t m"],
    ) -> Float[Array, "b t c"]:
        """Adds to ``x`` what it reads of the entries that all, or each, of it may see."""
        b, t, _ = x.shape
        if mask.ndim == 2:
            mask = jnp.broadcast_to(mask[:, None], (b, t, mask.shape[-1]))
        shape = (self.heads, self.width // self.heads)
        q = nn.Dense(self.width, use_bias=False, name="q")(nn.LayerNorm(name="query_norm")(x))
        if self.norm_memory:
            memory = nn.LayerNorm(name="memory_norm")(memory)
        k, v = jnp.split(nn.Dense(2 * self.width, use_bias=False, name="kv")(memory), 2, -1)
        seen = attend(
            q.reshape(b, t, *shape), k.reshape(b, -1, *shape), v.reshape(b, -1, *shape), mask
        )
        seen = jnp.where(mask.any(-1)[..., None], seen.reshape(b, t, -1), 0.0)
        return x + nn.Dense(self.width, use_bias=False, name="out")(seen)
