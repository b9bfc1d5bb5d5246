"""Auxiliary targets: what slots can be asked to know of the gaps they have seen."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from latent_jax.systems.spacing.config import AUXILIARY, AUXILIARY_SPAN
from latent_jax.systems.spacing.kernels import lagged

_EDGES = jnp.linspace(0.0, 2.5, 17)


def targets(
    gaps: Float[Array, "b t"], cuts: Int[Array, " c"]
) -> Float[Array, "b c 8"]:
    """Statistics of the ``AUXILIARY_SPAN`` gaps up to each cut, in the order of ``AUXILIARY``.

    Mean deviation; entropy of the histogram (nats); largest step between neighbours; 1 % quantile;
    mean absolute second difference; distance between the means of the halves; mean squared second
    difference; variance of the variances of eighths.

    Cuts before gap ``AUXILIARY_SPAN - 1`` give statistics of padding: mask them.
    """
    s = lagged(gaps, AUXILIARY_SPAN)[:, cuts]
    first, second = jnp.diff(s, axis=-1), jnp.diff(s, n=2, axis=-1)
    inside = (s[..., None] >= _EDGES[:-1]) & (s[..., None] < _EDGES[1:])
    share = jnp.mean(inside, axis=-2)
    half = AUXILIARY_SPAN // 2
    local = s.reshape(*s.shape[:-1], 8, AUXILIARY_SPAN // 8).var(-1)
    values = {
        "mean": s.mean(-1) - 1,
        "entropy": -jnp.sum(share * jnp.log(jnp.maximum(share, 1e-9)), axis=-1),
        "max_step": jnp.abs(first).max(-1),
        "low_quantile": jnp.quantile(s, 0.01, axis=-1),
        "curvature": jnp.abs(second).mean(-1),
        "halves": jnp.abs(s[..., :half].mean(-1) - s[..., half:].mean(-1)),
        "energy": jnp.square(second).mean(-1),
        "roughness": local.var(-1),
    }
    return jnp.stack([values[name] for name in AUXILIARY], axis=-1)
