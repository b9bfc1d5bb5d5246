"""Linear baselines: exact sums, known optima, and the published scores on the zeros."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latent_jax.core.errors import DataError
from latent_jax.core.fetch import cached
from latent_jax.data import Spacings, load_spacings
from latent_jax.data.synthetic import optimum
from latent_jax.data.windows import split_interleaved, split_tail, window_starts
from latent_jax.ops import mdn
from latent_jax.systems.spacing import autoregression as ar
from latent_jax.systems.spacing import baselines
from latent_jax.systems.spacing.predictions import Prediction, score


def rows(x, targets, order):
    return np.stack([x[targets - j] for j in range(1, order + 1)], axis=1)


@given(st.integers(1, 9), st.integers(0, 5), st.integers(1, 30), st.integers(0, 99))
def test_lagged_sums_are_those_of_the_design_matrix(order, extra, count, seed):
    x = np.random.default_rng(seed).standard_normal(60)
    start = order + extra
    found = ar._lagged(x, start, start + count, order)
    at = np.arange(start, start + count)
    design = rows(x, at, order)
    assert found.count == count
    np.testing.assert_allclose(found.gram, design.T @ design, atol=1e-10)
    np.testing.assert_allclose(found.cross, design.T @ x[at], atol=1e-10)
    np.testing.assert_allclose(found.past, design.sum(axis=0), atol=1e-10)
    np.testing.assert_allclose([found.total, found.square], [x[at].sum(), x[at] @ x[at]])


def test_linear_fit_is_least_squares_over_several_ranges_and_runs():
    spacings = load_spacings("ar:count=900,seed=2")._replace(run=300)
    split = split_interleaved(900, 9, 0.3)
    at = ar.targets(split.train, 20, 300)
    starts = window_starts(split.train, 20, run=300)
    assert at.tolist() == (starts + 19).tolist()
    design = np.column_stack([np.ones(len(at)), rows(spacings.values - 1, at, 5)])
    expected, residual, *_ = np.linalg.lstsq(design, spacings.values[at] - 1, rcond=None)
    model = ar.fit_linear(spacings, split.train, 5, window=20)
    np.testing.assert_allclose([model.intercept, *model.weights], expected, atol=1e-8)
    assert model.sigma == pytest.approx(np.sqrt(residual[0] / len(at)))
    got = model.predict(spacings, at)
    np.testing.assert_allclose(got.mean, 1 + design @ expected, atol=1e-8)
    last = ar.fit_linear(spacings, split.train, 5, window=20, recent=100)
    tail, *_ = np.linalg.lstsq(design[-100:], spacings.values[at[-100:]] - 1, rcond=None)
    np.testing.assert_allclose(last.weights, tail[1:], atol=1e-8)


def test_a_known_process_is_found_and_scored_at_its_optimum():
    source = "ar:phi=0.5/-0.3,sigma=0.2,count=60000,seed=1"
    spacings = load_spacings(source)
    split = split_tail(60_000, 0.3)
    model = ar.fit_linear(spacings, split.train, 3, window=16)
    np.testing.assert_allclose(model.weights, [0.5, -0.3, 0], atol=0.02)
    assert model.sigma == pytest.approx(0.2, abs=0.002)
    at = ar.targets(split.validation, 16, spacings.run)
    scores = score(model.predict(spacings, at), spacings.values[at])
    error = scores.nll.std() / np.sqrt(len(at))
    assert abs(scores.nll.mean() - optimum(source)) < 4 * error
    # CRPS of a Gaussian under itself: sigma / sqrt(pi)
    assert scores.crps.mean() == pytest.approx(0.2 / np.sqrt(np.pi), rel=0.02)
    assert np.abs(np.sort(scores.pit) - np.linspace(0, 1, len(at))).max() < 0.02


def test_scores_agree_with_the_mixtures_that_models_predict():
    rng = np.random.default_rng(0)
    guess = Prediction(rng.normal(1, 0.3, 50), rng.uniform(0.1, 0.5, 50))
    target = rng.normal(1, 0.4, 50)
    got, mixture = score(guess, target), guess.mixture()
    shared = jax.jit(lambda m, x: (-mdn.log_prob(m, x), mdn.crps(m, x), mdn.cdf(m, x)))
    for mine, theirs in zip((got.nll, got.crps, got.pit), shared(mixture, target), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)


def _response(at):
    return -0.4 * np.cos(3 * at) * np.exp(-at / 4)


@pytest.fixture(scope="module")
def warped():
    """A process whose coefficients follow the height: ``h`` damped, at physical distance."""
    n, order = 20_000, 12
    height = np.linspace(10.0, 12.0, n)
    x = np.zeros(n)
    noise = 0.1 * np.random.default_rng(5).standard_normal(n)
    lag = np.arange(1, order + 1)
    for i in range(order, n):
        at = 2 * np.pi * lag / height[i]
        x[i] = _response(at) @ x[i - lag] + noise[i]
    return Spacings(1 + x, height, n)


def test_warped_fit_follows_the_height(warped):
    split = split_tail(len(warped.values), 0.2)
    model = ar.fit_warped(warped, split.train, 12, window=16, density=1.5)
    at = 2 * np.pi * np.arange(1, 13) / 11.1
    truth = _response(at)
    assert np.abs(model.weights(11.1) - truth).max() < 0.05
    targets = ar.targets(split.validation, 16, warped.run)
    scores = score(model.predict(warped, targets), warped.values[targets])
    plain = ar.fit_linear(warped, split.train, 12, window=16)
    other = score(plain.predict(warped, targets), warped.values[targets])
    best = 0.5 * np.log(2 * np.pi * np.e * 0.1**2)
    assert scores.nll.mean() < best + 0.02 < other.nll.mean()


def test_prediction_never_reads_its_target_or_later(warped):
    targets = np.arange(10_000, 10_050)
    model = ar.fit_warped(warped, np.array([[0, 3000]]), 12, window=16)
    changed = warped.values.copy()
    changed[10_049:] = 9.0
    other = warped._replace(values=changed)
    np.testing.assert_array_equal(
        model.predict(warped, targets).mean, model.predict(other, targets).mean
    )


@pytest.mark.parametrize(
    ("work", "says"),
    [
        (lambda s: ar.fit_linear(s, np.array([[0, 100]]), 16, window=16), "order=16"),
        (lambda s: ar.fit_linear(s, np.array([[0, 30]]), 10, window=16), "too few"),
        (lambda s: ar.fit_warped(s, np.array([[0, 30]]), 10, window=16), "too few"),
        (
            lambda s: ar.fit_warped(s._replace(log_height=s.values * 0), np.array([[0, 99]]), 3),
            "needs gaps with heights",
        ),
        (
            lambda s: ar.fit_linear(s, np.array([[0, 500]]), 4).predict(s, np.array([3])),
            r"must lie in \[4, ",
        ),
    ],
)
def test_refusals(warped, work, says):
    with pytest.raises(DataError, match=says):
        work(warped)


def test_every_position_is_predicted_from_the_past_that_it_has():
    spacings = load_spacings("ar:count=6000,seed=0")
    split = split_tail(6000, 0.1, 4)
    starts = window_starts(split.validation, 4, 4)
    got = baselines.position_averaged(spacings, split, starts, window=4)
    expected = np.zeros(len(starts))
    for position, order in ((1, 1), (2, 2), (3, 2)):
        at = starts + position
        model = ar.fit_linear(spacings, split.train, order, 4, baselines.RECENT)
        expected += score(model.predict(spacings, at), spacings.values[at]).nll / 3
    np.testing.assert_allclose(got, expected, rtol=1e-9)


@pytest.mark.slow
def test_scores_on_the_zeros():
    """The validation tail, last position: the specification's table."""
    if cached("zeros") is None:
        pytest.skip("the table is not in the cache: latent-jax fetch zeros")
    spacings = load_spacings("zeta", window=256)
    split = split_tail(len(spacings.values), 0.1, unit=256)
    at, scores = baselines.baseline_scores(spacings, split)
    assert len(at) == 2_001_051 - 7035 * 256 - 255
    nll = {name: s.nll.mean() for name, s in scores.items()}
    rmse = {name: np.sqrt(s.squared_error.mean()) for name, s in scores.items()}
    table = {"gaudin": (0.503, 0.409), "ar8": (0.379, 0.354), "ar32": (-0.124, 0.213)}
    table |= {"ar128": (-0.225, 0.178), "warped_ar64": (-0.523, 0.143)}
    table |= {"warped_ar255": (-0.940, 0.0945)}
    for name, (first, second) in table.items():
        assert nll[name] == pytest.approx(first, abs=0.006), name
        assert rmse[name] == pytest.approx(second, abs=0.001), name
    assert nll["warped_ar128"] < -0.757
    assert scores["gaudin"].crps.mean() == pytest.approx(0.230, abs=0.001)
