"""A head that fills in the masked tokens of a text from its latents: a loss, no part of reading.

A small transformer sees the text's input embeddings, most of them masked, and attends to the
latents. What it says of a masked token is compared with that token's embedding, so that every token
of the text, and not only those that a reader finds hard, asks something of the latents.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from latent_jax.core.types import Mean
from latent_jax.nn.cross_attention import CrossAttention
from latent_jax.nn.transformer import Block
from latent_jax.systems.latentwire.adapters import ERROR, rms
from latent_jax.systems.latentwire.latents import Wire, split_segments
from latent_jax.systems.latentwire.vectors import frequencies, heads_of

#: Random stream of the masks, folded into a step's key.
STREAM = 2


class GistHead(nn.Module):
    """Latents and what is not masked of a text → embeddings of its tokens.

    Attributes:
      width: of the embeddings.
      layers: each reads the latents, then the text's other tokens.
      segment: most tokens of a text.
    """

    width: int
    layers: int
    segment: int

    @nn.compact
    def __call__(
        self,
        z: Float[Array, "b m z"],
        there: Bool[Array, "b m"],
        positions: Int[Array, "b m"],
        x: Float[Array, "b t d"],
        real: Bool[Array, "b t"],
        masked: Bool[Array, "b t"],
    ) -> Float[Array, "b t d"]:
        """Says what every token of one segment is.

        Args:
          z: latents.
          there: which of them are real.
          positions: tokens that they stand at.
          x: input embeddings of the text.
          real: which tokens are real.
          masked: which the head is not shown.
        """
        small, heads = nn.initializers.normal(0.02), heads_of(self.width)
        blank = self.param("blank", small, (self.width,))
        place = self.param("place", small, (self.segment, self.width))
        t = x.shape[1]
        x = jnp.where(masked[..., None], blank, x.astype(jnp.float32)) + place[:t]
        memory = nn.Dense(self.width, name="latents")(nn.LayerNorm(name="norm")(z))
        memory = memory + place[jnp.clip(positions, 0, self.segment - 1)]
        seen = real[:, None, :] | jnp.eye(t, dtype=bool)
        where = jnp.broadcast_to(jnp.arange(t, dtype=jnp.float32), x.shape[:2])
        for layer in range(self.layers):
            x = CrossAttention(self.width, heads, name=f"read_{layer}")(x, memory, there)
            block = Block(self.width, heads, 2 * self.width, name=f"block_{layer}")
            x = block(x, where, seen, frequencies(self.width // heads))
        return nn.Dense(self.width, name="out")(nn.LayerNorm(name="out_norm")(x))


def gist_term(
    model: Any,
    params: Any,
    wire: Wire,
    text: Float[Array, "b t d"],
    mask: Bool[Array, "b t"],
    table: Float[Array, "v d"],
    share: float,
    key: Array,
) -> tuple[Mean, Mean]:
    """``1 - cosine + 0.1 squared error / mean square of embeddings`` of masked tokens, and the
    cosine alone.

    Args:
      model: the compressor.
      params: its parameters.
      wire: latents of the texts.
      text: their input embeddings.
      mask: real tokens.
      table: the vocabulary's embeddings.
      share: of the tokens that is masked.
      key: of the masks.
    """
    c, (b, t) = model.config, mask.shape
    n = max(1, t // c.segment)
    parts = split_segments(wire, c.segment, c.ratio, sum(c.private_slots.values()))
    cut = lambda x: x.reshape(b * n, t // n, *x.shape[2:])  # noqa: E731
    x, real = cut(jax.lax.stop_gradient(text.astype(jnp.float32))), cut(mask)
    masked = real & jax.random.bernoulli(key, share, real.shape)
    y = model.apply({"params": params}, parts, x, real, masked, method="filled_in")
    size = jnp.sqrt((jnp.square(y).sum(-1) + 1e-12) * (jnp.square(x).sum(-1) + 1e-12))
    cosine = (y * x).sum(-1) / size
    lost = 1 - cosine + ERROR * jnp.square(y - x).mean(-1) / rms(table) ** 2
    weight = masked.astype(jnp.float32)
    return Mean((lost * weight).sum(), weight.sum()), Mean((cosine * weight).sum(), weight.sum())
