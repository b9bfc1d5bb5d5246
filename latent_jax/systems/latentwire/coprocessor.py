"""What a coprocessor adds to a cache that the frozen reader has filled itself.

The reader reads some fixed words, as many tokens as there are latents; latents become differences
to the keys and values that those have, in every layer, as a coprocessor augments a frozen model's
cache (after Liu et al. 2024, "Deliberation in latent space via differentiable cache augmentation",
where it appends). Nothing is added at first: the reader starts behind words that it knows, and what
is learned stays in the scale of their entries.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from latent_jax.backbones.config import DecoderConfig
from latent_jax.backbones.decoder import KV, Decoder, inverse_frequencies
from latent_jax.backbones.sink import sink_kv
from latent_jax.core.errors import ConfigError
from latent_jax.ops import rope
from latent_jax.systems.latentwire.adapter_config import AdapterConfig
from latent_jax.systems.latentwire.latents import Wire


class Coprocessor(nn.Module):
    """Latents to differences of a cache.

    Attributes:
      reader: architecture of the LLM.
      hidden: width of the layer that all differences are made of.
    """

    reader: DecoderConfig
    hidden: int

    @nn.compact
    def __call__(self, wire: Wire, cache: KV) -> KV:
        """The cache of the fixed words at the latents' places, with the differences added.

        Args:
          wire: the latents.
          cache: rotated keys, and values, ``[l b m g d]``.
        """
        r = self.reader
        size = r.num_kv_heads * r.head_dim
        x = nn.LayerNorm(name="norm")(wire.z.astype(jnp.float32))
        x = nn.gelu(nn.Dense(self.hidden, name="up")(x))
        x = x + nn.gelu(nn.Dense(self.hidden, name="mix")(nn.LayerNorm(name="mix_norm")(x)))
        shape = (r.num_layers, 2, self.hidden, size)
        made = self.param("out", nn.initializers.zeros, shape)
        both = jnp.einsum("bmh,lshe->lsbme", x, made).reshape(
            *shape[:2], *wire.z.shape[:2], r.num_kv_heads, r.head_dim
        )
        waves = jnp.asarray(inverse_frequencies(r))
        k = rope.rotate_layers(both[:, 0], wire.positions, waves)
        added = (_sized(k, cache.k, wire.mask), _sized(both[:, 1], cache.v, wire.mask))
        return KV(cache.k + added[0], cache.v + added[1], wire.mask)


def _sized(
    x: Float[Array, "l b m g d"], beside: Float[Array, "l b m g d"], mask: Array
) -> Float[Array, "l b m g d"]:
    """In units of the root mean square of each layer's own entries."""
    real = mask[None, :, :, None, None]
    count = jnp.maximum(mask.sum(), 1) * beside.shape[-1] * beside.shape[-2]
    power = jnp.sum(jnp.square(beside.astype(jnp.float32)) * real, axis=(1, 2, 3, 4)) / count
    size = jax.lax.stop_gradient(jnp.sqrt(power))[:, None, None, None, None]
    return (x * size).astype(beside.dtype)


def carrier(config: AdapterConfig, tokenizer: Any) -> tuple[int, ...]:
    """Tokens of the fixed words; none where no coprocessor needs them.

    Raises:
      ConfigError: the tokenizer makes none of them.
    """
    if config.kind != "coprocessor":
        return ()
    found = tuple(int(i) for i in tokenizer.encode(config.carrier))
    if not found:
        raise ConfigError(f"adapter.carrier={config.carrier!r} has no token: use other words")
    return found


def carried_by(
    body: Decoder, frozen: Any, words: tuple[int, ...], wire: Wire, sink: int | None, dtype: Any
) -> KV:
    """The reader's own keys and values of fixed words, repeated to as many as there are latents.

    Args:
      body: the reader.
      frozen: its parameters.
      words: their tokens.
      wire: where the latents stand, and which are real.
      sink: token before them.
      dtype: of the cache.
    """
    b, m = wire.mask.shape
    ids = jnp.broadcast_to(np.resize(np.asarray(words, np.int32), m), (b, m))
    first = None if sink is None else sink_kv(body, frozen, jnp.int32(sink), b)
    x = body.apply({"params": frozen}, ids, method="embed").astype(dtype)
    return body.apply({"params": frozen}, x, wire.positions, wire.mask, prefix=first).kv
