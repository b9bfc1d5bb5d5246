"""The exact law of random-matrix gaps against closed forms, published values and matrices."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.polynomial import legendre

from latent_jax.core.errors import DataError
from latent_jax.data import random_matrix
from latent_jax.systems.spacing import limits

NOTHING = np.empty((1, 0))


@pytest.fixture(scope="module")
def gaps():
    """Gaps of random matrices: one row per matrix."""
    values, run = random_matrix.cue(n=96, count=96 * 60, seed=3)
    return values.reshape(-1, run)


def histories(gaps, k, every=1):
    windows = np.lib.stride_tricks.sliding_window_view(gaps, k + 1, axis=1)[:, ::every]
    return windows.reshape(-1, k + 1)


def nodes(n=48, stop=limits.SPAN):
    t, w = legendre.leggauss(n)
    return (t + 1) * stop / 2, w * stop / 2


def test_gaudin_has_its_known_moments_and_small_gap_law():
    law = limits.conditional(NOTHING)
    assert law.mean()[0] == pytest.approx(1, abs=1e-12)
    # Mehta 2004, table of the unitary spacing law's moments: variance 0.17999387…
    assert law.variance()[0] == pytest.approx(0.1799938776, abs=1e-9)
    s = np.array([1e-3, 3e-3, 1e-2])
    expected = np.pi**2 / 3 * s**2 - 2 * np.pi**4 / 45 * s**4
    np.testing.assert_allclose(limits.gaudin_density(s), expected, rtol=1e-5, atol=1e-11)


def test_gaudin_is_the_second_derivative_of_the_gap_probability():
    # E(0; s) = det(1 - K) on an interval that starts anywhere; p = E''
    def gap(s):
        t, w = legendre.leggauss(40)
        x, root = s * t / 2, np.sqrt(s * w / 2)
        return np.linalg.det(np.eye(40) - root[:, None] * np.sinc(x[:, None] - x) * root)

    for s in (0.4, 1.0, 2.1):
        h = 1e-3
        second = (gap(s + h) - 2 * gap(s) + gap(s - h)) / h**2
        assert limits.gaudin_density(np.array([s]))[0] == pytest.approx(second, abs=1e-6)


def test_wigner_surmise_is_near_gaudin_and_has_its_closed_entropy():
    s, w = nodes(stop=6.0)
    p = limits.wigner_density(s)
    assert w @ p == pytest.approx(1) and w @ (p * s) == pytest.approx(1)
    assert -w @ (p * np.log(p)) == pytest.approx(limits.wigner_entropy(), abs=1e-7)
    assert limits.wigner_entropy() == pytest.approx(0.5288, abs=5e-5)
    x = np.linspace(0.1, 3, 30)
    assert np.abs(limits.wigner_density(x) - limits.gaudin_density(x)).max() < 0.01


def test_floors_without_sampling():
    """k = 0, 1, 2 by quadrature over all histories: no standard error."""
    assert limits.conditional(NOTHING).entropy()[0] == pytest.approx(limits.FLOOR[0], abs=1e-4)
    s, w = nodes(24, 4.0)
    first = w * limits.gaudin_density(s)
    after_one = first @ limits.conditional(s[:, None]).entropy()
    assert after_one == pytest.approx(limits.FLOOR[1], abs=6e-4)
    a, b = (part.ravel() for part in np.meshgrid(s, s, indexing="ij"))
    pair = np.exp(limits.log_janossy(np.stack([a, b], axis=1))) * np.outer(w, w).ravel()
    assert pair.sum() == pytest.approx(1, abs=1e-4)
    law = limits.conditional(np.stack([a, b], axis=1))
    assert pair @ law.entropy() == pytest.approx(limits.FLOOR[2], abs=6e-4)
    # the marginal of the second gap is the first's law again
    np.testing.assert_allclose(pair.reshape(24, 24).sum(axis=0), first, atol=1e-5)


@pytest.mark.parametrize("k", [1, 3, 8, 32, 60])
def test_the_law_is_normalised_and_agrees_with_the_determinants(gaps, k):
    data = histories(gaps, k, every=7)[:40]
    law = limits.conditional(data[:, :k])
    direct = limits.log_janossy(data) - limits.log_janossy(data[:, :k])
    np.testing.assert_allclose(-law.nll(data[:, k]), direct, atol=1e-8)
    np.testing.assert_allclose(law.survival(np.zeros(len(data))), 1, atol=1e-10)
    s, w = nodes(80)
    p = law.density(s[:, None])
    np.testing.assert_allclose(w @ p, 1, atol=1e-6)
    np.testing.assert_allclose(w @ (p * s[:, None]), law.mean(), atol=1e-5)
    assert (np.diff(law.survival(np.linspace(0, 5, 60)[:, None]), axis=0) < 1e-9).all()


@pytest.mark.parametrize("k", [4, 8, 16, 32])
def test_floors_of_the_specification(gaps, k):
    data = histories(gaps, k, every=max(3, k // 2))[:400]
    entropy = limits.conditional(data[:, :k]).entropy()
    error = entropy.std() / np.sqrt(len(entropy))
    assert error < 0.008
    assert abs(entropy.mean() - limits.FLOOR[k]) < 4 * error


@pytest.mark.slow
@pytest.mark.parametrize("k", [4, 8, 16, 32])
def test_floors_of_the_specification_closely(k):
    values, run = random_matrix.cue(n=256, count=256 * 60, seed=11)
    data = histories(values.reshape(-1, run), k, every=4)
    law = limits.conditional(data[:, :k])
    entropy = law.entropy().reshape(60, -1).mean(axis=1)  # histories of a matrix overlap
    error = entropy.std() / np.sqrt(60)
    assert error < 0.003 and abs(entropy.mean() - limits.FLOOR[k]) < 4 * error
    if k == 32:
        assert law.expected_crps().mean() == pytest.approx(0.219, abs=0.008)
        assert law.crps(data[:, k]).mean() == pytest.approx(0.219, abs=0.008)


def test_nothing_beats_the_floor_and_the_pit_is_uniform(gaps):
    data = histories(gaps, 8, every=8)[:600]
    law = limits.conditional(data[:, :8])
    observed = data[:, 8]
    pit = law.cdf(observed)
    assert np.abs(np.sort(pit) - (np.arange(600) + 0.5) / 600).max() < 1.63 / np.sqrt(600)
    difference = limits.conditional(data[:, 7:8]).nll(observed) - law.nll(observed)
    assert difference.mean() > 2 * difference.std() / np.sqrt(600)  # more history, better
    honest = law.nll(observed) - law.entropy()
    assert abs(honest.mean()) < 4 * honest.std() / np.sqrt(600)


def test_crps_is_its_integral(gaps):
    data = histories(gaps, 3)[:5]
    law = limits.conditional(data[:, :3])
    x = np.linspace(0, limits.SPAN, 20_001)
    step = (x[:, None] >= data[:, 3]).astype(float)
    direct = np.trapezoid((law.cdf(x[:, None]) - step) ** 2, x, axis=0)
    np.testing.assert_allclose(law.crps(data[:, 3]), direct, atol=5e-4)
    expected = np.trapezoid(law.cdf(x[:, None]) * law.survival(x[:, None]), x, axis=0)
    np.testing.assert_allclose(law.expected_crps(), expected, atol=1e-7)


def test_the_sampler_draws_from_the_process():
    got = limits.sample_gaps(np.random.default_rng(0), chains=300, length=4, context=3)
    # every gap has Gaudin's law whatever its place: mean 1, standard deviation 0.424
    assert np.abs(got.mean(axis=0) - 1).max() < 4 * 0.4243 / np.sqrt(300)
    assert np.abs(got.std(axis=0) - 0.4243).max() < 0.07
    found = np.corrcoef(got[:, :-1].ravel(), got[:, 1:].ravel())[0, 1]
    # exactly: E s_1 s_2 = int s p(s) E[s_2 | s_1 = s]
    s, w = nodes()
    weight = w * limits.gaudin_density(s)
    product = weight @ (s * limits.conditional(s[:, None]).mean())
    exact = (product - 1) / (weight @ s**2 - 1)
    assert exact == pytest.approx(-0.308, abs=1e-3)
    assert found == pytest.approx(exact, abs=0.1)
    law = limits.conditional(np.array([[1.0, 0.4]] * 3))
    p = np.array([0.01, 0.5, 0.99])
    np.testing.assert_allclose(law.cdf(law.quantile(p)), p, atol=1e-9)


def test_scores_of_the_floor_on_given_targets(gaps):
    values, at = gaps.ravel(), np.array([5, 40, 90])
    scores, entropy = limits.floor_scores(values, at, 4)
    for i, n in enumerate(at):
        law = limits.conditional(values[None, n - 4 : n])
        assert scores.nll[i] == pytest.approx(law.nll(values[n : n + 1])[0])
        assert scores.crps[i] == pytest.approx(law.crps(values[n : n + 1])[0])
        assert scores.pit[i] == pytest.approx(law.cdf(values[n : n + 1])[0])
        assert entropy[i] == pytest.approx(law.entropy()[0])
    alone, same = limits.floor_scores(values, at, 0)
    np.testing.assert_allclose(alone.nll, -np.log(limits.gaudin_density(values[at])))
    assert same.shape == (3,) and same[0] == pytest.approx(limits.FLOOR[0], abs=1e-4)
    for bad in ([3], [len(values)]):
        with pytest.raises(DataError, match="targets must lie in"):
            limits.floor_scores(values, np.array(bad), 4)
