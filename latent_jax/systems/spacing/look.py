"""What one looks at in a spacing model: where the truth falls in its densities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from latent_jax.ops import mdn
from latent_jax.systems.spacing import predict


class Looked(NamedTuple):
    """Predictions of one seed on held-out windows.

    Attributes:
      pit: probability that the density of each last gap gives to smaller ones.
      position: index of the scored gaps in a window, from 0.
      nll: mean over windows at each of them, nats.
      grid: gaps at which densities are shown, mean gaps.
      density: of the first windows' last gaps.
      truth: these gaps.
    """

    pit: Float[np.ndarray, " n"]
    position: Float[np.ndarray, " p"]
    nll: Float[np.ndarray, " p"]
    grid: Float[np.ndarray, " g"]
    density: Float[np.ndarray, "w g"]
    truth: Float[np.ndarray, " w"]


def look(
    system: Any, variables: Mapping[str, Any], windows: int = 500, shown: int = 6, points: int = 200
) -> Looked:
    """Scores the first seed on evenly spread held-out windows.

    Args:
      system: the `SpacingSystem` of the run.
      variables: of the run; parameters have a leading axis of seeds.
      windows: at most so many.
      shown: windows whose density is kept.
      points: of the grid, from 0 to 3 mean gaps.
    """
    c, model = system.config, system.model_of(variables)
    first = jax.tree.map(lambda x: x[:1], variables["params"])
    rows = system.gaps.windows(system.gaps.spread(windows), c.data.window)
    batch = min(c.eval.batch_size, len(rows["gaps"]))
    found = predict.predict(predict.predictor(model, c), first, rows, batch)
    mixture, truth = predict.densities(
        model, c, first, system.gaps, "validation", c.data.window * shown
    )
    chosen = np.linspace(0, len(truth) - 1, shown).astype(int)
    grid = np.linspace(1e-3, 3.0, points)
    density = jnp.exp(
        mdn.log_prob(
            jax.tree.map(lambda x: x[0, chosen][:, None], mixture),
            jnp.broadcast_to(grid, (shown, points)), c.model.head.family,
        )
    )  # fmt: skip
    return Looked(
        found.pit[0], predict.scored(c), found.everywhere[0].mean(0), grid, np.asarray(density),
        truth[chosen],
    )  # fmt: skip
