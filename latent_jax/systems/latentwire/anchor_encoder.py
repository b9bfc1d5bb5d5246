"""One vector for a whole text, made beside what the text means, and expanded to its slots."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from latent_jax.core.types import Mean
from latent_jax.nn.cross_attention import CrossAttention
from latent_jax.nn.transformer import Block
from latent_jax.systems.latentwire.pool import num_latents
from latent_jax.systems.latentwire.vectors import frequencies, heads_of


def semantic_anchor(
    states: Float[Array, "b t d"], mask: Bool[Array, "b t"]
) -> Float[Array, "b d"]:
    """The mean of a text's last states; no gradient reaches the LLM that has them."""
    weight = mask[..., None].astype(jnp.float32)
    mean = jnp.sum(states.astype(jnp.float32) * weight, 1) / jnp.maximum(weight.sum(1), 1)
    return jax.lax.stop_gradient(mean)


class AnchorEncoder(nn.Module):
    """A transformer over input embeddings that reads a semantic anchor in every layer.

    Its tokens are averaged to one vector, from which every slot of the segment is made by a map of
    its own: what a slot says is not of its span. A token may leave the anchor unread (it attends
    to the anchor and to an entry that is learned).

    Attributes:
      width: of that vector; even.
      layers: of the transformer.
      ratio: tokens per slot.
      segment: most tokens of a text.
    """

    width: int
    layers: int
    ratio: float
    segment: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], mask: Bool[Array, "b t"], anchor: Float[Array, "b a"]
    ) -> tuple[Float[Array, "b m d"], Float[Array, "b w"], Float[Array, "b a"]]:
        """Encodes right-padded texts of at most ``segment`` tokens.

        Returns:
          The slots, the vector that all of them are made of, and what it says the anchor is.
        """
        (b, t, d), n = x.shape, self.width
        heads, small = heads_of(n), nn.initializers.normal(0.02)
        h = nn.Dense(n, name="embedded")(nn.LayerNorm(name="norm")(x.astype(jnp.float32)))
        told = nn.Dense(n, name="anchor")(nn.LayerNorm(name="anchor_norm")(anchor))
        none = jnp.broadcast_to(self.param("none", small, (n,)), told.shape)
        memory, seen = jnp.stack([told, none], axis=1), mask[:, None, :] | jnp.eye(t, dtype=bool)
        where = jnp.broadcast_to(jnp.arange(t, dtype=jnp.float32), (b, t))
        for layer in range(self.layers):
            h = Block(n, heads, 2 * n, name=f"block_{layer}")(
                h, where, seen, frequencies(n // heads)
            )
            h = CrossAttention(n, heads, norm_memory=True, name=f"read_{layer}")(
                h, memory, jnp.ones((b, 2), bool)
            )
        weight = mask[..., None].astype(jnp.float32)
        z = nn.LayerNorm(name="last_norm")(h)
        z = jnp.sum(z * weight, 1) / jnp.maximum(weight.sum(1), 1)
        slots = num_latents(self.segment, self.ratio)
        fan_in = nn.initializers.variance_scaling(1.0, "fan_in", "normal", 1, 2, batch_axis=0)
        expand = self.param("expand", fan_in, (slots, n, d))[: num_latents(t, self.ratio)]
        said = nn.Dense(anchor.shape[-1], name="aligned")(z)
        return jnp.einsum("bn,mnd->bmd", z, expand), z, said


def alignment(said: Float[Array, "b d"], anchor: Float[Array, "b d"], real: Array) -> Mean:
    """1 - cosine between what the vector says and the anchor, over texts that are not empty."""
    norms = jnp.linalg.norm(said, axis=-1) * jnp.linalg.norm(anchor, axis=-1)
    far = 1 - jnp.sum(said * anchor, -1) / jnp.maximum(norms, 1e-6)
    return Mean(jnp.sum(far * real), jnp.sum(real.astype(jnp.float32)))
