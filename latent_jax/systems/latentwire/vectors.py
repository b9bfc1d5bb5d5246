"""Slots that sum up one vector per token: poolers, and the bytes of a text as such vectors."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from latent_jax.nn.cross_attention import CrossAttention
from latent_jax.nn.transformer import Block
from latent_jax.ops import rope
from latent_jax.systems.latentwire.pool import num_latents, span_index


def prime_factors(n: int) -> list[int]:
    """Smallest first.

    Example:
      >>> prime_factors(12), prime_factors(1)
      ([2, 2, 3], [])
    """
    found, divisor = [], 2
    while n > 1:
        while n % divisor == 0:
            found.append(divisor)
            n //= divisor
        divisor += 1
    return found


def _cut(
    x: Float[Array, "b t d"], mask: Bool[Array, "b t"], ratio: float, beyond: int = 0
) -> tuple[Float[Array, "b m n d"], Bool[Array, "b m n"]]:
    """Spans of ``ratio`` tokens with ``beyond`` tokens on either side; zeros where none is."""
    index, real = span_index(x.shape[1], ratio)
    if beyond:
        first, t = index[:, :1], x.shape[1]
        index = first + np.arange(-beyond, index.shape[1] + beyond)
        real = (index >= 0) & (index < t)
        index = np.clip(index, 0, t - 1)
    there = mask[:, index] & real
    return x[:, index] * there[..., None], there


class _Maps(nn.Module):
    """``sum_i x_i W_i / n``, from the ``n`` places of a span; at first the mean of the inner ones.

    Attributes:
      beyond: places on either side that start without a say.
    """

    beyond: int = 0

    @nn.compact
    def __call__(self, cut: Float[Array, "b m n d"], there: Bool[Array, "b m n"]) -> Array:
        n, d = cut.shape[2:]

        def init(key: Any, shape: tuple[int, ...]) -> jax.Array:
            inner = (jnp.arange(n) >= self.beyond) & (jnp.arange(n) < n - self.beyond)
            return inner[:, None, None] * jnp.eye(d)

        inside = there[:, :, self.beyond : n - self.beyond].sum(-1)
        maps = self.param("maps", init, (n, d, d))
        return jnp.einsum("bmni,nio->bmo", cut, maps) / jnp.maximum(inside, 1)[..., None]


class _Deeper(nn.Module):
    """A two-layer residual that starts at nothing."""

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        y = nn.gelu(nn.Dense(2 * x.shape[-1], name="up")(nn.LayerNorm(name="norm")(x)))
        return x + nn.Dense(x.shape[-1], kernel_init=nn.initializers.zeros, name="down")(y)


class VectorPool(nn.Module):
    """One vector per span of ``ratio`` tokens, at first their mean.

    Attributes:
      kind: of ``encoder.pooler``: ``attention`` has learned queries per head and keys that know
        their place in the span; ``queries`` reads the whole segment with a query per slot, and a
        gate (LayerNorm, linear, sigmoid) says how much of it counts; ``hierarchical`` sums up the
        prime factors of the ratio one after another, a two-layer residual behind each;
        ``convolution`` sees half a span more on either side.
      ratio: tokens per slot.
      segment: most tokens of a text.
      heads: of attention; they divide the width.
    """

    kind: str
    ratio: float
    segment: int
    heads: int = 4

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], mask: Bool[Array, "b t"]
    ) -> Float[Array, "b m d"]:
        """Sums up right-padded texts of at most ``segment`` tokens."""
        x, d = x.astype(jnp.float32), x.shape[-1]
        if self.kind == "hierarchical":
            for stage, factor in enumerate(prime_factors(int(self.ratio))):
                cut, there = _cut(x, mask, factor)
                x = _Deeper(name=f"deeper_{stage}")(_Maps(name=f"stage_{stage}")(cut, there))
                mask = there.any(-1)
            return x
        if self.kind == "convolution":
            beyond = max(1, int(self.ratio) // 2)
            return _Maps(beyond, name="convolution")(*_cut(x, mask, self.ratio, beyond))
        cut, there = _cut(x, mask, self.ratio)
        mean = cut.sum(2) / jnp.maximum(there.sum(2), 1)[..., None]
        if self.kind == "attention":
            return self._attention(cut, there)
        if self.kind == "queries":
            small = nn.initializers.normal(0.02)
            slots = num_latents(self.segment, self.ratio)
            queries = self.param("queries", small, (slots, d))[: mean.shape[1]]
            places = self.param("places", small, (self.segment, d))[: x.shape[1]]
            asked = mean + queries
            read = CrossAttention(d, self.heads, name="read")(asked, x + places, mask) - asked
            gate = nn.Dense(d, name="gate")(nn.LayerNorm(name="gate_norm")(mean))
            return mean + nn.sigmoid(gate) * read
        return mean

    def _attention(self, cut: Array, there: Array) -> Array:
        (b, m, n, d), h = cut.shape, self.heads
        place = self.param("place", nn.initializers.normal(0.02), (n, d))
        # Zero queries weigh a span evenly.
        query = self.param("query", nn.initializers.zeros, (h, d // h))
        key = nn.Dense(d, name="key")(nn.LayerNorm(name="norm")(cut + place))
        score = jnp.einsum("bmnhe,he->bmhn", key.reshape(b, m, n, h, -1), query)
        score = jnp.where(there[:, :, None], score * (d // h) ** -0.5, -1e9)
        weight = jax.nn.softmax(score, -1)
        value = nn.Dense(d, name="value", kernel_init=nn.initializers.zeros)(cut + place) + cut
        read = jnp.einsum("bmhn,bmnhe->bmhe", weight, value.reshape(b, m, n, h, -1))
        return read.reshape(b, m, d)


def frequencies(width: int) -> np.ndarray:
    """Rotary frequencies of a head, shared by all, ``[1, width / 2]``."""
    return rope.inverse_frequencies(width, 1000.0)[None]


def heads_of(width: int) -> int:
    """Attention heads of a small transformer: four where they have an even width."""
    return 4 if width % 8 == 0 else 1


class Refiner(nn.Module):
    """A transformer over the latents of a segment, which starts near the identity.

    Attributes:
      layers: of it.
    """

    layers: int

    @nn.compact
    def __call__(
        self, z: Float[Array, "b m z"], mask: Bool[Array, "b m"], positions: Int[Array, "b m"]
    ) -> Float[Array, "b m z"]:
        """Every latent sees all that are real."""
        width = z.shape[-1]
        heads = heads_of(width)
        x, seen = z.astype(jnp.float32), mask[:, None, :] | jnp.eye(mask.shape[1], dtype=bool)
        for layer in range(self.layers):
            block = Block(width, heads, 2 * width, residual_scale=0.1, name=f"block_{layer}")
            x = block(x, positions.astype(jnp.float32), seen, frequencies(width // heads))
        return x


#: Longest token that is spelled out, in bytes; what is longer is cut.
LONGEST = 16


def spelling(tokenizer: Any, size: int) -> np.ndarray:
    """UTF-8 bytes of every token of a vocabulary, ``[size, LONGEST]``; -1 where there are no more.

    A token that is a part of a character has the bytes of that part.
    """
    table = np.full((size, LONGEST), -1, np.int32)
    for token in range(size):
        found = tokenizer.token_bytes(token)[:LONGEST]
        table[token, : len(found)] = list(found)
    return table


class ByteEncoder(nn.Module):
    """Bytes 0 to 255 → a transformer over those of a segment → the mean of each token's bytes.

    Attributes:
      width: of the result.
      layers: of the transformer.
    """

    width: int
    layers: int

    @nn.compact
    def __call__(
        self, codes: Int[Array, "b t n"], mask: Bool[Array, "b t"]
    ) -> Float[Array, "b t d"]:
        """Encodes texts.

        Args:
          codes: bytes of every token, -1 where there are no more.
          mask: real tokens.
        """
        b, t, n = codes.shape
        there = (codes >= 0) & mask[..., None]
        table = self.param("bytes", nn.initializers.normal(0.02), (256, self.width))
        flat, heads = there.reshape(b, t * n), heads_of(self.width)
        x = table[jnp.maximum(codes, 0)].reshape(b, t * n, -1) * flat[..., None]
        # A byte's position is its number in the text: padding within tokens takes no room.
        positions = (jnp.cumsum(flat, 1) - flat).astype(jnp.float32)
        seen = flat[:, None, :] | jnp.eye(t * n, dtype=bool)
        for layer in range(self.layers):
            block = Block(self.width, heads, 2 * self.width, name=f"block_{layer}")
            x = block(x, positions, seen, frequencies(self.width // heads))
        x = x.reshape(b, t, n, -1) * there[..., None]
        return x.sum(2) / jnp.maximum(there.sum(2), 1)[..., None]
