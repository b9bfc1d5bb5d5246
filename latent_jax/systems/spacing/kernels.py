"""Linear summaries of past gaps with kernels of *physical* distance.

The fluctuations of zeta zeros at height ``t`` have spectral lines at ``ln p`` per unit of ``t``,
and neighbours lie ``2 pi / L`` apart, ``L = ln(t / 2 pi)`` (Berry & Keating 1999, section 4). A
filter that is a function of ``2 pi j / L`` therefore serves every height, one of the index ``j``
only its own.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def distances(
    lags: int, log_height: Float[Array, "*b"]
) -> Float[Array, "*b lags"]:
    """Mean physical distance ``2 pi j / L`` of the last 1, 2, ... ``lags`` gaps."""
    j = jnp.arange(1, lags + 1, dtype=jnp.float32)
    return 2 * jnp.pi * j / log_height[..., None]


def basis(
    distance: Float[Array, "*b"], knots: int, reach: float
) -> Float[Array, "*b knots"]:
    """Linear B-splines ("hats") on ``knots`` equidistant knots from 0 to ``reach``."""
    at = distance[..., None] * ((knots - 1) / reach)
    return jnp.maximum(0.0, 1.0 - jnp.abs(at - jnp.arange(knots, dtype=jnp.float32)))


def lagged(values: Float[Array, "b t"], lags: int) -> Float[Array, "b t lags"]:
    """``values[t], values[t-1], ...`` at every position ``t``; 0 before the first."""
    t = values.shape[1]
    index = np.arange(t)[:, None] - np.arange(lags)[None]
    picked = jnp.take(values, jnp.asarray(np.maximum(index, 0)), axis=1)
    return jnp.where(jnp.asarray(index >= 0), picked, 0.0)


def summarise(
    past: Float[Array, "b t lags"],
    coefficients: Float[Array, "knots k"],
    log_height: Float[Array, " b"],
    reach: float,
) -> Float[Array, "b t k"]:
    """``sum_j h_k(2 pi j / L) past[j]`` for kernels ``h_k`` given by their spline coefficients."""
    hats = basis(distances(past.shape[-1], log_height), coefficients.shape[0], reach)
    return jnp.einsum("btj,bjk->btk", past, hats @ coefficients)


def least_squares(
    gaps: Float[np.ndarray, "n t"],
    log_height: Float[np.ndarray, " n"],
    knots: int,
    reach: float,
    horizons: int,
    ridge: float = 1e-4,
) -> Float[np.ndarray, "knots h"]:
    """Kernels that best predict, linearly, each of the gaps ``1 .. horizons`` ahead.

    A good start for learned kernels: the first is the height-warped autoregression, the others
    extrapolate the same field further.

    Args:
      gaps: windows of ``lags + horizons`` gaps, mean 1.
      log_height: ``ln(t / 2 pi)`` of each window.
      knots: spline coefficients per kernel.
      reach: physical distance of the last knot.
      horizons: number of kernels.
      ridge: added to the diagonal, relative to its mean.
    """
    lags = gaps.shape[1] - horizons
    past = gaps[:, lags - 1 :: -1][:, :lags] - 1.0
    ahead = gaps[:, lags:] - 1.0
    gram = np.zeros((knots, knots))
    cross = np.zeros((knots, horizons))
    for at in range(0, len(gaps), 512):
        rows = slice(at, at + 512)
        hats = np.asarray(basis(distances(lags, jnp.asarray(log_height[rows])), knots, reach))
        x = np.einsum("bj,bjk->bk", past[rows], hats).astype(np.float64)
        gram += x.T @ x
        cross += x.T @ ahead[rows]
    gram[np.diag_indices(knots)] += ridge * np.trace(gram) / knots
    return np.linalg.solve(gram, cross).astype(np.float32)


def prime_lines(count: int, knots: int, reach: float) -> Float[np.ndarray, "knots 2*count"]:
    """Cosine and sine at ``ln q`` for the first prime powers ``q``, tapered to 0 at ``reach``."""
    at = np.linspace(0.0, reach, knots)[:, None]
    omega = np.log(prime_powers(count))[None]
    taper = np.cos(np.pi * at / (2 * reach)) ** 2
    waves = np.concatenate([np.cos(omega * at), np.sin(omega * at)], axis=1)
    return (taper * waves).astype(np.float32)


def prime_powers(count: int) -> Float[np.ndarray, " count"]:
    """The first ``count`` prime powers: 2, 3, 4, 5, 7, 8, 9, 11, ..."""
    found: list[int] = []
    n = 2
    while len(found) < count:
        p = next((d for d in range(2, int(n**0.5) + 1) if n % d == 0), n)
        m = n
        while m % p == 0:
            m //= p
        if m == 1:
            found.append(n)
        n += 1
    return np.asarray(found, np.float64)
