"""Warped kernels: partition of unity, causality, scale with height, least squares."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.interpolate import BSpline

from latent_jax.systems.spacing import kernels, start


def test_splines_are_scipys_and_end_at_their_reach():
    step = 10.0 / 22
    at = np.linspace(0, 11, 57)
    for k in (0, 7, 20):
        whole = BSpline.basis_element((np.arange(5) + k - 2) * step, extrapolate=False)
        got = kernels.basis(jnp.asarray(at), 21, 10.0)[:, k]
        np.testing.assert_allclose(got, np.nan_to_num(whole(at)), atol=1e-5)
    # A partition of unity where four of them meet; nothing from the reach on.
    inside = (at >= step) & (at <= 19 * step)
    found = np.asarray(kernels.basis(jnp.asarray(at), 21, 10.0).sum(-1))
    np.testing.assert_allclose(found[inside], 1, rtol=1e-5)
    assert found[at < 10].min() > 0 and not found[at >= 10].any()


def test_lagged_by_hand():
    got = kernels.lagged(jnp.asarray([[1.0, 2.0, 3.0]]), 2)
    np.testing.assert_array_equal(got, [[[1, 0], [2, 1], [3, 2]]])


def test_a_summary_is_a_weighted_sum_of_the_past():
    rng = np.random.default_rng(0)
    x, c = rng.normal(size=(2, 9)), rng.normal(size=(12, 3))
    height = np.asarray([6.0, 9.0])
    past = kernels.lagged(jnp.asarray(x), 9)
    got = kernels.summarise(past, jnp.asarray(c), jnp.asarray(height), 10.0)
    j = np.arange(1, 10)
    for b in range(2):
        h = np.asarray(kernels.basis(jnp.asarray(2 * np.pi * j / height[b]), 12, 10.0)) @ c
        for t in range(9):
            want = sum(h[k] * x[b, t - k] for k in range(t + 1))
            np.testing.assert_allclose(got[b, t], want, rtol=1e-4, atol=1e-5)


def test_the_same_physical_filter_serves_every_height():
    c = jnp.asarray(kernels.prime_lines(1, 400, 40.0))
    for height in (5.0, 10.0):
        # One gap off at lag 10: the filter answers with its value at that physical distance.
        past = jnp.zeros((1, 1, 20)).at[0, 0, 9].set(1.0)
        got = kernels.summarise(past, c, jnp.asarray([height]), 40.0)[0, 0]
        d = 2 * np.pi * 10 / height
        want = np.cos(np.pi * d / 80) ** 2 * np.cos(np.log(2) * d)
        assert float(got[0]) == pytest.approx(want, abs=5e-3)


def test_least_squares_finds_the_autoregression():
    rng = np.random.default_rng(0)
    e, s = rng.normal(size=(16000, 60)) * 0.1, np.zeros((16000, 60))
    for t in range(2, 60):
        s[:, t] = 0.5 * s[:, t - 1] - 0.3 * s[:, t - 2] + e[:, t]
    height = np.full(16000, 2 * np.pi)  # distance = lag
    fit = start.least_squares(1 + s[:, 40:], height, 20, 19.0, ridge=1e-7)
    at = np.asarray(kernels.basis(jnp.arange(1.0, 6.0), 20, 19.0)) @ fit.kernels[0]
    np.testing.assert_allclose(at, [0.5, -0.3, 0, 0, 0], atol=0.03)
    assert fit.sigma == pytest.approx(0.1, rel=0.03)


def test_channels_are_products_of_centred_displacements():
    rng = np.random.default_rng(0)
    lags, x = 5, rng.normal(size=(2, 9)).astype(np.float32)
    past, *second = (np.asarray(c) for c in kernels.channels(jnp.asarray(x), lags, 3))
    for t in range(9):
        seen = min(t + 1, lags)
        back = x[:, t::-1][:, :seen]
        np.testing.assert_allclose(past[:, t, :seen], back, rtol=1e-6)
        # Zero j back lies cumsum(back)[j] off the grid that starts at the present zero.
        off = np.concatenate([np.zeros((2, 1)), np.cumsum(back, 1)], axis=1)
        hann = np.hanning(seen + 3)[1:-1]
        off = (off - (off @ hann / hann.sum())[:, None])[:, 1:]
        for k, got in enumerate(second):
            want = np.zeros((2, lags))
            want[:, : max(seen - k, 0)] = off[:, : max(seen - k, 0)] * off[:, k:]
            np.testing.assert_allclose(got[:, t], want, atol=2e-5)


def test_least_squares_finds_a_second_order_term():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(8000, 7)).astype(np.float32) * 0.3
    channels = kernels.channels(jnp.asarray(x[:, :6]), 6, 2)
    last = [np.asarray(c)[:, -1] for c in channels]
    x[:, 6] = 0.4 * last[0][:, 0] - 0.8 * last[2][:, 1] + 0.01 * x[:, 6]
    height = np.full(8000, 2 * np.pi)
    linear = start.least_squares(1 + x, height, 8, 7.0)
    fit = start.least_squares(1 + x, height, 8, 7.0, products=2)
    at = np.asarray(kernels.basis(jnp.arange(1.0, 7.0), 8, 7.0)) @ fit.kernels.T
    np.testing.assert_allclose(at[:, 0], [0.4, 0, 0, 0, 0, 0], atol=0.01)
    # The farthest displacement has no neighbour in the window: its product is nothing, and free.
    np.testing.assert_allclose(at[:5, 2], [0, -0.8, 0, 0, 0], atol=0.02)
    assert fit.sigma < 0.01 < linear.sigma


def test_prime_powers():
    assert kernels.prime_powers(8).tolist() == [2, 3, 4, 5, 7, 8, 9, 11]


def test_as_long_a_past_at_another_height():
    # At L = 10 ten gaps end at the reach; at 20 they are half as long, at 5 twice.
    reach = 2 * np.pi
    got = kernels.equivalent(np.arange(1, 11), jnp.asarray([10.0, 20.0, 5.0]), 10, reach)
    assert got[0].tolist() == list(range(1, 11))
    assert got[1].tolist() == [1, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    assert got[2].tolist() == [2, 4, 6, 8, 10, 10, 10, 10, 10, 10]
