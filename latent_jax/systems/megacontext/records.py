"""Gists as rows of numbers, which is how a store keeps them."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from latent_jax.backbones.config import DecoderConfig
from latent_jax.systems.megacontext.gist import Gists


def record_width(base: DecoderConfig, kind: str = "reads") -> int:
    """Numbers of one slot: a key and a value for every layer and key/value head, or one input
    embedding (``kind`` embeddings).
    """
    return base.hidden_size if kind == "embeddings" else base.kv_floats_per_token


def to_records(gists: Gists) -> Float[Array, "n s w"]:
    """One row per slot: layer by layer its key (before rotation), then its value."""
    both = jnp.stack([gists.k, gists.v], axis=1)  # l 2 n s g d
    n, s = both.shape[2:4]
    return jnp.moveaxis(both, (2, 3), (0, 1)).reshape(n, s, -1)


def from_records(records: Float[Array, "n s w"], base: DecoderConfig) -> Gists:
    """Inverse of `to_records`, in fp32."""
    n, s, _ = records.shape
    shape = (n, s, base.num_layers, 2, base.num_kv_heads, base.head_dim)
    both = jnp.moveaxis(jnp.asarray(records, jnp.float32).reshape(shape), (0, 1), (2, 3))
    return Gists(both[:, 0], both[:, 1])
