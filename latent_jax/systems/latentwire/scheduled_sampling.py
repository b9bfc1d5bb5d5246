"""Teacher-forced inputs of which a share is what the reader says itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

#: Of the random stream of a step's key.
STREAM = 3


def own_inputs(
    key: jax.Array,
    rate: float | Float[Array, ""],
    inputs: Int[Array, "b t"],
    swappable: Bool[Array, "b t"],
    guess: Callable[[], Int[Array, "b t"]],
) -> Int[Array, "b t"]:
    """The inputs of the second of two passes (Mihaylova & Martins 2019, of Bengio et al. 2015): in
    the first the reader was fed the gold tokens, and some of them give way to what it would have
    said in their place. All of a row is replaced at once, so that what is fed is what a reader says
    behind the gold history, not behind its own; in exchange no step waits for the one before.

    Args:
      key: of which tokens give way.
      rate: share of them; at 0 the first pass is not run.
      inputs: gold tokens.
      swappable: which of them may give way.
      guess: the first pass, the greedy choice for every input. Nothing is learned through it.
    """

    def mixed() -> Array:
        swap = jax.random.bernoulli(key, rate, inputs.shape) & swappable
        return jnp.where(swap, guess().astype(inputs.dtype), inputs)

    return jax.lax.cond(jnp.asarray(rate) > 0, mixed, lambda: inputs)


def still(*trees: Any) -> Any:
    """The same without a gradient; None stays None."""
    return jax.lax.stop_gradient(trees)
