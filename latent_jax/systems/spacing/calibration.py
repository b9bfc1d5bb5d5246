"""How wide a density has to be that was trained on other gaps than it predicts.

A network that has seen its training gaps is surer there than elsewhere. Three numbers, fitted by
likelihood to gaps that were set apart from training (``data.calibration``), undo that: temperature
scaling (Guo et al. 2017) for mixtures. They cannot change the order of components, so they do not
overfit thousands of targets.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from latent_jax.ops import mdn
from latent_jax.ops.mdn import Mixture

_ITERATIONS = 60


class Calibration(NamedTuple):
    """Logarithms of the factors of `mdn.temper`; zeros change nothing."""

    stretch: Float[Array, ""]
    width: Float[Array, ""]
    flatten: Float[Array, ""]

    def apply(self, mixture: Mixture) -> Mixture:
        """The calibrated mixture."""
        return mdn.temper(mixture, *(jnp.exp(part) for part in self))


@jax.jit
def fit(mixture: Mixture, truth: Float[Array, " n"]) -> Calibration:
    """The factors under which ``truth`` is most likely, by L-BFGS from no change.

    Args:
      mixture: Gaussian predictions of gaps that nothing was trained on.
      truth: the gaps.
    """

    def nll(found: Calibration) -> Array:
        return -jnp.mean(mdn.log_prob(found.apply(mixture), truth))

    solver = optax.lbfgs()
    gradient = optax.value_and_grad_from_state(nll)

    def step(_: int, carry: tuple) -> tuple:
        found, state = carry
        value, slope = gradient(found, state=state)
        change, state = solver.update(
            slope, state, found, value=value, grad=slope, value_fn=nll
        )
        return optax.apply_updates(found, change), state

    start = Calibration(*(jnp.zeros(()) for _ in Calibration._fields))
    found, _ = jax.lax.fori_loop(0, _ITERATIONS, step, (start, solver.init(start)))
    return found
