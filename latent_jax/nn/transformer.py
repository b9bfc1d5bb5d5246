"""A pre-norm transformer block whose positions are real numbers and whose mask is given."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from latent_jax.ops.attention import attend
from latent_jax.ops.rope import rotate


class Cache(NamedTuple):
    """Rotated keys, and values, of the tokens so far, in buffers of ``s`` places."""

    key: Float[Array, "b s h d"]
    value: Float[Array, "b s h d"]

    @classmethod
    def empty(cls, batch: int, size: int, heads: int, width: int) -> Cache:
        """Buffers that nothing has been written to."""
        blank = jnp.zeros((batch, size, heads, width // heads))
        return cls(blank, blank)

    def write(self, key: Array, value: Array, at: Int[Array, " b"]) -> Cache:
        """The buffers with the entries of further tokens from place ``at`` on."""
        put = jax.vmap(lambda held, new, i: jax.lax.dynamic_update_slice_in_dim(held, new, i, 0))
        return Cache(put(self.key, key, at), put(self.value, value, at))


class Block(nn.Module):
    """Attention and a plain MLP, each behind a LayerNorm (Xiong et al. 2020).

    Attributes:
      width: of the residual stream.
      heads: attention heads; they divide ``width``.
      ff: hidden width of the MLP.
      attends: without it the block is its MLP alone, and positions do not mix.
      residual_scale: standard deviation of the two output projections relative to LeCun's, small in
        deep stacks so that every block starts near the identity.

    Sows ``q`` and ``k`` (rotated) into ``intermediates`` for whoever looks at the attention.
    """

    width: int
    heads: int
    ff: int
    residual_scale: float = 1.0
    attends: bool = True

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t c"],
        positions: Float[Array, "b t"],
        mask: Bool[Array, "#b t t"] | Bool[Array, "#b t s"],
        frequencies: Float[Array, "#h d2"],
        cache: Cache | None = None,
        at: Int[Array, " b"] | None = None,
    ) -> Float[Array, "b t c"] | tuple[Float[Array, "b t c"], Cache]:
        """Applies the block.

        Args:
          x: residual stream.
          positions: coordinate of each token, any unit that ``frequencies`` inverts.
          mask: what each token may see.
          frequencies: radians per unit of position of each rotary plane, per head or shared.
          cache: entries of earlier tokens, which the mask then covers, too.
          at: place of the first of these tokens in the cache.

        Returns:
          The residual stream; with a cache, also the cache with these tokens' entries.
        """
        out = nn.initializers.variance_scaling(self.residual_scale**2, "fan_in", "truncated_normal")
        if self.attends:
            seen, cache = self._attention(x, positions, mask, frequencies, out, cache, at)
            x = x + seen
        y = nn.LayerNorm(name="mlp_norm")(x)
        y = jax.nn.gelu(nn.Dense(self.ff, name="up")(y))
        x = x + nn.Dense(self.width, kernel_init=out, name="down")(y)
        return x if cache is None else (x, cache)

    def _attention(
        self, x: Array, positions: Array, mask: Array, frequencies: Array, out: Any,
        cache: Cache | None, at: Array | None,
    ) -> tuple[Array, Cache | None]:
        b, t, _ = x.shape
        d = self.width // self.heads
        y = nn.LayerNorm(name="attention_norm")(x)
        qkv = nn.Dense(3 * self.width, use_bias=False, name="qkv")(y)
        q, k, v = jnp.split(qkv.reshape(b, t, 3 * self.heads, d), 3, axis=2)
        q, k = rotate(q, positions, frequencies), rotate(k, positions, frequencies)
        self.sow("intermediates", "q", q)
        self.sow("intermediates", "k", k)
        if cache is not None:
            cache = cache.write(k, v, at)
            k, v = cache
        mask = jnp.broadcast_to(mask, (b, t, k.shape[1]))
        seen = attend(q, k, v, mask).reshape(b, t, self.width)
        return nn.Dense(self.width, use_bias=False, kernel_init=out, name="out")(seen), cache
