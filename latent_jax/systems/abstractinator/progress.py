"""How much the row model has been trained on: rows and bytes, counted beyond 32 bits."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_LOW = 20  # bits of the lower part; a step adds far less than the rest of it


def fresh() -> dict[str, Int[Array, " 2"]]:
    """Counters at zero, as the collection ``progress`` of a state."""
    return {name: jnp.zeros(2, jnp.int32) for name in ("positions", "bytes")}


def add(count: Int[Array, " 2"], more: Int[Array, ""]) -> Int[Array, " 2"]:
    """A counter after ``more`` (below 2^30).

    Example:
      >>> float(total(add(add(jnp.zeros(2, jnp.int32), 2**29), 5)))
      536870912.0
    """
    low = count[0] + more
    return jnp.stack([low & (2**_LOW - 1), count[1] + (low >> _LOW)])


def total(count: Int[Array, " 2"]) -> Float[Array, ""]:
    """A counter as a number, rounded to fp32."""
    return count[1].astype(jnp.float32) * 2**_LOW + count[0]
