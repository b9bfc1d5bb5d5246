"""Summaries of past gaps with kernels of *physical* distance, linear and of second order.

The fluctuations of zeta zeros at height ``t`` have spectral lines at ``ln p`` per unit of ``t``,
and neighbours lie ``2 pi / L`` apart, ``L = ln(t / 2 pi)`` (Berry & Keating 1999, section 4). A
filter that is a function of ``2 pi j / L`` therefore serves every height, one of the index ``j``
only its own.

The lines are those of a function of *true* distance, sampled at zeros that have moved off their
even places. To first order in these displacements a prediction is linear in the gaps; the second
order is a sum over products of displacements, of which `channels` gives those of near neighbours.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import scipy.signal
from jaxtyping import Array, Float, Int


def distances(
    lags: int, log_height: Float[Array, "*b"]
) -> Float[Array, "*b lags"]:
    """Mean physical distance ``2 pi j / L`` of the last 1, 2, ... ``lags`` gaps."""
    j = jnp.arange(1, lags + 1, dtype=jnp.float32)
    return 2 * jnp.pi * j / log_height[..., None]


def equivalent(
    seen: Int[np.ndarray, " n"], log_height: Float[Array, " b"], context: int,
    reach: float | Float[Array, ""],
) -> Int[Array, "b n"]:
    """Gaps, at most ``context``, that span at the height of ``reach`` what ``seen`` ones span here.

    A predictor that is a function of distance serves any height, if it is one for as much distance
    as there is: at ``t = 1e9`` 255 gaps are as long as 163 at ``1e6``.
    """
    there = 2 * jnp.pi * context / reach  # L at which `context` gaps end at the reach
    many = jnp.floor(seen * (there / log_height[:, None]) + 1e-3).astype(jnp.int32)
    return jnp.clip(many, 1, context)


def basis(
    distance: Float[Array, "*b"], knots: int, reach: float | Float[Array, ""]
) -> Float[Array, "*b knots"]:
    """Cubic B-splines on equidistant knots from 0, the last of which ends at ``reach``.

    Two knots lie beyond the last spline's centre, so that what they add up to ends smoothly there.
    Zeros lie about a knot apart and the lines at ``ln p`` come within a factor of two of the
    fastest wave that so many can tell: straight lines between knots miss a third of those.
    """
    at = distance[..., None] * ((knots + 1) / reach)
    u = jnp.abs(at - jnp.arange(knots, dtype=jnp.float32))
    return jnp.where(u < 1, 2 / 3 - u**2 + u**3 / 2, jnp.maximum(2 - u, 0.0) ** 3 / 6)


def lagged(values: Float[Array, "b t"], lags: int) -> Float[Array, "b t lags"]:
    """``values[t], values[t-1], ...`` at every position ``t``; 0 before the first."""
    t = values.shape[1]
    index = np.arange(t)[:, None] - np.arange(lags)[None]
    picked = jnp.take(values, jnp.asarray(np.maximum(index, 0)), axis=1)
    return jnp.where(jnp.asarray(index >= 0), picked, 0.0)


def centring(lags: int) -> Float[np.ndarray, "seen lags"]:
    """Weights of past gaps in the mean displacement of the zeros among the last ``seen`` gaps.

    The mean over zeros is by Hann weights; a zero's displacement is a cumulative sum of gaps, so
    that each gap has the weights of all zeros behind it. Rows are for 0 to ``lags`` gaps seen.
    """
    taper = np.zeros((lags + 1, lags + 1))
    for n in range(1, lags + 1):
        hann = np.hanning(n + 3)[1:-1]
        taper[n, : n + 1] = hann / hann.sum()
    return np.cumsum(taper[:, ::-1], axis=1)[:, ::-1][:, 1:].astype(np.float32)


def pairs(displacement: Array, count: int) -> list[Array]:
    """Products ``d_j d_{j+k}`` of displacements along the last axis, for ``k < count``."""
    lags = displacement.shape[-1]
    padded = jnp.pad(displacement, [(0, 0)] * (displacement.ndim - 1) + [(0, max(count - 1, 0))])
    return [displacement * padded[..., k : k + lags] for k in range(count)]


def channels(
    deviation: Float[Array, "b t"], lags: int, products: int
) -> list[Float[Array, "b t lags"]]:
    """What kernels are applied to: past deviations, and products of displacements.

    Args:
      deviation: gaps minus 1.
      lags: gaps looked at.
      products: number of second-order channels; the ``k``-th holds ``d_j d_{j+k}``, ``k`` from 0.

    Returns:
      ``1 + products`` arrays; position ``t`` looks at its last ``min(t + 1, lags)`` gaps, the
      latest first. ``d_j`` is how far the ``j``-th zero back lies off its even place, relative to
      the mean of all zeros that the position sees (see `centring`).
    """
    past = lagged(deviation, lags)
    if not products:
        return [past]
    seen = np.minimum(np.arange(1, deviation.shape[1] + 1), lags)
    centre = jnp.einsum("btj,tj->bt", past, jnp.asarray(centring(lags)[seen]))
    place = jnp.cumsum(jnp.pad(deviation, ((0, 0), (1, 0))), axis=1)
    off = place[:, 1:, None] - lagged(place[:, :-1], lags) - centre[..., None]
    off = jnp.where(jnp.asarray(np.arange(lags) < seen[:, None]), off, 0.0)
    return [past, *pairs(off, products)]


def summarise(
    past: Float[Array, "b t lags"],
    coefficients: Float[Array, "knots k"],
    log_height: Float[Array, " b"],
    reach: float | Float[Array, ""],
) -> Float[Array, "b t k"]:
    """``sum_j h_k(2 pi j / L) past[j]`` for kernels ``h_k`` given by their spline coefficients."""
    hats = basis(distances(past.shape[-1], log_height), coefficients.shape[0], reach)
    return jnp.einsum("btj,bjk->btk", past, hats @ coefficients)


def prime_lines(count: int, knots: int, reach: float) -> Float[np.ndarray, "knots 2*count"]:
    """Cosine and sine at ``ln q`` for the first prime powers ``q``, tapered to 0 at ``reach``.

    As coefficients: the splines pass through the waves at the knots.
    """
    at = np.arange(knots)[:, None] * reach / (knots + 1)
    omega = np.log(prime_powers(count))[None]
    taper = np.cos(np.pi * at / (2 * reach)) ** 2
    waves = np.concatenate([np.cos(omega * at), np.sin(omega * at)], axis=1)
    found = [scipy.signal.cspline1d(wave) for wave in (taper * waves).T]
    return np.stack(found, axis=1).astype(np.float32)


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
