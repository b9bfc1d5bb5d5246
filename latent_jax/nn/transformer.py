"""A pre-norm transformer block whose positions are real numbers and whose mask is given."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from latent_jax.ops.attention import attend
from latent_jax.ops.rope import rotate


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
        mask: Bool[Array, "#b t t"],
        frequencies: Float[Array, "#h d2"],
    ) -> Float[Array, "b t c"]:
        """Applies the block.

        Args:
          x: residual stream.
          positions: coordinate of each token, any unit that ``frequencies`` inverts.
          mask: what each token may see.
          frequencies: radians per unit of position of each rotary plane, per head or shared.
        """
        out = nn.initializers.variance_scaling(self.residual_scale**2, "fan_in", "truncated_normal")
        if self.attends:
            x = x + self._attention(x, positions, mask, frequencies, out)
        y = nn.LayerNorm(name="mlp_norm")(x)
        y = jax.nn.gelu(nn.Dense(self.ff, name="up")(y))
        return x + nn.Dense(self.width, kernel_init=out, name="down")(y)

    def _attention(
        self, x: Array, positions: Array, mask: Array, frequencies: Array, out: Any
    ) -> Array:
        b, t, _ = x.shape
        d = self.width // self.heads
        y = nn.LayerNorm(name="attention_norm")(x)
        qkv = nn.Dense(3 * self.width, use_bias=False, name="qkv")(y)
        q, k, v = jnp.split(qkv.reshape(b, t, 3 * self.heads, d), 3, axis=2)
        q, k = rotate(q, positions, frequencies), rotate(k, positions, frequencies)
        self.sow("intermediates", "q", q)
        self.sow("intermediates", "k", k)
        seen = attend(q, k, v, jnp.broadcast_to(mask, (b, t, t))).reshape(b, t, self.width)
        return nn.Dense(self.width, use_bias=False, kernel_init=out, name="out")(seen)
