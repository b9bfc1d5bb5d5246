"""What training does to the tokens that the frozen reader is fed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def corrupt_tokens(
    key: jax.Array, ids: Int[Array, "b t"], rate: float | Float[Array, ""], vocab_size: int
) -> Int[Array, "b t"]:
    """Replaces a share of the teacher-forced inputs with random tokens.

    With clean inputs the reader learns to lean on the previous token and derails at its first own
    mistake; a corrupted history can only be survived by reading the latents.
    """
    swap, draw = jax.random.split(key)
    noise = jax.random.randint(draw, ids.shape, 0, vocab_size, ids.dtype)
    return jnp.where(jax.random.bernoulli(swap, rate, ids.shape), noise, ids)
