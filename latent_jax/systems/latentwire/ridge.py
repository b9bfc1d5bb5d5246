"""Linear maps from latents to what an LLM itself makes of the same text, in closed form."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

#: Ridge, as a share of the latents' own variance.
RIDGE = 1e-3


def regression(
    x: Float[np.ndarray, "n z"],
    y: Float[np.ndarray, "n f"],
    inner: Float[np.ndarray, "z h"] | None = None,
) -> dict[str, np.ndarray]:
    """Ridge regression of ``y`` on ``x``, both standardised per dimension, and on random features.

    Args:
      inner: weights of the features, which are GELUs of the standardised ``x``.

    Returns:
      ``in_mean, in_scale`` and ``out_mean, out_scale``, the ``map`` in between and ``outer``, that
      of the features: with ``s = (x - in_mean) * in_scale``, ``y`` is near
      ``(s @ map + gelu(s @ inner) @ outer) * out_scale + out_mean``.
    """
    in_mean, spread = x.mean(0), x.std(0) + 1e-6
    out_mean, out_scale = y.mean(0), y.std(0) + 1e-6
    a = (x - in_mean) / spread
    if inner is not None:
        a = np.concatenate([a, np.asarray(nn.gelu(jnp.asarray(a @ inner)))], axis=1)
    a = a.astype(np.float64)
    b = ((y - out_mean) / out_scale).astype(np.float64)
    middle = a.mean(0)
    a = a - middle
    gram = a.T @ a + RIDGE * len(a) * np.eye(a.shape[1])
    found = np.linalg.solve(gram, a.T @ b)
    width = x.shape[1]
    fitted = {
        "in_mean": in_mean, "in_scale": 1 / spread, "out_scale": out_scale,
        "out_mean": out_mean - middle @ found * out_scale, "map": found[:width],
    }  # fmt: skip
    return fitted if inner is None else {**fitted, "outer": found[width:]}
