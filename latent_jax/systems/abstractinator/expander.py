"""Rows back to the bytes of their segments."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from latent_jax.ops.attention import MASKED
from latent_jax.systems.abstractinator.config import LevelConfig
from latent_jax.systems.abstractinator.layers import Stack
from latent_jax.systems.abstractinator.tokenizer import BOS, EOP, SPOKEN, VOCAB


def with_lookback(
    rows: Float[Array, "b s d"], there: Bool[Array, "b s"], lookback: int
) -> tuple[Float[Array, "b s m d"], Bool[Array, "b s m"]]:
    """Each row and the ``lookback`` before it, own row first."""
    b, s, _ = rows.shape
    at = jnp.arange(s)[:, None] - jnp.arange(lookback + 1)
    seen = (at >= 0)[None] & there[:, jnp.maximum(at, 0).reshape(-1)].reshape(b, s, -1)
    return rows[:, jnp.maximum(at, 0)], seen


class Expander(nn.Module):
    """Says a segment byte by byte, reading its quantised row and a lookback of earlier ones.

    Attributes:
      config: the level.
      longest: most bytes of a segment.
    """

    config: LevelConfig
    longest: int

    def setup(self) -> None:
        c = self.config
        self.stack = Stack(c.expander_layers, c.width, c.heads, c.ff)
        # its blocks are named beside the expander's own parts, as in trained files
        nn.share_scope(self, self.stack)

    @nn.compact
    def __call__(
        self,
        rows: Float[Array, "b s d"],
        there: Bool[Array, "b s"],
        said: Int[Array, "b s l"],
    ) -> Float[Array, "b s l v"]:
        """Logits of every place, from the row(s) and what was said before that place.

        Args:
          rows: quantised rows (see `model.Abstractinator.append`), as in generation.
          there: which of them exist.
          said: ids of each segment; that of place ``j`` is read at places after ``j`` alone.
        """
        c = self.config
        b, s, size = said.shape
        before = jnp.pad(said[..., :-1], ((0, 0), (0, 0), (1, 0)), constant_values=BOS)
        x = nn.Embed(VOCAB, c.width, name="bytes")(before)
        # Every place starts with its own view of the row; without it attention has to find the
        # n-th byte in a single vector first, and learns it many times slower.
        own = nn.Dense(self.longest * c.width, name="unfold")(rows)
        x = x + own.reshape(b, s, self.longest, c.width)[:, :, :size]
        memory, seen = with_lookback(rows, there, c.lookback)
        memory = nn.Dense(c.width, name="read")(memory)
        memory = memory + nn.Embed(c.lookback + 1, c.width, name="back")(jnp.arange(c.lookback + 1))
        memory, seen = memory.reshape(b * s, -1, c.width), seen.reshape(b * s, -1)
        x = x.reshape(b * s, size, c.width)
        causal = jnp.tril(jnp.ones((size, size), bool))[None]
        logits = nn.Dense(SPOKEN, name="head")(self.stack(x, causal, memory, seen))
        # BOS and EOS lie between the bytes and EOP in the table; no segment says them, and none is
        # over before it has a byte.
        token, place = jnp.arange(SPOKEN), jnp.arange(size)[:, None]
        silent = ((token >= 256) & (token < EOP)) | ((token == EOP) & (place == 0))
        return jnp.where(silent, MASKED, logits).reshape(b, s, size, SPOKEN)
