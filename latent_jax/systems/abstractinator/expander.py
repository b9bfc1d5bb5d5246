"""Rows back to the bytes of their segments."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from latent_jax.nn.transformer import Cache
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


class Views(NamedTuple):
    """What ``n`` segments are said from, the same at every place.

    Attributes:
      own: what each place starts with of its row.
      memory: the row and its lookback.
      seen: which of these are there.
    """

    own: Float[Array, "n l c"]
    memory: Float[Array, "n m c"]
    seen: Bool[Array, "n m"]


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
        self.unfold = nn.Dense(self.longest * c.width)
        self.read = nn.Dense(c.width)
        self.back = nn.Embed(c.lookback + 1, c.width)
        self.bytes = nn.Embed(VOCAB, c.width)
        self.head = nn.Dense(SPOKEN)

    def views(self, rows: Float[Array, "b s d"], there: Bool[Array, "b s"]) -> Views:
        """What the segments of all rows are said from.

        Args:
          rows: quantised rows (see `model.Abstractinator.append`), as in generation.
          there: which of them exist.
        """
        c = self.config
        n = rows.shape[0] * rows.shape[1]
        # Every place starts with its own view of the row; without it attention has to find the
        # n-th byte in a single vector first, and learns it many times slower.
        own = self.unfold(rows).reshape(n, self.longest, c.width)
        memory, seen = with_lookback(rows, there, c.lookback)
        memory = self.read(memory) + self.back(jnp.arange(c.lookback + 1))
        return Views(own, memory.reshape(n, -1, c.width), seen.reshape(n, -1))

    def __call__(
        self,
        rows: Float[Array, "b s d"],
        there: Bool[Array, "b s"],
        said: Int[Array, "b s l"],
    ) -> Float[Array, "b s l v"]:
        """Logits of every place, from the row(s) and what was said before that place.

        Args:
          rows: see `views`.
          there: see `views`.
          said: ids of each segment; that of place ``j`` is read at places after ``j`` alone.
        """
        views = self.views(rows, there)
        size = said.shape[-1]
        before = jnp.pad(said[..., :-1], ((0, 0), (0, 0), (1, 0)), constant_values=BOS)
        x = self.bytes(before).reshape(-1, size, self.config.width) + views.own[:, :size]
        causal = jnp.tril(jnp.ones((size, size), bool))[None]
        x = self.stack(x, causal, views.memory, views.seen)
        return self._speak(x, jnp.arange(size)).reshape(*said.shape, SPOKEN)

    def step(
        self,
        views: Views,
        before: Int[Array, " n"],
        place: Int[Array, ""],
        cache: tuple[Cache, ...],
    ) -> tuple[Float[Array, "n v"], tuple[Cache, ...]]:
        """Logits of one place; the cache holds those before it.

        Args:
          views: of the segments.
          before: what was said at the place before.
          place: which; nothing is before the first.
          cache: from `empty` at first.
        """
        x = self.bytes(jnp.where(place == 0, BOS, before)) + views.own[:, place]
        seen = jnp.arange(self.longest) <= place
        at = jnp.full(len(x), place, jnp.int32)
        x, cache = self.stack(x[:, None], seen[None, None], views.memory, views.seen, cache, at)
        return self._speak(x, place[None])[:, 0], cache

    def empty(self, segments: int) -> tuple[Cache, ...]:
        """The cache before the first place."""
        return self.stack.empty(segments, self.longest)

    def _speak(self, x: Float[Array, "n p c"], places: Int[Array, " p"]) -> Float[Array, "n p v"]:
        # BOS and EOS lie between the bytes and EOP in the table; no segment says them, and none is
        # over before it has a byte.
        token = jnp.arange(SPOKEN)
        silent = ((token >= 256) & (token < EOP)) | ((token == EOP) & (places[:, None] == 0))
        return jnp.where(silent, MASKED, self.head(x))
