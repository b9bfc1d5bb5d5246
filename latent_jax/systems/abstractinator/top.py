"""A language model over quantised rows, and the plain one over bytes that it is compared with."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from latent_jax.nn.transformer import Block, Cache
from latent_jax.ops.attention import causal_mask
from latent_jax.systems.abstractinator.config import TopConfig, TransformerConfig
from latent_jax.systems.abstractinator.heads import before, near
from latent_jax.systems.abstractinator.layers import Stack
from latent_jax.systems.abstractinator.tokenizer import BOS, VOCAB


class TopLM(nn.Module):
    """Reads rows, predicts the digits of the next; stage ``s`` given stages before ``s``.

    The continuous head predicts a row. What is left of it after the codes of stages before ``s``
    lies at some distance from each code of stage ``s``, and minus that distance, at a sharpness
    learned per stage, is the logit. The likeliest digits, stage by stage, are thus those that the
    quantiser gives to the predicted row, and the same digits have a likelihood that can be counted
    in bits. Only the sharpness follows that likelihood; the row follows the next row. The mixed
    head adds the logits of both and lets all follow both.

    Attributes:
      config: size of the transformer, and the head.
      codes: codes per stage.
      stages: digits of a row.
      row_width: numbers in a row.
    """

    config: TopConfig
    codes: int
    stages: int
    row_width: int

    def setup(self) -> None:
        c = self.config
        self.first = self.param("first", nn.initializers.normal(0.02), (c.width,))
        self.read = nn.Dense(c.width)
        self.stack = Stack(c.layers, c.width, c.heads, c.ff)
        if c.head != "discrete":
            # Zero, as below: rows are much smaller than a layer's usual output, and an untrained
            # prediction of that size is several times worse than none.
            self.value = nn.Dense(self.row_width, kernel_init=nn.initializers.zeros)
            self.value_norm = nn.LayerNorm()
            self.sharpness = self.param("sharpness", nn.initializers.zeros, (self.stages,))
        if c.head == "continuous":
            return
        # The last digit conditions nothing. As large as the state that they are added to: smaller
        # ones take hundreds of steps to be told apart.
        self.digits = self.param(
            "digits", nn.initializers.normal(1.0), (max(self.stages - 1, 1), self.codes, c.width)
        )
        self.stage = self.param("stage", nn.initializers.normal(0.02), (self.stages, c.width))
        self.mix = Block(c.width, c.heads, c.ff, 2**-0.5, attends=False)
        self.out_norm = nn.LayerNorm()
        self.given = nn.Dense(c.width)
        # Zero: an untrained model is uniform and not sure of nonsense.
        self.head = self.param("head", nn.initializers.zeros, (self.stages, c.width, self.codes))
        self.bias = self.param("bias", nn.initializers.zeros, (self.stages, self.codes))

    def hidden(
        self, rows: Float[Array, "b s d"], there: Bool[Array, "b s"]
    ) -> Float[Array, "b s+1 c"]:
        """State before each row and after the last: entry ``i`` has seen rows ``< i``."""
        x = self.read(rows)
        first = jnp.broadcast_to(self.first, (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([first, x], 1)
        there = jnp.pad(there, ((0, 0), (1, 0)), constant_values=True)
        return self.stack(x, causal_mask(there))

    def start(
        self, rows: Float[Array, "b s d"], count: Int[Array, " b"]
    ) -> tuple[Float[Array, "b c"], tuple[Cache, ...]]:
        """State after the first ``count`` rows, and the cache that `extend` goes on from."""
        x = self.read(rows)
        b, s = x.shape[:2]
        first = jnp.broadcast_to(self.first, (b, 1, x.shape[-1]))
        causal = jnp.tril(jnp.ones((s + 1, s + 1), bool))[None]
        none = jnp.zeros(b, jnp.int32)
        x, cache = self.stack(
            jnp.concatenate([first, x], 1), causal, cache=self.stack.empty(b, s + 1), at=none
        )
        return x[jnp.arange(b), count], cache

    def extend(
        self, row: Float[Array, "b d"], cache: tuple[Cache, ...], count: Int[Array, " b"]
    ) -> tuple[Float[Array, "b c"], tuple[Cache, ...]]:
        """State after one more row, of which there are ``count`` before it."""
        at = count + 1  # behind the rows lies `first`
        # Places after it hold what a longer context left, or nothing.
        seen = jnp.arange(cache[0].key.shape[1] if cache else 1) <= at[:, None]
        x, cache = self.stack(self.read(row)[:, None], seen[:, None], cache=cache, at=at)
        return x[:, 0], cache

    def row(self, hidden: Float[Array, "*b c"]) -> Float[Array, "*b d"]:
        """The next row as the continuous head predicts it, not quantised."""
        return self.value(self.value_norm(hidden))

    def logits(
        self,
        hidden: Float[Array, "*b c"],
        digits: Int[Array, "*b n"],
        table: Float[Array, "n k d"],
    ) -> Float[Array, "*b n k"]:
        """Logits of every stage, each given the digits of earlier stages.

        Args:
          hidden: see `hidden`.
          digits: below 0 they condition nothing.
          table: the codes of all stages.
        """
        head = self.config.head
        out = 0.0 if head == "continuous" else self._free(hidden, digits, table)
        return out if head == "discrete" else out + self._near(hidden, digits, table)

    def _near(self, hidden: Array, digits: Array, table: Array) -> Float[Array, "*b n k"]:
        row = self.row(hidden)
        if self.config.head == "continuous":
            row = jax.lax.stop_gradient(row)
        return near(row[..., None, :] - before(digits, table), table, self.sharpness)

    def _free(self, hidden: Array, digits: Array, table: Array) -> Float[Array, "*b n k"]:
        known = digits[..., : self.stages - 1]
        parts = [
            jnp.where((known[..., i] >= 0)[..., None], self.digits[i][known[..., i]], 0.0)
            for i in range(self.stages - 1)
        ]
        zero = jnp.zeros_like(hidden)
        given = jnp.cumsum(jnp.stack([zero, *parts], -2), -2) + self.stage
        # Where the codes so far lie: what is learned of one code holds for those near it.
        given = given + self.given(before(digits, table))
        x = hidden[..., None, :] + given
        x = self.mix(x, None, None, None)
        return jnp.einsum("...nc,nck->...nk", self.out_norm(x), self.head) + self.bias

    def __call__(
        self,
        rows: Float[Array, "b s d"],
        there: Bool[Array, "b s"],
        digits: Int[Array, "b s n"],
        table: Float[Array, "n k d"],
    ) -> tuple[Float[Array, "b s n k"], Float[Array, "b s d"] | None]:
        """Logits of each row's digits, and the row itself where a head predicts it.

        Both are made of the rows before it.
        """
        hidden = self.hidden(rows, there)[:, :-1]
        row = None if self.config.head == "discrete" else self.row(hidden)
        return self.logits(hidden, digits, table), row


class ByteLM(nn.Module):
    """A causal transformer over bytes: what the two-part code has to beat.

    Attributes:
      config: size of the transformer.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(self, ids: Int[Array, "b t"], valid: Bool[Array, "b t"]) -> Float[Array, "b t v"]:
        """Logits of each byte, from the bytes before it."""
        c = self.config
        before = jnp.pad(ids[:, :-1], ((0, 0), (1, 0)), constant_values=BOS)
        x = nn.Embed(VOCAB, c.width, name="bytes")(before)
        x = Stack(c.layers, c.width, c.heads, c.ff, name="stack")(x, causal_mask(valid))
        return nn.Dense(256, name="head")(x)
