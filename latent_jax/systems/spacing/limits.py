"""What random-matrix gaps allow: the exact law of the next gap given the last k.

Eigenvalues of large unitary matrices form the determinantal process of the sine kernel
``K(x, y) = sin(pi (x - y)) / (pi (x - y))``. The probability density of points exactly at
``x_0 < … < x_k``, and nowhere else between, is the Janossy density (Daley & Vere-Jones 2003, 5.4;
Borodin & Soshnikov 2003)::

    q_k = |det [[K_XX, K_Xy w^1/2], [w^1/2 K_yX, w^1/2 K_yy w^1/2 - 1]]|

with Gauss-Legendre nodes ``y`` and weights ``w`` on ``[x_0, x_k]`` (Bornemann 2010, "On the
numerical evaluation of Fredholm determinants": exponentially convergent). The next gap has density
``p(s | s_1 … s_k) = q_{k+1} / q_k``, and no predictor of random-matrix gaps can have a smaller
expected negative log-likelihood than it: the floor of a leak test, and a sampler of truth.

Here ``p`` comes from one elimination for all ``s``: seen from ``x_k``, what lies to the right is
again determinantal, with the kernel ``K`` less its projection on what is known, and the next gap
exceeds ``s`` with probability ``det(1 - K')`` on ``[0, s]``. Plain numpy in float64.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float64, Int64
from numpy.polynomial import chebyshev, legendre

from latent_jax.core.errors import DataError
from latent_jax.systems.spacing.predictions import Scores

SPAN = 5.0  # the next gap is looked for in [0, SPAN]; beyond lies less than 1e-8 on average
# Expected NLL (nats) of the exact law by gaps of history: Gaudin's entropy, then quadrature (1, 2)
# and means over sampled histories, standard errors at most 0.0005. The tests compute them again.
FLOOR = {0: 0.5330, 1: 0.4816, 2: 0.4627, 4: 0.4471, 8: 0.4366, 16: 0.4301, 32: 0.4264, 64: 0.4248}
_DEGREE = 47  # of the Chebyshev series of the survival function
_SMOOTH = 30  # nodes on [0, SPAN] that resolve the kernel
_PANEL = 24  # Gauss-Legendre nodes on [0, s]
_CHUNK = 128  # histories at a time


def sine_kernel(x: Float64[np.ndarray, "*b"], y: Float64[np.ndarray, "*b"]) -> np.ndarray:
    """``sin(pi (x - y)) / (pi (x - y))``, 1 where they meet."""
    return np.sinc(x - y)


def _nodes(length: float) -> int:
    """Gauss-Legendre nodes that resolve the kernel on an interval of this length."""
    return int(np.ceil(1.7 * length)) + 22


def _known(past: Float64[np.ndarray, "b k"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What is known of the process up to its last point, which is the origin.

    Returns:
      places ``z`` (points, then nodes), the square roots of their weights (1 for points), and the
      matrix of the Janossy density over them.
    """
    points = np.cumsum(past[:, ::-1], axis=1)[:, ::-1] if past.shape[1] else past
    points = np.concatenate([-points, np.zeros((len(past), 1))], axis=1)
    if past.shape[1]:
        t, w = legendre.leggauss(_nodes(float(-points.min())))
        length = -points[:, :1]
        nodes = -length * (1 - t) / 2
        root = np.sqrt(length * w / 2)
    else:
        nodes = root = np.empty((len(past), 0))
    z = np.concatenate([points, nodes], axis=1)
    weight = np.concatenate([np.ones_like(points), root], axis=1)
    matrix = sine_kernel(z[:, :, None], z[:, None, :]) * weight[:, :, None] * weight[:, None, :]
    inner = np.arange(points.shape[1], z.shape[1])
    matrix[:, inner, inner] -= 1
    return z, weight, matrix


def log_janossy(gaps: Float64[np.ndarray, "b k"]) -> Float64[np.ndarray, " b"]:
    """``ln q_k``: log-density of k consecutive gaps, seen from a point of the process."""
    gaps = np.asarray(gaps, np.float64)
    out = np.empty(len(gaps))
    for part in _chunks(gaps):
        out[part] = np.linalg.slogdet(_known(gaps[part])[2])[1]
    return out


def _chunks(past: np.ndarray) -> Iterator[np.ndarray]:
    """Indices of histories of similar length, a few at a time: they share the node count."""
    order = np.argsort(past.sum(axis=1), kind="stable")
    for start in range(0, len(order), _CHUNK):
        yield order[start : start + _CHUNK]


@functools.cache
def _tables() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Constants of `conditional`.

    Returns:
      Chebyshev points in [0, SPAN]; the matrices that interpolate from them to the Gauss-Legendre
      nodes of each panel [0, s_j]; the square roots of the panels' weights; and the matrix from
      survival at the s_j to Chebyshev coefficients.
    """
    at = chebyshev.chebpts1(_SMOOTH)
    smooth = (at + 1) * SPAN / 2
    ends = (chebyshev.chebpts1(_DEGREE + 1) + 1) * SPAN / 2
    t, w = legendre.leggauss(_PANEL)
    nodes = ends[:, None] * (1 + t) / 2
    into = np.linalg.inv(chebyshev.chebvander(at, _SMOOTH - 1))
    spread = chebyshev.chebvander(2 * nodes / SPAN - 1, _SMOOTH - 1) @ into
    root = np.sqrt(ends[:, None] * w / 2)
    fit = np.linalg.inv(chebyshev.chebvander(2 * ends / SPAN - 1, _DEGREE))
    return smooth, spread * root[:, :, None], root, fit


@dataclasses.dataclass(frozen=True)
class Conditional:
    """Laws of the next gap, one per history, as Chebyshev series of their survival functions.

    Attributes:
      coefficients: of ``P(gap > s)`` in ``2 s / SPAN - 1``, one column per history.
    """

    coefficients: Float64[np.ndarray, "m b"]

    def _at(self, series: np.ndarray, s: Float64[np.ndarray, "*b"]) -> np.ndarray:
        s = np.clip(np.asarray(s, np.float64), 0, SPAN)
        return chebyshev.chebval(2 * s / SPAN - 1, series, tensor=False)

    def survival(self, s: Float64[np.ndarray, "*b"]) -> Float64[np.ndarray, "*b"]:
        """``P(gap > s)``; ``s`` broadcasts against the histories on its last axis."""
        return np.clip(self._at(self._wide(s), s), 0, 1)

    def density(self, s: Float64[np.ndarray, "*b"]) -> Float64[np.ndarray, "*b"]:
        """Density at ``s``."""
        series = chebyshev.chebder(self.coefficients) * (-2 / SPAN)
        return np.maximum(self._at(self._wide(s, series), s), 0)

    def cdf(self, s: Float64[np.ndarray, "*b"]) -> Float64[np.ndarray, "*b"]:
        """``P(gap <= s)``: the probability integral transform of what was observed."""
        return 1 - self.survival(s)

    def nll(self, s: Float64[np.ndarray, " b"]) -> Float64[np.ndarray, " b"]:
        """Negative log-likelihood (nats) of the observed gaps."""
        return -np.log(np.maximum(self.density(s), 1e-300))

    def mean(self) -> Float64[np.ndarray, " b"]:
        """Expected gap: the integral of the survival function."""
        return self._integral(self.coefficients)

    def variance(self) -> Float64[np.ndarray, " b"]:
        """Variance of the gap; ``E s^2 = 2 int s P(gap > s) ds``."""
        s, w = self._quadrature()
        second = 2 * w @ (s[:, None] * self.survival(s[:, None]))
        return second - self.mean() ** 2

    def entropy(self) -> Float64[np.ndarray, " b"]:
        """Differential entropy (nats): the expected NLL of the ideal predictor."""
        s, w = self._quadrature()
        p = self.density(s[:, None])
        return -w @ (p * np.log(np.maximum(p, 1e-300)))

    def crps(self, s: Float64[np.ndarray, " b"]) -> Float64[np.ndarray, " b"]:
        """Continuous ranked probability score ``int (F(x) - 1{x >= s})^2 dx``."""
        above = _product(self.coefficients, self.coefficients)
        cdf = -self.coefficients
        cdf[0] += 1
        below = _product(cdf, cdf)
        low = chebyshev.chebint(below, lbnd=-1) * (SPAN / 2)
        high = chebyshev.chebint(above, lbnd=-1) * (SPAN / 2)
        return self._at(low, s) + high.sum(axis=0) - self._at(high, s)

    def expected_crps(self) -> Float64[np.ndarray, " b"]:
        """Expected score of the ideal predictor: ``int F (1 - F)``."""
        cdf = -self.coefficients
        cdf[0] += 1
        return self._integral(_product(cdf, self.coefficients))

    def quantile(self, p: Float64[np.ndarray, " b"]) -> Float64[np.ndarray, " b"]:
        """Where the CDF reaches ``p``, by bisection."""
        low, high = np.zeros_like(p), np.full_like(p, SPAN)
        for _ in range(44):
            middle = (low + high) / 2
            below = self.cdf(middle) < p
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return (low + high) / 2

    def sample(self, rng: np.random.Generator) -> Float64[np.ndarray, " b"]:
        """One gap per history."""
        return self.quantile(rng.random(self.coefficients.shape[1]))

    def _wide(self, s: object, series: np.ndarray | None = None) -> np.ndarray:
        """Coefficients with axes inserted so that they broadcast against ``s``."""
        series = self.coefficients if series is None else series
        return series.reshape(len(series), *(1,) * (np.ndim(s) - 1), -1)

    @staticmethod
    def _integral(series: np.ndarray) -> np.ndarray:
        return chebyshev.chebint(series, lbnd=-1).sum(axis=0) * (SPAN / 2)

    @staticmethod
    @functools.cache
    def _quadrature() -> tuple[np.ndarray, np.ndarray]:
        t, w = legendre.leggauss(120)
        return (t + 1) * SPAN / 2, w * SPAN / 2


def _product(a: Float64[np.ndarray, "m b"], b: Float64[np.ndarray, "m b"]) -> np.ndarray:
    """Chebyshev coefficients of the product of series, column by column."""
    at = chebyshev.chebpts1(2 * len(a))
    values = np.einsum("nm,mb->nb", basis := chebyshev.chebvander(at, len(a) - 1), a) * (basis @ b)
    full = chebyshev.chebvander(at, 2 * len(a) - 1)
    # discrete orthogonality at these points
    scale = np.full(2 * len(a), 2 / len(at))
    scale[0] = 1 / len(at)
    return scale[:, None] * (full.T @ values)


def conditional(past: Float64[np.ndarray, "b k"]) -> Conditional:
    """The exact law of the next gap given the last k, for a batch of histories.

    Args:
      past: normalised gaps, oldest first; ``k`` may be 0 (Gaudin's law then).
    """
    past = np.asarray(past, np.float64)
    smooth, spread, root, fit = _tables()
    survival = np.empty((len(past), _DEGREE + 1))
    plain = sine_kernel(smooth[:, None], smooth)
    one = np.eye(_PANEL)
    for part in _chunks(past):
        z, weight, matrix = _known(past[part])
        border = sine_kernel(z[:, :, None], smooth) * weight[:, :, None]
        left = plain - border.transpose(0, 2, 1) @ np.linalg.solve(matrix, border)
        # b j p q: on each panel, the kernel that remains
        inner = np.einsum("jps,bst->bjpt", spread, left, optimize=True)
        inner = inner @ spread.transpose(0, 2, 1)
        survival[part] = np.linalg.det(one - inner)
    return Conditional(fit @ survival.T)


def floor_scores(
    values: Float64[np.ndarray, " n"], at: Int64[np.ndarray, " m"], k: int
) -> tuple[Scores, Float64[np.ndarray, " m"]]:
    """Scores of the exact law on given targets, to be paired with a model's on the same ones.

    Args:
      values: normalised gaps; of a random matrix, or the law is not theirs.
      at: the targets' positions; the ``k`` gaps before each must be of its own run.
      k: gaps of history; 0 is Gaudin's law.

    Returns:
      Scores of each target, and the entropy of each target's law: the same expectation as its NLL,
      with a seventh of the standard deviation.

    Raises:
      DataError: a target without ``k`` gaps before it.
    """
    if k < 0 or (len(at) and not k <= at.min() <= at.max() < len(values)):
        raise DataError(
            f"floor: targets must lie in [{k}, {len(values)}) for k={k} gaps of history"
        )
    past = np.lib.stride_tricks.sliding_window_view(values, k)[at - k] if k else np.empty((1, 0))
    law, observed = conditional(past), values[at]
    error = (observed - law.mean()) ** 2
    scores = Scores(law.nll(observed), error, law.crps(observed), law.cdf(observed))
    return scores, np.broadcast_to(law.entropy(), observed.shape)


def gaudin_density(s: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """Gaudin's law: density of one gap when nothing else is known (Gaudin 1961)."""
    return conditional(np.empty((1, 0))).density(np.asarray(s, np.float64)[:, None])[:, 0]


def wigner_density(s: Float64[np.ndarray, "*b"]) -> Float64[np.ndarray, "*b"]:
    """Wigner's surmise for unitary symmetry, ``32 / pi^2 s^2 exp(-4 s^2 / pi)``."""
    s = np.asarray(s, np.float64)
    return 32 / np.pi**2 * s**2 * np.exp(-4 * s**2 / np.pi)


def wigner_entropy() -> float:
    """Entropy of Wigner's surmise in closed form, 0.5288 nats.

    A Maxwell law of scale ``a = sqrt(pi / 8)`` has entropy ``ln(a sqrt(2 pi)) + gamma - 1/2``.
    """
    return float(np.log(np.sqrt(np.pi / 8) * np.sqrt(2 * np.pi)) + np.euler_gamma - 0.5)


def sample_gaps(
    rng: np.random.Generator, chains: int, length: int, context: int = 32
) -> Float64[np.ndarray, "chains length"]:
    """Samples gaps one after the other from their exact law given the last ``context``.

    The first ``context + 1`` gaps of a chain have exactly the joint law of the sine process, seen
    from a point of it; later ones forget what lies further back (0.002 nats a gap at 32).
    """
    out = np.empty((chains, length))
    for n in range(length):
        out[:, n] = conditional(out[:, max(0, n - context) : n]).sample(rng)
    return out
