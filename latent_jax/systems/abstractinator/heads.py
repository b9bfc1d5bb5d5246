"""Logits of digits by the distance of a predicted row to the codes of each stage."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def before(digits: Int[Array, "*b n"], table: Float[Array, "n k d"]) -> Float[Array, "*b n d"]:
    """What the codes of the stages before each add up to; a digit below 0 adds nothing."""
    parts = jax.vmap(lambda code, i: code[i], (0, -1), -2)(table, jnp.maximum(digits, 0))
    parts = jnp.where((digits >= 0)[..., None], parts, 0.0)
    # Not the sum less the own part, which would leave a trace of it in the last bit.
    shifted = jnp.pad(parts[..., :-1, :], [(0, 0)] * (parts.ndim - 2) + [(1, 0), (0, 0)])
    return jnp.cumsum(shifted, -2)


def near(
    left: Float[Array, "*b n d"], table: Float[Array, "n k d"], sharpness: Float[Array, " n"]
) -> Float[Array, "*b n k"]:
    """Logits that fall with the squared distance of what is left to each code.

    ``|left|^2`` is the same for all codes of a stage, and dropped.
    """
    closeness = 2 * jnp.einsum("...nd,nkd->...nk", left, table) - jnp.sum(table**2, -1)
    # Distances per number are of the order of 1 and the best sharpness that of the width or more:
    # the factor gets there in a hundred steps of any usual rate.
    return jnp.exp(8 * sharpness)[:, None] * closeness / left.shape[-1]


class DigitHead(nn.Module):
    """Digits of a row from a state, each stage given the codes of those before it.

    Attributes:
      width: of the state.
    """

    width: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*b c"],
        digits: Int[Array, "*b n"],
        table: Float[Array, "n k d"],
    ) -> Float[Array, "*b n k"]:
        """Logits of every stage.

        Args:
          x: states.
          digits: of the rows; that of a stage is read by later ones alone.
          table: the codes of all stages, as constants.
        """
        stages, _, row = table.shape
        own = self.param("stage", nn.initializers.normal(0.02), (stages, self.width))
        x = x[..., None, :] + nn.Dense(self.width, name="given")(before(digits, table)) + own
        x = x + jax.nn.gelu(nn.Dense(self.width, name="mix")(nn.LayerNorm(name="mix_norm")(x)))
        shape = (stages, self.width, row)
        out = self.param("out", nn.initializers.lecun_normal(batch_axis=0), shape)
        left = jnp.einsum("...nc,ncd->...nd", nn.LayerNorm(name="out_norm")(x), out)
        return near(left, table, self.param("sharpness", nn.initializers.zeros, (stages,)))
