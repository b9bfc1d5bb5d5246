"""Calibration: the process of known optimum, gaps set apart from training."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from latent_jax import run as runs
from latent_jax.core.errors import ConfigError
from latent_jax.ops import mdn
from latent_jax.systems.spacing import calibration, recipe
from latent_jax.systems.spacing.config import SpacingDataConfig

SIGMA = 0.2


def overconfident(n=4000, stretch=1.0, width=1.0, flatten=1.0):
    """Draws of two-component mixtures, and the mixtures made too sure."""
    rng = np.random.default_rng(0)
    centre = 1 + 0.3 * rng.normal(size=(n, 1))
    mean = jnp.asarray(centre + SIGMA * np.array([-1.0, 1.5]), jnp.float32)
    weight = jnp.log(jnp.broadcast_to(jnp.asarray([0.7, 0.3]), (n, 2)))
    true = mdn.Mixture(weight, mean, jnp.full((n, 2), SIGMA))
    truth = mdn.sample(jax.random.key(0), true)
    return true, truth, mdn.temper(true, 1 / stretch, 1 / width, 1 / flatten)


def test_ones_change_nothing_and_the_mean_stays():
    true, _, sure = overconfident(8, 1.3, 1.5, 0.6)
    for a, b in zip(mdn.temper(true), true, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    # Tempering keeps the mixture's mean, whatever the weights become.
    moved = mdn.temper(true, 2.0, 0.5, 1.0)
    np.testing.assert_allclose(mdn.moments(moved)[0], mdn.moments(true)[0], atol=1e-5)


@pytest.mark.parametrize("factors", [(1.0, 1.6), (1.3, 1.2)])
def test_the_factors_of_a_known_process_are_found(factors):
    true, truth, sure = overconfident(4000, *factors)
    found = calibration.fit(sure, truth)
    stretch, width, flatten = np.exp(np.asarray(found))
    assert stretch == pytest.approx(factors[0], abs=0.08)
    assert stretch * width == pytest.approx(factors[0] * factors[1], abs=0.08)
    assert flatten == pytest.approx(1.0, abs=0.15)
    after = found.apply(sure)
    nll = [float(-mdn.log_prob(m, truth).mean()) for m in (true, sure, after)]
    # Three numbers on 4000 targets: 1.5 / 4000 nats are to be expected.
    assert nll[1] - nll[0] > 0.02 and abs(nll[2] - nll[0]) < 1.5e-3
    below = [stats.kstest(np.asarray(mdn.cdf(m, truth)), "uniform").pvalue for m in (sure, after)]
    assert below[0] < 1e-4 and below[1] > 0.01


def test_what_is_calibrated_is_left_alone():
    true, truth, _ = overconfident()
    for factor in calibration.fit(true, truth):
        assert abs(float(factor)) < 0.1


@pytest.mark.parametrize("split", ["tail", "interleaved"])
def test_gaps_set_apart_are_neither_trained_on_nor_validated(split):
    config = SpacingDataConfig("nowhere", "ar:count=6000,seed=0", 24, split=split, calibration=0.1)
    gaps = recipe.load(config)
    used = {
        name: set((starts[:, None] + np.arange(24)).ravel())
        for name, starts in vars(gaps).items()
        if name in ("train", "validation", "calibration")
    }
    assert not used["calibration"] & (used["train"] | used["validation"])
    assert len(used["calibration"]) == pytest.approx(0.09 * 6000, rel=0.1)
    if split == "tail":
        assert max(used["train"]) < min(used["calibration"])
        assert max(used["calibration"]) < min(used["validation"])


def test_only_gaussian_mixtures_are_calibrated():
    tree = {"system": "spacing", "data": {"calibration": 0.1}}
    with pytest.raises(ConfigError, match="calibration=0.1 needs model.head.family=gaussian"):
        runs.resolve(tree | {"model": {"head": {"family": "truncated"}}})
