"""GistNet: a block of keys and values, or a group of gists, becomes the gist above it.

A gist is made from the frozen base's own keys and values: every slot has queries of its own in
each layer and head, reads its sources several times, and maps what it read linearly. Keys are
taken and given *before* rotation, so that a gist does not depend on where it stands, and one set
of weights serves every place. Between loss and weights lie one softmax and one matrix product.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from latent_jax.backbones.config import DecoderConfig
from latent_jax.systems.megacontext.model_config import ModelConfig
from latent_jax.systems.megacontext.positions import damping


class Gists(NamedTuple):
    """Keys (before rotation) and values of ``n`` groups of ``s`` entries in every layer."""

    k: Float[Array, "l n s g d"]
    v: Float[Array, "l n s g d"]


class SlotReads(nn.Module):
    """Slots of one level over their sources: the tokens of a block, or the gists below.

    Per layer and key/value head a slot has ``reads`` queries. Each reads keys and values with the
    same weights; the reads of all heads are then mapped by a matrix per slot, started so that a
    slot is the mean of its reads.

    Attributes:
      reader: architecture of the frozen base.
      slots: entries of the gist.
      sources: entries that it is made of.
      reads: queries per slot and head.
      focus: how much a slot prefers its even share of the sources at first, in logits.
    """

    reader: DecoderConfig
    slots: int
    sources: int
    reads: int
    focus: float

    @nn.compact
    def __call__(self, below: Gists) -> Gists:
        """Reads ``n`` groups of ``sources`` entries."""
        r, s, m = self.reader, self.slots, self.reads
        layers, n, sources, heads, width = below.k.shape
        size = heads * width
        rows = (r.num_layers, heads, s * m)

        def prefer(key, shape, dtype=jnp.float32):
            share = np.arange(sources) * s // sources
            own = np.where(share[None] == np.arange(s)[:, None], 0.0, -self.focus)
            # Reads of one slot start apart, or they would stay equal.
            noise = 0.5 * jax.random.normal(key, shape, dtype)
            return noise + jnp.repeat(jnp.asarray(own, dtype), m, axis=0)

        def mean(key, shape, dtype=jnp.float32):
            return jnp.broadcast_to(jnp.eye(size, dtype=dtype) / m, shape)

        query = self.param("query", nn.initializers.zeros, (*rows, width)).astype(below.k.dtype)
        bias = self.param("bias", prefer, (*rows, sources))
        score = jnp.einsum("lnigd,lgqd->lngqi", below.k, query) / math.sqrt(width)
        weight = jax.nn.softmax(score.astype(jnp.float32) + bias[:, None], axis=-1)
        weight = weight.astype(below.v.dtype)

        def mapped(x, name):
            read = jnp.einsum("lngqi,lnigd->lnqgd", weight, x).reshape(layers, n, s, m, size)
            maps = self.param(name, mean, (r.num_layers, s, m, size, size)).astype(x.dtype)
            out = jnp.einsum("lnsmi,lsmio->lnso", read, maps)
            return out.reshape(layers, n, s, heads, width)

        return Gists(mapped(below.k, "keys"), mapped(below.v, "values"))


class GistNet(nn.Module):
    """Gists of every level.

    Attributes:
      config: layout and options.
      reader: architecture of the frozen base.
    """

    config: ModelConfig
    reader: DecoderConfig

    def setup(self):
        gist, layout = self.config.gist, self.config.layout
        sources = [layout.block, *(layout.branching * s for s in layout.slots[:-1])]
        self.levels = [
            SlotReads(self.reader, slots, n, gist.reads, gist.focus, name=f"level_{i}")
            for i, (slots, n) in enumerate(zip(layout.slots, sources, strict=True), 1)
        ]

    def __call__(self, below: Gists, level: int) -> Gists:
        """The gists of ``n`` nodes of ``level`` from what lies below each of them."""
        return self.levels[level - 1](below)

    def touch(self, below: Gists) -> None:
        """Builds one node of every level; used for initialisation.

        Args:
          below: raw entries of one block.
        """
        for level in range(1, self.config.layout.levels + 1):
            gist = self(below, level)
            branching = self.config.layout.branching
            below = grouped(Gists(*(jnp.repeat(x, branching, 1) for x in gist)), branching)


def grouped(gists: Gists, branching: int) -> Gists:
    """Neighbouring gists as sources of the next level, ``[l, n / branching, sources, g, d]``."""
    shape = (gists.k.shape[0], -1, branching * gists.k.shape[2], *gists.k.shape[3:])
    return Gists(*(x.reshape(shape) for x in gists))


def damped(
    config: ModelConfig, reader: DecoderConfig, gists: Gists, level: int
) -> Gists:
    """Gists of a level as they are read: with their keys damped, if they are to be
    (`positions.damping`).
    """
    if not config.positions.damped or not level:
        return gists
    factor = damping(config, reader, level)[:, None, None, None]
    return gists._replace(k=(gists.k * factor).astype(gists.k.dtype))


def build(net: GistNet, params: Any, raw: Gists, level: int) -> Gists:
    """Gists of one level from the raw entries of blocks; ``n`` must be whole nodes of it."""
    found = raw
    for current in range(1, level + 1):
        below = found if current == 1 else grouped(found, net.config.layout.branching)
        found = net.apply({"params": params}, below, current)
    return found
