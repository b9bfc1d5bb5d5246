"""Rows back to the bytes of their segments, or to the digits of the rows below."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from latent_jax.nn.transformer import Cache
from latent_jax.ops.attention import MASKED
from latent_jax.systems.abstractinator.config import LevelConfig
from latent_jax.systems.abstractinator.heads import DigitHead
from latent_jax.systems.abstractinator.layers import Stack, shares
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


class _Views(nn.Module):
    """What both expanders have: rows to views, and the blocks.

    Attributes:
      config: the level.
      longest: most bytes, or rows of the level below, of a segment.
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
        self.parts()

    def views(
        self, rows: Float[Array, "b r d"], there: Bool[Array, "b r"], last: int | None = None
    ) -> Views:
        """What the segments of rows are said from.

        Args:
          rows: quantised rows (see `model.Abstractinator.append`), as in generation.
          there: which of them exist.
          last: only those of the last so many rows are said; the others are for looking back.
        """
        c = self.config
        rows = own = rows / shares(c.row_width, c.stages, c.taper)
        memory, seen = with_lookback(rows, there, c.lookback)
        if last is not None:
            at = rows.shape[1] - last
            own, memory, seen = rows[:, at:], memory[:, at:], seen[:, at:]
        n = own.shape[0] * own.shape[1]
        # Every place starts with its own view of the row; without it attention has to find the
        # n-th byte in a single vector first, and learns it many times slower.
        own = self.unfold(own).reshape(n, self.longest, c.width)
        memory = self.read(memory) + self.back(jnp.arange(c.lookback + 1))
        return Views(own, memory.reshape(n, -1, c.width), seen.reshape(n, -1))

    def whole(self, before: Float[Array, "n l c"], views: Views) -> Float[Array, "n l c"]:
        """States of every place, from what was said before it."""
        size = before.shape[1]
        causal = jnp.tril(jnp.ones((size, size), bool))[None]
        return self.stack(before + views.own[:, :size], causal, views.memory, views.seen)

    def one(
        self, before: Float[Array, "n c"], views: Views, place: Array, cache: tuple[Cache, ...]
    ) -> tuple[Float[Array, "n c"], tuple[Cache, ...]]:
        """State of one place; the cache holds those before it."""
        x = (before + views.own[:, place])[:, None]
        seen = jnp.arange(self.longest) <= place
        at = jnp.full(len(x), place, jnp.int32)
        x, cache = self.stack(x, seen[None, None], views.memory, views.seen, cache, at)
        return x[:, 0], cache

    def empty(self, segments: int) -> tuple[Cache, ...]:
        """The cache before the first place."""
        return self.stack.empty(segments, self.longest)


class Expander(_Views):
    """Says a segment byte by byte, reading its quantised row and a lookback of earlier ones."""

    @nn.nowrap
    def parts(self) -> None:
        """What is read and said."""
        self.bytes = nn.Embed(VOCAB, self.config.width)
        self.head = nn.Dense(SPOKEN)

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
        size = said.shape[-1]
        before = jnp.pad(said[..., :-1], ((0, 0), (0, 0), (1, 0)), constant_values=BOS)
        x = self.bytes(before).reshape(-1, size, self.config.width)
        x = self.whole(x, self.views(rows, there))
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
        x = self.bytes(jnp.where(place == 0, BOS, before))
        x, cache = self.one(x, views, place, cache)
        return self._speak(x[:, None], place[None])[:, 0], cache

    def _speak(self, x: Float[Array, "n p c"], places: Int[Array, " p"]) -> Float[Array, "n p v"]:
        # BOS and EOS lie between the bytes and EOP in the table; no segment says them, and none is
        # over before it has a byte.
        token = jnp.arange(SPOKEN)
        silent = ((token >= 256) & (token < EOP)) | ((token == EOP) & (places[:, None] == 0))
        return jnp.where(silent, MASKED, self.head(x))


class RowExpander(_Views):
    """Says the rows below one by one, each digit by digit; there are always ``longest`` of them.

    It reads and says codes of the level below as constants: nothing flows into a codebook.
    """

    @nn.nowrap
    def parts(self) -> None:
        """What is read and said."""
        c = self.config
        self.child = nn.Dense(c.width)
        self.begin = self.param("begin", nn.initializers.normal(0.02), (c.width,))
        self.head = DigitHead(c.width)

    def __call__(
        self,
        rows: Float[Array, "b s d"],
        there: Bool[Array, "b s"],
        said: Int[Array, "b s l n"],
        below: Float[Array, "b s l r"],
        table: Float[Array, "n k r"],
    ) -> Float[Array, "b s l n k"]:
        """Logits of every digit, from the row(s) and what was said before that digit.

        Args:
          rows: see `views`.
          there: see `views`.
          said: digits of the rows below.
          below: these rows themselves; that of place ``j`` is read at places after ``j`` alone.
          table: their codes.
        """
        size, width = said.shape[2], self.config.width
        x = self.child(below[:, :, :-1]).reshape(-1, size - 1, width)
        begin = jnp.broadcast_to(self.begin, (len(x), 1, width))
        x = self.whole(jnp.concatenate([begin, x], 1), self.views(rows, there))
        return self.head(x.reshape(*said.shape[:3], width), said, table)

    def step(
        self,
        views: Views,
        before: Float[Array, "n r"],
        place: Int[Array, ""],
        cache: tuple[Cache, ...],
    ) -> tuple[Float[Array, "n c"], tuple[Cache, ...]]:
        """State of one place, for `digits`; see `Expander.step`, with a row as what was said."""
        return self.one(jnp.where(place == 0, self.begin, self.child(before)), views, place, cache)

    def digits(
        self, state: Float[Array, "n c"], said: Int[Array, "n s"], table: Float[Array, "s k r"]
    ) -> Float[Array, "n s k"]:
        """Logits of the digits of a row below from the state of its place."""
        return self.head(state, said, table)
