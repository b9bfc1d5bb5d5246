"""Types every room shares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

PyTree = Any
Params = Mapping[str, Any]
Variables = Mapping[str, Any]
Batch = Mapping[str, Array]
Metrics = dict[str, Any]


class Mean(NamedTuple):
    """A masked mean kept as (sum, count), so that padding and uneven shards never bias it.

    Adding two means pools their elements; ``value`` divides at the very end, and is 0 for an empty
    mean. As a NamedTuple it is a pytree and passes through jit, scan and collectives.

    Example:
      >>> import jax.numpy as jnp
      >>> a = Mean.of(jnp.array([1.0, 3.0, 100.0]), jnp.array([True, True, False]))
      >>> b = Mean.of(jnp.array([5.0]))
      >>> float(a.value), float((a + b).value)
      (2.0, 3.0)
    """

    sum: Float[Array, ""] | float
    count: Float[Array, ""] | float

    @classmethod
    def of(
        cls,
        values: Float[Array, "*shape"],
        mask: Bool[Array, "*#shape"] | Float[Array, "*#shape"] | None = None,
    ) -> Mean:
        """Reduces ``values`` in fp32 where ``mask`` (broadcast to them; weights allowed) is set."""
        values = jnp.asarray(values, jnp.float32)
        if mask is None:
            return cls(values.sum(), jnp.asarray(values.size, jnp.float32))
        mask = jnp.asarray(mask)
        weight = jnp.broadcast_to(mask, values.shape).astype(jnp.float32)
        # where and not a product: a NaN under the padding must not reach the sum or its gradient.
        kept = jnp.where(weight != 0, values, 0.0)
        return cls((kept * weight).sum(), weight.sum())

    @property
    def value(self) -> Float[Array, ""]:
        """The mean: ``sum / max(count, 1)`` in fp32."""
        total = jnp.asarray(self.sum, jnp.float32)
        return total / jnp.maximum(jnp.asarray(self.count, jnp.float32), 1.0)

    def __add__(self, other: Mean) -> Mean:  # type: ignore[override]
        return Mean(self.sum + other.sum, self.count + other.count)

    def __radd__(self, other: int | Mean) -> Mean:
        return self if isinstance(other, int) and other == 0 else Mean(*other) + self

    def psum(self, axis_name: str) -> Mean:
        """Pools this mean over a mapped axis."""
        return Mean(jax.lax.psum(self.sum, axis_name), jax.lax.psum(self.count, axis_name))
