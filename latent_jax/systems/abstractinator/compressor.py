"""Bytes, or rows of the level below, to one vector per segment."""

from __future__ import annotations

import flax.linen as nn
from jaxtyping import Array, Bool, Float, Int

from latent_jax.systems.abstractinator import segment
from latent_jax.systems.abstractinator.config import LevelConfig
from latent_jax.systems.abstractinator.layers import QueryPool, Stack, shares, sliding_mask
from latent_jax.systems.abstractinator.segment import Segments
from latent_jax.systems.abstractinator.tokenizer import VOCAB


class Compressor(nn.Module):
    """A causal transformer over each segment, or over a window, then attention pooling within each.

    Attributes:
      config: the level.
      longest: most bytes, or rows, of a segment.
      typical: of a segment that is not long.
    """

    config: LevelConfig
    longest: int
    typical: int

    @nn.compact
    def __call__(
        self,
        read: Int[Array, "b t"] | Float[Array, "b t r"],
        valid: Bool[Array, "b t"],
        found: Segments,
    ) -> Float[Array, "b s d"]:
        """One vector per segment of the budget; those of missing segments mean nothing.

        Args:
          read: byte ids, or quantised rows.
          valid: which of them are there.
          found: the segments that they are in.
        """
        c = self.config
        if read.ndim == 2:
            x = nn.Embed(VOCAB, c.width, name="bytes")(read)
        else:
            x = nn.Dense(c.width, name="rows")(read)
        # Known at each byte, since starts are causal; lets a query ask for the n-th byte.
        x = x + nn.Embed(self.longest, c.width, name="place")(found.place)
        mask = sliding_mask(valid, c.reach)
        if not c.context:
            mask &= found.segment[:, :, None] == found.segment[:, None]
        x = Stack(c.compressor_layers, c.width, c.heads, c.ff, name="stack")(x, mask)
        laid, there = segment.grid(x, found, self.longest)
        b, s = there.shape[:2]
        laid = laid.reshape(b * s, self.longest, -1)
        parts = c.stages if c.taper > 1 else 1
        pool = QueryPool(
            c.queries, self.typical, c.width, c.heads, c.row_width, parts, name="pool"
        )
        rows = pool(laid, there.reshape(b * s, -1)).reshape(b, s, parts, -1)
        # Of fixed length: rows that could grow would drown what quantising takes from them, and
        # leave the codebooks behind.
        rows = nn.LayerNorm(use_bias=False, use_scale=False, name="norm")(rows).reshape(b, s, -1)
        return rows * shares(c.row_width, c.stages, c.taper)
