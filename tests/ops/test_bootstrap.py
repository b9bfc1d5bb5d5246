"""Bootstrap intervals against closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from latent_jax.ops import bootstrap


def test_mean_interval_matches_the_normal_approximation():
    x = np.random.default_rng(1).normal(3.0, 2.0, size=2000)
    low, high = bootstrap.mean_interval(x, resamples=4000)
    half = 1.96 * x.std() / np.sqrt(len(x))
    assert low == pytest.approx(x.mean() - half, abs=0.02)
    assert high == pytest.approx(x.mean() + half, abs=0.02)


def test_interval_is_seeded_and_degenerates_gracefully():
    x = np.arange(10.0)
    assert bootstrap.mean_interval(x, seed=3) == bootstrap.mean_interval(x, seed=3)
    assert bootstrap.mean_interval(x, seed=3) != bootstrap.mean_interval(x, seed=4)
    assert bootstrap.mean_interval(np.full(5, 0.5)) == (0.5, 0.5)
    assert np.isnan(bootstrap.mean_interval(np.zeros(0))).all()


def test_paired_difference_is_narrower_than_unpaired():
    rng = np.random.default_rng(0)
    shared = rng.normal(size=500)
    low, high = bootstrap.difference_interval(shared + 0.1, shared)
    assert (low, high) == pytest.approx((0.1, 0.1))
    with pytest.raises(ValueError, match="equal shapes"):
        bootstrap.difference_interval(shared, shared[:3])


def test_ratio_of_means_is_not_a_mean_of_ratios():
    a, b = np.array([1.0, 0.0, 1.0, 0.0] * 50), np.array([1.0, 1.0, 0.0, 2.0] * 50)
    low, high = bootstrap.ratio_interval(a, b)
    assert low < 0.5 < high
    assert bootstrap.ratio_interval(2 * b, b) == pytest.approx((2.0, 2.0))
    assert np.isnan(bootstrap.ratio_interval(a, np.zeros_like(a))).all()


def test_clusters_are_drawn_whole():
    """Copies of an example say nothing new: the interval is that of the examples themselves."""
    x = np.random.default_rng(2).normal(size=12)
    alone = bootstrap.mean_interval(x)
    copies, which = np.repeat(x, 50), np.repeat(np.arange(12), 50)
    assert bootstrap.mean_interval(copies, clusters=which) == pytest.approx(alone)
    low, high = bootstrap.mean_interval(copies)
    assert high - low < 0.3 * (alone[1] - alone[0])
    shifted = bootstrap.difference_interval(copies + 1, np.zeros(600), clusters=which[::-1])
    assert shifted == pytest.approx((alone[0] + 1, alone[1] + 1), abs=0.2)
    uneven = bootstrap.ratio_interval(np.arange(4.0), np.ones(4), clusters=np.array([0, 0, 0, 1]))
    assert uneven == pytest.approx((1.0, 3.0))
    assert np.isnan(bootstrap.mean_interval(x, clusters=np.zeros(12))).all()


def test_token_weighted_mean():
    correct, count = np.array([3.0, 1.0] * 100), np.array([4.0, 4.0] * 100)
    low, high = bootstrap.mean_interval(correct, count)
    assert low < 0.5 < high and high - low < 0.1


def test_chunking_does_not_change_the_paired_columns(monkeypatch):
    x = np.arange(12.0).reshape(6, 2)
    whole = bootstrap.resampled_sums(x, 50, seed=1)
    monkeypatch.setattr(bootstrap, "_CHUNK_ELEMENTS", 1)
    np.testing.assert_allclose(bootstrap.resampled_sums(x, 50, seed=1), whole)
