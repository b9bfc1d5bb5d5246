"""Rotary position embedding (Su et al. 2021), half-split layout as in Hugging Face Llama."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def inverse_frequencies(
    head_dim: int,
    theta: float,
    *,
    factor: float = 1.0,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    original_max_position: int = 0,
) -> np.ndarray:
    """Inverse frequencies of the rotary planes, optionally with Llama 3 scaling.

    With ``original_max_position`` > 0, wavelengths longer than ``original/low_freq_factor`` are
    stretched by ``factor``, shorter than ``original/high_freq_factor`` are kept, and those
    between are blended linearly (Llama 3.1 reference code).

    Returns:
      ``[head_dim / 2]`` float32.
    """
    inv = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if original_max_position:
        turns = original_max_position * inv / (2 * np.pi)
        blend = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
        blend = np.clip(blend, 0.0, 1.0)
        inv = blend * inv + (1 - blend) * inv / factor
    return inv.astype(np.float32)


def rotate(
    x: Float[Array, "b t h d"], positions: Int[Array, "b t"], inv_freq: Float[Array, " d2"]
) -> Float[Array, "b t h d"]:
    """Rotates ``x`` by its positions; ``rotate(rotate(x, p), -p) == x``.

    Angles are fp32 whatever ``x`` is: bf16 positions are wrong past 256.
    """
    angle = positions[..., None, None].astype(jnp.float32) * inv_freq
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)


def rotate_layers(
    x: Float[Array, "l b t h d"],
    positions: Int[Array, "b t"],
    inv_freq: Float[Array, " d2"] | Float[Array, "l d2"],
) -> Float[Array, "l b t h d"]:
    """`rotate` for keys stacked over layers, whose frequencies may differ."""
    each = None if jnp.ndim(inv_freq) == 1 else 0
    return jax.vmap(rotate, in_axes=(0, None, each))(x, positions, inv_freq)
