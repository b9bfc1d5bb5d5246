"""Zeros of the Riemann zeta function on the critical line, by the Riemann-Siegel formula.

With ``tau = sqrt(t / 2 pi)``, ``N = floor(tau)`` and ``p = tau - N`` (Edwards 1974, chapter 7)::

    Z(t) = 2 sum_{n <= N} n^{-1/2} cos(theta(t) - t ln n)
           + (-1)^{N-1} tau^{-1/2} (C_0(p) + C_1(p) / tau + … + C_4(p) / tau^4)

is real for real ``t`` and vanishes where ``zeta(1/2 + it)`` does; the remainder is below
``0.017 t^{-11/4}`` (Gabcke 1979). Below ``t = 1608`` Euler-Maclaurin summation takes its place.

``Z`` is sampled on uniform grids, six points a mean gap: with ``t = t_c + a A h + b h`` the main
sum is a matrix product over ``n``. Zeros are roots of the interpolating polynomials through sixteen
samples. Close pairs between two samples are found at the extremum between them, and Turing's method
(`turing`) proves that none is missing.

Phases ``t ln n`` are reduced modulo 2 pi in extended precision once a grid, and zeros are kept as
offsets from ``base``: double precision alone would lose them far up.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64
from numpy.polynomial import chebyshev, polynomial

from latent_jax.core.errors import DataError

_LOW = 16  # smallest N of the Riemann-Siegel formula here: its remainder is below 3e-11
_FIRST = 14.134725
_OVERSAMPLE = 6.0  # samples a mean gap
_STENCIL = 16
_GRID = 1 << 16  # most samples in a grid
_TERMS = 4096  # terms of the main sum in one matrix product
_TURING = 24.0  # length of the stretches that are averaged
_EXTENDED = float(np.finfo(np.longdouble).eps)


class Zeros(NamedTuple):
    """Consecutive zeros ``base + offset``.

    Attributes:
      base: a height.
      offset: the zeros less ``base``.
      first: the number of the first of them; 1 is the one at 14.13.
    """

    base: float
    offset: Float64[np.ndarray, " n"]
    first: int


def theta(t: Float64[np.ndarray, "*b"] | float) -> Float64[np.ndarray, "*b"]:
    """Riemann-Siegel theta by Stirling's series, to 1e-12 above 14 (Edwards 1974, 6.5)."""
    t = np.asarray(t)
    tail = 1 / (48 * t) + 7 / (5760 * t**3) + 31 / (80640 * t**5) + 127 / (430080 * t**7)
    # arctan(1) in the argument's own precision: pi would be a double
    pi = 4 * np.arctan(t * 0 + 1)
    return t / 2 * np.log(t / (2 * pi)) - t / 2 - pi / 8 + tail


def theta_between(base: float, offset: Float64[np.ndarray, "*b"]) -> Float64[np.ndarray, "*b"]:
    """``theta(base + offset) - theta(base)`` without forming either."""
    t = base + offset
    main = offset * np.log(base / (2 * np.pi)) + t * np.log1p(offset / base) - offset
    tail = [1 / (48 * s) + 7 / (5760 * s**3) + 31 / (80640 * s**5) for s in (t, base)]
    return main / 2 + tail[0] - tail[1]


@functools.cache
def _corrections() -> tuple[np.ndarray, ...]:
    """Power series of ``C_0 … C_4`` in ``z = p - 1/2``.

    ``C_0 = Psi(p) = cos(2 pi (p^2 - p - 1/16)) / cos(2 pi p)`` is entire; its coefficients are the
    Fourier coefficients on the circle ``|z| = 1``, away from the removable zeros of the
    denominator. The others combine derivatives of Psi (Edwards 1974, 7.4; Haselgrove 1960).
    """
    size = 256
    z = np.exp(2j * np.pi * np.arange(size) / size)
    psi = -np.cos(2 * np.pi * z**2 - 5 * np.pi / 8) / np.cos(2 * np.pi * z)
    series = (np.fft.fft(psi).real / size)[:64]
    series[1::2] = 0  # even
    d = [polynomial.polyder(series, k) for k in range(13)]
    pi2 = np.pi**2

    def add(*terms: tuple[float, int]) -> np.ndarray:
        total = np.zeros(1)
        for factor, order in terms:
            total = polynomial.polyadd(total, factor * d[order])
        return total

    return (
        add((1, 0)),
        add((-1 / (96 * pi2), 3)),
        add((1 / (64 * pi2), 2), (1 / (18432 * pi2**2), 6)),
        add((-1 / (64 * pi2), 1), (-1 / (3840 * pi2**2), 5), (-1 / (5308416 * pi2**3), 9)),
        add(
            *((1 / (128 * pi2), 0), (19 / (24576 * pi2**2), 4)),
            *((11 / (5898240 * pi2**3), 8), (1 / (2038431744 * pi2**4), 12)),
        ),
    )


def _correction(count: int, tau: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """The part of Z behind the main sum of ``count`` terms, for ``tau`` about [count, count+1]."""
    # One smooth function of p for the whole grid: a Chebyshev series replaces five polynomials.
    low, high = tau[0], tau[-1]
    at = (low + high) / 2 + (high - low) / 2 * chebyshev.chebpts1(32)
    z = at - count - 0.5
    parts = [polynomial.polyval(z, c) / at**k for k, c in enumerate(_corrections())]
    values = (-1) ** (count - 1) * at**-0.5 * sum(parts)
    series = chebyshev.chebfit(chebyshev.chebpts1(32), values, 31)
    return chebyshev.chebval((2 * tau - low - high) / (high - low), series)


def _siegel(start: np.longdouble, step: float, cells: int, count: int) -> np.ndarray:
    """Z on the grid ``start + step * (-7 … cells + 8)`` with ``count`` terms."""
    pad = _STENCIL // 2
    size = cells + 2 * pad
    inner = int(np.ceil(np.sqrt(size)))
    outer = -(-size // inner)
    origin = start - np.longdouble(step) * (pad - 1)
    total = np.zeros((outer, inner), np.complex128)
    turn = 8 * np.arctan(np.longdouble(1))
    for low in range(1, count + 1, _TERMS):
        n = np.arange(low, min(low + _TERMS, count + 1), dtype=np.longdouble)
        exact = np.log(n)
        phase = np.fmod(origin * exact, turn).astype(np.float64)
        log = exact.astype(np.float64)
        rows = np.exp(-1j * (phase + np.arange(outer)[:, None] * (inner * step) * log))
        rows *= n.astype(np.float64) ** -0.5
        columns = np.exp(-1j * step * np.arange(inner)[:, None] * log)
        total += rows @ columns.T
    offset = step * np.arange(size)
    angle = float(np.fmod(theta(origin), turn)) + theta_between(float(origin), offset)
    main = 2 * (total.ravel()[:size] * np.exp(1j * angle)).real
    tau = np.sqrt((float(origin) + offset) / (2 * np.pi))
    return main + _correction(count, tau)


def _euler_maclaurin(start: np.longdouble, step: float, cells: int) -> np.ndarray:
    """Z on the same grid for small t, by Euler-Maclaurin summation (Edwards 1974, 6.4)."""
    pad = _STENCIL // 2
    t = float(start) + step * np.arange(1 - pad, cells + pad + 1)
    s = 0.5 + 1j * t
    n = np.arange(1, int(t[-1] / 3) + 30)
    last = float(n[-1])
    zeta = np.exp(-np.log(n[:-1]) * s[:, None]).sum(axis=1)
    power = last**-s
    zeta += power * last / (s - 1) + power / 2
    # B_2k / (2k)! s (s+1) … (s+2k-2) last^(1-s-2k)
    factor = power * s / last
    for k, bernoulli in enumerate(_BERNOULLI, 1):
        zeta += bernoulli * factor
        factor = factor * (s + 2 * k - 1) * (s + 2 * k) / last**2
    return (np.exp(1j * theta(t)) * zeta).real


def _bernoulli_over_factorial(count: int) -> Float64[np.ndarray, " n"]:
    """``B_2k / (2k)!`` = ``2 (-1)^(k+1) zeta(2k) / (2 pi)^2k``."""
    k = np.arange(1, count + 1)
    zeta = (np.arange(1, 60)[:, None] ** (-2.0 * k)).sum(axis=0)
    zeta[0] = np.pi**2 / 6  # slow to sum
    zeta[1] = np.pi**4 / 90
    return 2 * (-1.0) ** (k + 1) * zeta / (2 * np.pi) ** (2 * k)


_BERNOULLI = _bernoulli_over_factorial(14)


@functools.cache
def _interpolation() -> Float64[np.ndarray, "s s"]:
    """From sixteen samples to the polynomial in x, where x = 0 and 1 are the middle two."""
    # In y = (x - 1/2) / 8 the Vandermonde matrix is well-conditioned enough to invert.
    x = np.arange(_STENCIL) - (_STENCIL // 2 - 1)
    inverse = np.linalg.inv(polynomial.polyvander((x - 0.5) / (_STENCIL / 2), _STENCIL - 1))
    return inverse.T


def _value(series: np.ndarray, x: np.ndarray) -> np.ndarray:
    return polynomial.polyval((x - 0.5) / (_STENCIL / 2), series, tensor=False)


def _roots(series: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The root of each polynomial between two places of opposite sign: Newton, kept inside."""
    slope = polynomial.polyder(series) / (_STENCIL / 2)
    below, above = _value(series, low), _value(series, high)
    x = low - below * (high - low) / (above - below)
    for _ in range(7):
        value = _value(series, x)
        left = np.sign(value) == np.sign(below)
        low, high = np.where(left, x, low), np.where(left, high, x)
        derivative = _value(slope, x)
        new = x - value / np.where(derivative == 0, 1.0, derivative)
        x = np.where((new >= low) & (new <= high), new, (low + high) / 2)
    return x


def _grid_zeros(samples: Float64[np.ndarray, " n"], cells: int) -> Float64[np.ndarray, " z"]:
    """Zeros in units of the grid's step from its start."""
    pad = _STENCIL // 2 - 1
    windows = np.lib.stride_tricks.sliding_window_view(samples, _STENCIL)
    z = samples[pad : pad + cells + 1]
    positive = z >= 0
    change = np.flatnonzero(positive[:-1] != positive[1:])
    ends = np.zeros(len(change)), np.ones(len(change))
    single = change + _roots((windows[change] @ _interpolation()).T, *ends)
    # |Z| smallest between two larger samples of the same sign: look between the samples.
    size = np.abs(samples)
    at = np.arange(pad, pad + cells + 1)
    dip = (size[at] <= size[at - 1]) & (size[at] <= size[at + 1])
    same = np.sign(samples[at - 1]) * np.sign(samples[at + 1]) > 0
    middle = np.flatnonzero(dip & same & (np.sign(samples[at]) == np.sign(samples[at - 1])))
    around = np.unique(np.concatenate([middle - 1, middle]))
    around = around[(around >= 0) & (around < cells)]
    around = around[positive[around] == positive[around + 1]]
    if not len(around):
        return single
    series = (windows[around] @ _interpolation()).T
    x = _roots_of_slope(series)
    hit = (_value(series, x) >= 0) != positive[around]
    series, x, around = series[:, hit], x[hit], around[hit]
    one, zero = np.ones(len(x)), np.zeros(len(x))
    pairs = [around + _roots(series, zero, x), around + _roots(series, x, one)]
    return np.sort(np.concatenate([single, *pairs]))


def _roots_of_slope(series: np.ndarray) -> np.ndarray:
    """Where in [0, 1] each polynomial is stationary; an end where it is nowhere."""
    slope = polynomial.polyder(series)
    bend = polynomial.polyder(slope) / (_STENCIL / 2)
    x = np.full(series.shape[1], 0.5)
    for _ in range(8):
        curvature = _value(bend, x)
        x = x - _value(slope, x) / np.where(curvature == 0, 1.0, curvature)
        x = np.clip(x, 0, 1)
    return x


def _grids(start: float, stop: float, oversample: float) -> Iterator[tuple]:
    """Grids that cover [start, stop): start, step, cells, terms (0: Euler-Maclaurin)."""
    turn = 8 * np.arctan(np.longdouble(1))
    at, stop = np.longdouble(start), np.longdouble(stop)
    while at < stop:
        count = int(np.sqrt(at / turn))
        count += int(turn * (count + 1) ** 2 <= at)  # a border, rounded down
        edge = turn * (count + 1) ** 2 if count >= _LOW else min(2 * at, turn * _LOW**2)
        step = float(2 * np.pi / np.log(max(float(edge), 30.0) / (2 * np.pi)) / oversample)
        end = min(edge, stop, at + _GRID * np.longdouble(step))
        cells = max(1, int(np.ceil(float(end - at) / step)))
        yield at, float(end - at) / cells, cells, count if count >= _LOW else 0
        at = end


def scan(start: float, stop: float, oversample: float = _OVERSAMPLE) -> Zeros:
    """All zeros of Z in [start, stop) that its samples show; `first` is 0, unknown.

    Args:
      start: lowest height, at least 10.
      stop: greatest height.
      oversample: samples per mean gap.
    """
    found = []
    for at, step, cells, count in _grids(start, stop, oversample):
        z = _siegel(at, step, cells, count) if count else _euler_maclaurin(at, step, cells)
        found.append(float(at - np.longdouble(start)) + step * _grid_zeros(z, cells))
    return Zeros(start, np.concatenate([np.empty(0), *found]), 0)


def turing(zeros: Zeros, low: float, high: float) -> float:
    """Mean over ``base + [low, high]`` of the zeros' true number less that of those found so far.

    The number of zeros up to t is ``theta(t) / pi + 1 + S(t)``, and ``|int S|`` is below
    ``2.067 + 0.059 ln t`` (Turing 1953; Trudgian 2011): over a stretch long enough the mean tells
    the whole number of zeros before ``base`` if all in between were found.
    """
    length = high - low
    inside = np.clip(zeros.offset, None, high)
    counted = np.sum(high - np.maximum(inside, low)) / length
    t, w = np.polynomial.legendre.leggauss(24)
    at = (low + high) / 2 + length / 2 * t
    start = float(theta(np.longdouble(zeros.base)) / (4 * np.arctan(np.longdouble(1))))
    mean = start + float(w @ theta_between(zeros.base, at)) / 2 / np.pi + 1
    return mean - counted


def generate(t0: float, count: int) -> Zeros:
    """The first ``count`` zeros above ``t0``, with Turing's proof that none is missing.

    Raises:
      DataError: bad arguments; this machine's extended precision is too short for that height; or
        the count does not come out even with the finest grid.
    """
    if not (np.isfinite(t0) and t0 >= 0) or count < 1:
        raise DataError(f"zeros: t0={t0} must be at least 0 and count={count} at least 1")
    if t0 * np.log(t0 + 2) * _EXTENDED > 1e-6:
        raise DataError(
            f"zeros: t0={t0:g} is too high for this machine's extended precision "
            f"({_EXTENDED:.0e}): the phases would be off by more than 1e-6"
        )
    # Low down the scan starts below the first zero, where the count is known to be 0.
    start = float(t0) - 2 * _TURING if t0 > 1000 else 10.0
    stop = _height(start, max(t0, _FIRST), count) + 2 * _TURING
    for oversample in (_OVERSAMPLE, 2 * _OVERSAMPLE, 4 * _OVERSAMPLE):
        found = scan(start, stop, oversample)
        if (first := _complete(found, stop)) is not None:
            break
    else:
        raise DataError(f"zeros: above t={t0:g} the number of zeros does not come out even")
    before = int(np.searchsorted(found.offset, t0 - start, side="right"))
    offset = found.offset[before : before + count] - (float(t0) - start)
    if len(offset) < count:
        raise DataError(f"zeros: {len(offset)} of {count} found above t={t0:g}")
    return Zeros(float(t0), offset, first + before + 1)


def _complete(found: Zeros, stop: float) -> int | None:
    """How many zeros lie below ``base``, or None where some were missed."""
    span = stop - found.base
    bound = (2.067 + 0.059 * np.log(stop)) / _TURING
    low = found.base > 500
    ends = [turing(found, 0.0, _TURING)] if low else [0.0]
    ends.append(turing(found, span - _TURING, span))
    number = round(ends[0])
    return number if all(abs(end - number) <= bound for end in ends) else None


def _height(start: float, t0: float, count: int) -> float:
    """A height with at least ``count`` zeros between it and ``t0``."""
    rise = np.float64(count * 2 * np.pi / max(np.log(t0 / (2 * np.pi)), 1.0))
    goal = (count + 3) * np.pi
    for _ in range(50):
        slope = np.log((t0 + rise) / (2 * np.pi)) / 2
        rise += (goal - theta_between(t0, rise)) / max(slope, 0.5)
    return t0 + float(rise)
