"""Mixture densities against scipy, quadrature and their own definitions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from latent_jax.ops import mdn

FAMILIES = ("gaussian", "truncated", "lognormal")
MIXTURE = mdn.Mixture(
    jnp.log(jnp.array([0.5, 0.3, 0.2])), jnp.array([0.2, 1.0, -0.4]), jnp.array([0.3, 0.1, 0.6])
)


def peer(family):
    """The same mixture of scipy's distributions."""
    parts = []
    for m, s in zip(np.asarray(MIXTURE.mean), np.asarray(MIXTURE.scale), strict=True):
        parts.append({
            "gaussian": stats.norm(m, s),
            "truncated": stats.truncnorm(-m / s, np.inf, m, s),
            "lognormal": stats.lognorm(s, scale=np.exp(m)),
        }[family])  # fmt: skip
    return np.exp(np.asarray(MIXTURE.log_weight)), parts


@pytest.mark.parametrize("family", FAMILIES)
def test_density_distribution_and_moments_equal_scipy(family):
    w, parts = peer(family)
    x = np.linspace(0.05, 4, 60)
    density = sum(a * p.pdf(x) for a, p in zip(w, parts, strict=True))
    below = sum(a * p.cdf(x) for a, p in zip(w, parts, strict=True))
    np.testing.assert_allclose(mdn.log_prob(MIXTURE, x, family), np.log(density), atol=1e-4)
    np.testing.assert_allclose(mdn.cdf(MIXTURE, x, family), below, atol=1e-5)
    mean = sum(a * p.mean() for a, p in zip(w, parts, strict=True))
    second = sum(a * (p.var() + p.mean() ** 2) for a, p in zip(w, parts, strict=True))
    np.testing.assert_allclose(
        mdn.moments(MIXTURE, family), (mean, second - mean**2), rtol=1e-4
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_quantiles_invert_the_distribution(family):
    p = jnp.array([0.001, 0.1, 0.5, 0.9, 0.999])
    x = mdn.quantile(MIXTURE, p, family)
    np.testing.assert_allclose(mdn.cdf(MIXTURE, x, family), p, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_follow_the_distribution(family):
    x = mdn.sample(jax.random.key(0), MIXTURE, (4000,), family)
    assert stats.kstest(np.asarray(mdn.cdf(MIXTURE, x, family)), "uniform").pvalue > 1e-3


def test_crps_is_the_integral_of_its_definition():
    w, parts = peer("gaussian")
    for x in (-0.5, 0.3, 2.0):
        def gap(t, x=x):
            return (sum(a * p.cdf(t) for a, p in zip(w, parts, strict=True)) - (t >= x)) ** 2

        value = integrate.quad(gap, -5, x)[0] + integrate.quad(gap, x, 6)[0]
        np.testing.assert_allclose(mdn.crps(MIXTURE, x), value, atol=1e-5)


@pytest.mark.parametrize("family", ["gaussian", "lognormal"])
def test_entropy_is_the_mean_of_minus_log_density(family):
    w, parts = peer(family)

    def integrand(x):
        p = sum(a * q.pdf(x) for a, q in zip(w, parts, strict=True))
        return -p * np.log(p) if p > 0 else 0.0

    low = -4 if family == "gaussian" else 1e-6
    value = integrate.quad(integrand, low, 12, limit=400, points=[0.2, 1.0, 2.7])[0]
    np.testing.assert_allclose(mdn.entropy(MIXTURE, family), value, atol=3e-3)
    one = mdn.Mixture(jnp.zeros(1), jnp.array([0.3]), jnp.array([0.7]))
    np.testing.assert_allclose(mdn.entropy(one), stats.norm(0.3, 0.7).entropy(), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_outliers_and_tiny_scales_have_finite_values_and_gradients(family):
    def loss(raw, x):
        return mdn.log_prob(mdn.from_raw(raw, floor=1e-3), x, family)

    raw = jnp.array([3.0, -3.0, 0.9, 1.1, -30.0, -30.0])
    for x in (1e-3, 0.95, 1.05, 1.2, 50.0):
        value, grad = jax.value_and_grad(loss)(raw, x)
        assert np.isfinite(value) and np.isfinite(grad).all(), (family, x)


def test_outside_the_support_the_density_is_zero_without_nan_gradients():
    def loss(mean):
        mixture = MIXTURE._replace(mean=mean)
        return jnp.exp(mdn.log_prob(mixture, jnp.array([-1.0, 0.5]), "lognormal")).sum()

    assert mdn.log_prob(MIXTURE, -1.0, "truncated") == -jnp.inf
    assert np.isfinite(jax.grad(loss)(MIXTURE.mean)).all()


def test_leading_axes_broadcast():
    wide = mdn.Mixture(*(jnp.broadcast_to(x, (4, 1, 3)) for x in MIXTURE))
    x = jnp.ones((4, 5))
    for value in (mdn.log_prob(wide, x), mdn.cdf(wide, x), mdn.crps(wide, x)):
        assert value.shape == (4, 5)
    assert mdn.sample(jax.random.key(0), wide, (2,)).shape == (2, 4, 1)
    assert mdn.entropy(wide).shape == (4, 1)
