"""Linear baselines: what a predictor without a network gets out of the past gaps.

`fit_linear`: ``s_n - 1 = c + sum_j a_j (s_{n-j} - 1) + e``, least squares.
`fit_warped`: the coefficients follow the height, ``a_j = h(2 pi j / L)`` with ``L = ln(t / 2 pi)``
and ``h`` a cubic B-spline. Primes put lines at the frequencies ``ln p / L`` cycles per gap into the
zeros (the explicit formula), so a past gap matters by its *physical* distance ``2 pi j / L``, and
coefficients fitted at one height are wrong at another.

Both predict a Gaussian with the residual standard deviation of the training targets. Sums over
millions of positions are formed from lagged products, in O(n p + p^2) rather than O(n p^2).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64
from scipy.interpolate import BSpline
from scipy.linalg import cho_factor, cho_solve

from latent_jax.core.errors import DataError
from latent_jax.data.zeros import Spacings
from latent_jax.systems.spacing.predictions import Prediction

# Positions whose L differs by at most this share one set of coefficients: at 255 gaps the phase
# error is then below 0.003, where 0.02 in L would already ruin the fit.
_HEIGHT_STEP = 1e-3
_LONGEST = 4096
_RIDGE = 1e-10


class _Lagged(NamedTuple):
    """Sums over targets ``n`` of products of ``x_n`` and its past ``x_{n-1} … x_{n-p}``."""

    count: int
    total: float
    square: float
    past: Float64[np.ndarray, " p"]
    cross: Float64[np.ndarray, " p"]
    gram: Float64[np.ndarray, "p p"]


def _lagged(x: Float64[np.ndarray, " n"], start: int, stop: int, order: int) -> _Lagged:
    """Lagged sums over the targets ``start <= n < stop``; ``start >= order``.

    ``G_{i+1,j+1} - G_{ij}`` has two terms, those at the ends: the first row and a cumulative sum
    along the diagonals give the whole matrix.
    """
    near = x[start:stop]
    lag = np.arange(1, order + 1)
    cross = np.correlate(x[start - order : stop - 1], near, "valid")[::-1]
    # row 1: sum x_{n-1} x_{n-j}
    first = np.correlate(x[start - order : stop - 1], x[start - 1 : stop - 1], "valid")[::-1]
    # one more lag on both sides adds x[start-1-i] x[start-1-j] and drops x[stop-1-i] x[stop-1-j]
    entering, leaving = x[start - 1 - lag[:-1]], x[stop - 1 - lag[:-1]]
    step = np.outer(entering, entering) - np.outer(leaving, leaving)
    gram = np.empty((order, order))
    gram[0] = gram[:, 0] = first
    for row in range(1, order):
        gram[row, 1:] = gram[row - 1, :-1] + step[row - 1]
    sums = np.concatenate([[0.0], np.cumsum(x[start - order : stop])])
    past = sums[stop - start + order - lag] - sums[order - lag]
    return _Lagged(len(near), near.sum(), near @ near, past, cross, gram)


def _solve(
    count: float, total: float, square: float, past: np.ndarray, cross: np.ndarray, gram: np.ndarray
) -> tuple[float, np.ndarray, float]:
    """Least squares from sums: intercept, coefficients, residual standard deviation."""
    centred = gram - np.outer(past, past) / count
    target = cross - past * total / count
    centred[np.diag_indices_from(centred)] += _RIDGE * np.trace(centred) / len(centred)
    weights = cho_solve(cho_factor(centred), target)
    intercept = (total - past @ weights) / count
    residual = square - total**2 / count - target @ weights
    return intercept, weights, float(np.sqrt(max(residual, 0.0) / count))


@dataclasses.dataclass(frozen=True)
class LinearAR:
    """A fitted linear autoregression.

    Attributes:
      intercept: ``c``.
      weights: ``a_1 … a_p``, nearest gap first.
      sigma: residual standard deviation on the training targets.
    """

    intercept: float
    weights: Float64[np.ndarray, " p"]
    sigma: float

    def predict(self, spacings: Spacings, targets: Int64[np.ndarray, " n"]) -> Prediction:
        """Predicts the gaps at the given positions from those before them."""
        order = len(self.weights)
        _check_targets(targets, order, len(spacings.values))
        windows = np.lib.stride_tricks.sliding_window_view(spacings.values - 1, order)
        mean = np.empty(len(targets))
        for part in range(0, len(targets), _LONGEST):
            at = targets[part : part + _LONGEST]
            mean[part : part + _LONGEST] = windows[at - order] @ self.weights[::-1]
        return Prediction(1 + self.intercept + mean, np.full(len(targets), self.sigma))


@dataclasses.dataclass(frozen=True)
class WarpedAR:
    """A fitted autoregression whose coefficients are a function of physical distance.

    Attributes:
      intercept: ``c``.
      response: the spline ``h``; 0 beyond its last knot.
      order: gaps looked at.
      sigma: residual standard deviation on the training targets.
    """

    intercept: float
    response: BSpline
    order: int
    sigma: float

    def weights(self, log_height: float) -> Float64[np.ndarray, " p"]:
        """``a_1 … a_p`` at one height."""
        at = 2 * np.pi * np.arange(1, self.order + 1) / log_height
        return np.nan_to_num(self.response(at, extrapolate=False))

    def predict(self, spacings: Spacings, targets: Int64[np.ndarray, " n"]) -> Prediction:
        """Predicts the gaps at the given positions (sorted) from those before them."""
        _check_targets(targets, self.order, len(spacings.values))
        windows = np.lib.stride_tricks.sliding_window_view(spacings.values - 1, self.order)
        mean = np.empty(len(targets))
        for start, stop, height in _groups(spacings.log_height[targets]):
            weights = self.weights(height)
            mean[start:stop] = windows[targets[start:stop] - self.order] @ weights[::-1]
        return Prediction(1 + self.intercept + mean, np.full(len(targets), self.sigma))


def _check_targets(targets: Int64[np.ndarray, " n"], order: int, n: int) -> None:
    if len(targets) and not order <= targets.min() <= targets.max() < n:
        raise DataError(
            f"autoregression of order {order}: targets must lie in [{order}, {n}), got "
            f"{targets.min()} to {targets.max()}"
        )


def _groups(log_height: Float64[np.ndarray, " n"]) -> Iterator[tuple[int, int, float]]:
    """Cuts positions into stretches of nearly equal height: start, stop, height."""
    start = 0
    while start < len(log_height):
        ahead = log_height[start : start + _LONGEST]
        apart = np.abs(ahead - ahead[0]) > _HEIGHT_STEP
        stop = start + (int(apart.argmax()) if apart.any() else len(ahead))
        yield start, stop, float(log_height[start:stop].mean())
        start = stop


def _stretches(
    ranges: Int64[np.ndarray, "m 2"], context: int, run: int
) -> Iterator[tuple[int, int]]:
    """Stretches of targets that have ``context`` gaps before them in their range and run."""
    for low, high in np.asarray(ranges).tolist():
        first = low // run * run
        for piece in range(first, high, run):
            start, stop = max(low, piece) + context, min(high, piece + run)
            if start < stop:
                yield start, stop


def _last(stretches: Iterator[tuple[int, int]], recent: int | None) -> list[tuple[int, int]]:
    """The last ``recent`` targets of the stretches; all of them without a number."""
    kept, left = [], np.inf if recent is None else recent
    for start, stop in reversed(list(stretches)):
        if left > 0:
            kept.append((int(max(start, stop - left)), stop))
            left -= kept[-1][1] - kept[-1][0]
    return kept[::-1]


def targets(ranges: Int64[np.ndarray, "m 2"], window: int, run: int) -> Int64[np.ndarray, " n"]:
    """Last positions of all windows that lie inside one range and one run."""
    parts = [np.arange(a, b) for a, b in _stretches(ranges, window - 1, run)]
    return np.concatenate([np.empty(0, np.int64), *parts])


def fit_linear(
    spacings: Spacings,
    ranges: Int64[np.ndarray, "m 2"],
    order: int,
    window: int = 256,
    recent: int | None = None,
) -> LinearAR:
    """Fits a linear autoregression to the last positions of the windows in ``ranges``.

    Args:
      spacings: the whole sequence.
      ranges: its training part.
      order: gaps looked at, below ``window``.
      window: gaps in a window, the target among them.
      recent: use only so many targets at the end: the best coefficients drift with height.

    Raises:
      DataError: order and window that do not fit together, or fewer targets than coefficients.
    """
    _check_order(order, window)
    sums: list = [0, 0.0, 0.0, 0.0, 0.0, 0.0]
    for start, stop in _last(_stretches(ranges, window - 1, spacings.run), recent):
        found = _lagged(spacings.values - 1, start, stop, order)
        sums = [a + b for a, b in zip(sums, found, strict=True)]
    _check_count(sums[0], order)
    return LinearAR(*_solve(*sums))


def fit_warped(
    spacings: Spacings,
    ranges: Int64[np.ndarray, "m 2"],
    order: int,
    window: int = 256,
    recent: int | None = None,
    density: float = 1.0,
) -> WarpedAR:
    """Fits an autoregression in physical distance to the last positions of the windows.

    Args:
      spacings: the whole sequence, with heights.
      ranges: its training part.
      order: gaps looked at, below ``window``.
      window: gaps in a window, the target among them.
      recent: use only so many targets at the end; see `fit_linear`.
      density: spline knots per mean gap at the greatest height.

    Raises:
      DataError: no heights, order and window that do not fit together, or too few targets.

    The first knots belong to the nearest gaps; ``h`` reaches as far as ``order`` gaps do at the
    lowest height fitted, and is 0 beyond.
    """
    _check_order(order, window)
    height = spacings.log_height
    if height.min() <= 0:
        raise DataError("warped autoregression: needs gaps with heights, L = ln(t / 2 pi) > 0")
    stretches = _last(_stretches(ranges, window - 1, spacings.run), recent)
    _check_count(sum(stop - start for start, stop in stretches), order)
    lowest = min(height[start] for start, _ in stretches)
    top = max(height[stop - 1] for _, stop in stretches)
    knots = _knots(2 * np.pi * order / lowest, 2 * np.pi / top / density)
    size = len(knots) - 4
    x = spacings.values - 1
    sums: list = [0, 0.0, 0.0, 0.0, 0.0, 0.0]
    for first, last in stretches:
        for start, stop, level in _groups(height[first:last]):
            found = _lagged(x, first + start, first + stop, order)
            at = 2 * np.pi * np.arange(1, order + 1) / level
            basis = BSpline.design_matrix(at, knots, 3)
            near = basis.T @ (basis.T @ found.gram).T
            here = (*found[:3], basis.T @ found.past, basis.T @ found.cross, near)
            sums = [a + b for a, b in zip(sums, here, strict=True)]
    _check_count(sums[0], size)
    intercept, weights, sigma = _solve(*sums)
    return WarpedAR(intercept, BSpline(knots, weights, 3), order, sigma)


def _knots(stop: float, step: float) -> Float64[np.ndarray, " m"]:
    """Uniform knots of a cubic spline on [0, stop], the ends fourfold."""
    inner = np.linspace(0, stop * (1 + 1e-9), max(2, int(np.ceil(stop / step)) + 1))
    return np.concatenate([[inner[0]] * 3, inner, [inner[-1]] * 3])


def _check_order(order: int, window: int) -> None:
    if not 1 <= order < window:
        raise DataError(
            f"autoregression: order={order} must be at least 1 and below the window's {window} gaps"
        )


def _check_count(count: int, size: int) -> None:
    if count <= 2 * size:
        raise DataError(f"autoregression: {count} targets are too few for {size} coefficients")
