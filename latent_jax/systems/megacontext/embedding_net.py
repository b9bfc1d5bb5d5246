"""GistNet for the other way into a frozen base: a block becomes a few of the base's own inputs.

A slot reads its sources several times: their input embeddings, and what the base makes of them in
a few layers, where an encoder that starts from the language model finds what it has understood.
What was read is mapped linearly and given the size of an embedding. It starts as one word of its
stretch, the one that the base expected least: a frozen base takes means of words very badly.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from latent_jax.systems.megacontext.model_config import ModelConfig


class Sources(NamedTuple):
    """What ``n`` gists are made of: input embeddings, and streams of the base over them."""

    x: Float[Array, "n i d"]
    z: Float[Array, "n i k d"]


def unit(x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """Vectors at unit root mean square, fp32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-12)


def shares(slots: int, sources: int) -> np.ndarray:
    """Which slot's even share of the sources each source is in, ``[sources]``."""
    return np.arange(sources) * slots // sources


class SlotEmbeddings(nn.Module):
    """Slots of one level over their sources.

    Attributes:
      width: of an input embedding.
      slots: entries of the gist.
      sources: entries that it is made of.
      streams: how many of the base's.
      reads: queries per slot.
      focus: how much a slot prefers its even share of the sources at first, in logits.
    """

    width: int
    slots: int
    sources: int
    streams: int
    reads: int
    focus: float

    @nn.compact
    def __call__(self, below: Sources) -> Float[Array, "n s d"]:
        """Reads ``n`` groups of ``sources`` entries."""
        s, m, kinds, d = self.slots, self.reads, 1 + self.streams, self.width
        seen = jnp.concatenate([unit(below.x)[:, :, None], unit(below.z)], axis=2)

        def prefer(key, shape, dtype=jnp.float32):
            own = shares(s, self.sources)[None] == np.arange(s)[:, None]
            noise = 0.5 * jax.random.normal(key, shape, dtype)  # or reads would stay equal
            return noise + jnp.repeat(jnp.where(own, 0.0, -self.focus), m, axis=0)

        def first_read(key, shape, dtype=jnp.float32):  # its embeddings as they are
            return jnp.zeros(shape, dtype).at[:, 0, 0].set(jnp.eye(d, dtype=dtype))

        look = self.param("look", nn.initializers.zeros, (s * m, kinds, d))
        prefer = self.param("prefer", prefer, (s * m, self.sources))
        score = jnp.einsum("nikd,qkd->nqi", seen, look) / math.sqrt(d)
        weight = jax.nn.softmax(score + prefer, axis=-1)
        read = jnp.einsum("nqi,nikd->nqkd", weight, seen)
        read = read.reshape(-1, s, m, kinds, d)
        maps = self.param("maps", first_read, (s, m, kinds, d, d))
        size = self.param("size", nn.initializers.ones, (s,))
        return size[:, None] * unit(jnp.einsum("nsmkd,smkde->nse", read, maps))


class EmbeddingNet(nn.Module):
    """Gists of every level.

    Attributes:
      config: layout and options.
      width: of the base's input embeddings.
    """

    config: ModelConfig
    width: int

    def setup(self):
        gist, layout = self.config.gist, self.config.layout
        sources = [layout.block, *(layout.branching * s for s in layout.slots[:-1])]
        self.levels = [
            SlotEmbeddings(
                self.width, slots, n, gist.streams, gist.reads, gist.focus, name=f"level_{i}"
            )
            for i, (slots, n) in enumerate(zip(layout.slots, sources, strict=True), 1)
        ]

    def __call__(self, below: Sources, level: int) -> Float[Array, "n s d"]:
        """The gists of ``n`` nodes of ``level`` from what lies below each of them."""
        return self.levels[level - 1](below)

    def touch(self) -> None:
        """Builds one node of every level; used for initialisation."""
        for slots in self.levels:
            x = jnp.zeros((1, slots.sources, self.width))
            slots(Sources(x, jnp.zeros((1, slots.sources, slots.streams, self.width))))
