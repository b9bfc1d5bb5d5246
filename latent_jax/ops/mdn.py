"""Mixture densities over the real line: log-probability, CDF, quantiles, moments, CRPS, entropy.

Components are Gaussian, Gaussian truncated to positive numbers, or log-normal (``mean`` and
``scale`` are then those of the logarithm). All functions broadcast over leading axes, stay finite
for outliers of 50 scales, and have finite gradients there.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr, logsumexp, ndtr
from jax.scipy.stats import norm
from jaxtyping import Array, Float

Family = Literal["gaussian", "truncated", "lognormal"]


class Mixture(NamedTuple):
    """``K`` components along the last axis.

    Attributes:
      log_weight: normalised log-weights.
      mean: location of each component (of the logarithm for ``lognormal``).
      scale: its standard deviation before truncation, positive.
    """

    log_weight: Float[Array, "*b k"]
    mean: Float[Array, "*b k"]
    scale: Float[Array, "*b k"]


def from_raw(
    raw: Float[Array, "*b 3k"], floor: float = 1e-3, positive_mean: bool = False
) -> Mixture:
    """A network's output as a mixture: softmax weights, softplus scales above ``floor``.

    Args:
      raw: ``K`` logits, ``K`` locations, ``K`` raw scales, concatenated.
      floor: smallest scale; the likelihood of a point mass is unbounded without one.
      positive_mean: locations go through a softplus.
    """
    logits, mean, scale = jnp.split(raw, 3, axis=-1)
    if positive_mean:
        mean = jax.nn.softplus(mean)
    return Mixture(jax.nn.log_softmax(logits, axis=-1), mean, jax.nn.softplus(scale) + floor)


def _positive(x: Array, family: Family) -> tuple[Array, Array]:
    """``x`` where the family's density is positive (a harmless 1 elsewhere), and where that is."""
    inside = jnp.ones(x.shape, bool) if family == "gaussian" else x > 0
    return jnp.where(inside, x, 1.0), inside


def log_prob(
    mixture: Mixture, x: Float[Array, "*b"], family: Family = "gaussian"
) -> Float[Array, "*b"]:
    """Log-density at ``x`` (nats); minus infinity outside the family's support."""
    x, inside = _positive(jnp.asarray(x)[..., None], family)
    w, m, s = mixture
    if family == "lognormal":
        parts = norm.logpdf(jnp.log(x), m, s) - jnp.log(x)
    elif family == "truncated":
        parts = norm.logpdf(x, m, s) - log_ndtr(m / s)
    else:
        parts = norm.logpdf(x, m, s)
    return jnp.where(inside[..., 0], logsumexp(w + parts, axis=-1), -jnp.inf)


def cdf(
    mixture: Mixture, x: Float[Array, "*b"], family: Family = "gaussian"
) -> Float[Array, "*b"]:
    """Probability of at most ``x``: the probability integral transform of observations."""
    x, inside = _positive(jnp.asarray(x)[..., None], family)
    w, m, s = mixture
    if family == "truncated":
        # P(X > x | X > 0) in logarithms: both tails may be far out.
        parts = -jnp.expm1(log_ndtr((m - x) / s) - log_ndtr(m / s))
    else:
        parts = ndtr(((jnp.log(x) if family == "lognormal" else x) - m) / s)
    return jnp.where(inside[..., 0], jnp.sum(jnp.exp(w) * parts, axis=-1), 0.0)


def quantile(
    mixture: Mixture, p: Float[Array, "*b"], family: Family = "gaussian", steps: int = 60
) -> Float[Array, "*b"]:
    """Inverse of `cdf` by bisection; not differentiated.

    Args:
      mixture: the mixture.
      p: probabilities in (0, 1).
      family: of its components.
      steps: halvings of a bracket of ten scales around the outermost components.
    """
    _, m, s = jax.lax.stop_gradient(mixture)
    low, high = jnp.min(m - 10 * s, axis=-1), jnp.max(m + 10 * s, axis=-1)
    if family == "truncated":
        low, high = jnp.zeros_like(low), jnp.maximum(high, 10 * jnp.max(s, axis=-1))
    shape = jnp.broadcast_shapes(low.shape, jnp.shape(p))
    low, high = jnp.broadcast_to(low, shape), jnp.broadcast_to(high, shape)
    point = jnp.exp if family == "lognormal" else lambda x: x
    frozen = jax.lax.stop_gradient(mixture)

    def halve(_, bracket):
        low, high = bracket
        middle = (low + high) / 2
        below = cdf(frozen, point(middle), family) < p
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    low, high = jax.lax.fori_loop(0, steps, halve, (low, high))
    return point((low + high) / 2)


def sample(
    key: jax.Array, mixture: Mixture, shape: tuple[int, ...] = (), family: Family = "gaussian"
) -> Float[Array, "*shape"]:
    """Independent draws, ``shape`` before the mixture's own leading axes."""
    pick, draw = jax.random.split(key)
    w, m, s = mixture
    batch = (*shape, *w.shape[:-1])
    chosen = jax.random.categorical(pick, w, shape=batch)[..., None]
    m, s = (
        jnp.take_along_axis(jnp.broadcast_to(x, (*batch, w.shape[-1])), chosen, -1)[..., 0]
        for x in (m, s)
    )
    if family == "truncated":
        return m + s * jax.random.truncated_normal(draw, -m / s, jnp.inf, batch)
    x = m + s * jax.random.normal(draw, batch)
    return jnp.exp(x) if family == "lognormal" else x


def moments(
    mixture: Mixture, family: Family = "gaussian"
) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
    """Mean and variance of the mixture."""
    w, m, s = mixture
    if family == "lognormal":
        first = jnp.exp(m + s**2 / 2)
        second = jnp.exp(2 * m + 2 * s**2)
    elif family == "truncated":
        hazard = jnp.exp(norm.logpdf(m / s) - log_ndtr(m / s))
        first = m + s * hazard
        second = s**2 * (1 - hazard * (m / s + hazard)) + first**2
    else:
        first, second = m, m**2 + s**2
    weight = jnp.exp(w)
    mean = jnp.sum(weight * first, axis=-1)
    return mean, jnp.sum(weight * second, axis=-1) - mean**2


def temper(
    mixture: Mixture,
    stretch: Float[Array, ""] | float = 1.0,
    width: Float[Array, ""] | float = 1.0,
    flatten: Float[Array, ""] | float = 1.0,
) -> Mixture:
    """A Gaussian mixture made less sure of itself, around the same mean; ones change nothing.

    Args:
      mixture: the mixture.
      stretch: factor on the distance of everything from the mean: locations and scales.
      width: further factor on the scales.
      flatten: exponent of the weights, the mean they give being kept; below 1 they become even.
    """
    w, m, s = mixture
    centre = jnp.sum(jnp.exp(w) * m, axis=-1, keepdims=True)
    w = jax.nn.log_softmax(flatten * w, axis=-1)
    off = m - jnp.sum(jnp.exp(w) * m, axis=-1, keepdims=True)
    return Mixture(w, centre + stretch * off, stretch * width * s)


def crps(mixture: Mixture, x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """Continuous ranked probability score of a Gaussian mixture, in closed form.

    Grimit et al. 2006, eq. 4: ``sum_i w_i A(x - m_i, s_i^2)
    - 1/2 sum_ij w_i w_j A(m_i - m_j, s_i^2 + s_j^2)``, where
    ``A(m, v) = 2 sqrt(v) phi(m / sqrt(v)) + m (2 Phi(m / sqrt(v)) - 1)`` is the mean absolute value
    of a Gaussian.
    """
    w, m, s = mixture
    w = jnp.exp(w)

    def absolute(m: Array, v: Array) -> Array:
        d = jnp.sqrt(v)
        return 2 * d * norm.pdf(m / d) + m * (2 * ndtr(m / d) - 1)

    apart = absolute(jnp.asarray(x)[..., None] - m, s**2)
    own = absolute(m[..., :, None] - m[..., None, :], (s**2)[..., :, None] + (s**2)[..., None, :])
    spread = jnp.einsum("...i,...j,...ij->...", w, w, own)
    return jnp.sum(w * apart, axis=-1) - spread / 2


@functools.cache
def _hermite(nodes: int) -> tuple[np.ndarray, np.ndarray]:
    x, w = np.polynomial.hermite_e.hermegauss(nodes)
    return x.astype(np.float32), (w / w.sum()).astype(np.float32)


def entropy(
    mixture: Mixture, family: Family = "gaussian", nodes: int = 48
) -> Float[Array, "*b"]:
    """Differential entropy (nats) by Gauss-Hermite quadrature under each component.

    Exact for one component; for several the integrand is smooth: 48 nodes are good to about 1e-3.

    Raises:
      ValueError: truncated components, whose tails the quadrature does not know.
    """
    if family == "truncated":
        raise ValueError("entropy: not available for truncated components")
    x, weight = _hermite(nodes)
    w, m, s = mixture
    at = m[..., None] + s[..., None] * x  # *b k n
    if family == "lognormal":
        at = jnp.exp(at)
    wide = Mixture(*(jnp.expand_dims(p, (-2, -3)) for p in mixture))
    return -jnp.einsum("...k,...kn,n->...", jnp.exp(w), log_prob(wide, at, family), weight)
