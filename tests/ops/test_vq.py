"""One codebook: assignment, gradients and statistics against hand-computed values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_jax.ops import vq

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 4)).astype(np.float32)
CODE = (RNG.normal(size=(9, 4)) * 2).astype(np.float32)
BIAS = vq.bias_of(jnp.sum(CODE**2, -1))
DISTANCE = ((X[:, None] - CODE) ** 2).sum(-1)


@pytest.mark.parametrize("chunk", [None, 1, 4, 9])
def test_nearest_is_the_squared_euclidean_argmin(chunk):
    found = vq.nearest(X, CODE, BIAS, chunk)
    np.testing.assert_array_equal(found, DISTANCE.argmin(-1))
    low, many = vq.nearest_many(X, CODE, BIAS, 3, chunk)
    np.testing.assert_array_equal(many, DISTANCE.argsort(-1)[:, :3])
    norm = (X**2).sum(-1, keepdims=True)
    np.testing.assert_allclose(2 * low + norm, np.sort(DISTANCE)[:, :3], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [None, 2])
def test_ties_go_to_the_lowest_index(chunk):
    code = jnp.ones((5, 2))
    assert (vq.nearest(jnp.ones((3, 2)), code, vq.bias_of(jnp.full(5, 2.0)), chunk) == 0).all()


def test_cosine_ignores_lengths_and_dead_rows_are_never_chosen():
    code = vq.unit(jnp.asarray(CODE))
    cosine = (X @ np.asarray(code).T).argmax(-1)
    found = vq.nearest(X * 7, code, vq.bias_of(jnp.ones(9), cosine=True))
    np.testing.assert_array_equal(found, cosine)
    live = np.arange(9) < 4
    found = vq.nearest(X, CODE, vq.bias_of(jnp.sum(CODE**2, -1), live))
    np.testing.assert_array_equal(found, DISTANCE[:, :4].argmin(-1))


def test_memory_of_the_scores_is_bounded():
    assert vq.chunk_size(16, 1024) == 1024
    assert vq.chunk_size(2**14, 1024) == 256
    assert vq.chunk_size(2**20, 8192) == 128
    assert vq.chunk_size(2**14, 1024, 512) == 512


@pytest.mark.parametrize("chunk", [None, 2])
def test_samples_follow_the_boltzmann_distribution(chunk):
    code, rows = jnp.asarray([[0.0], [1.0], [2.0]]), 6000
    x = jnp.full((rows, 1), 0.2)
    bias = vq.bias_of(jnp.sum(code**2, -1))
    found = vq.nearest(x, code, bias, chunk, jax.random.key(0), 1.5)
    expected = np.exp(-((0.2 - np.arange(3)) ** 2) / 1.5)
    share = np.bincount(found, minlength=3) / rows
    np.testing.assert_allclose(share, expected / expected.sum(), atol=0.03)
    cold = vq.nearest(x, code, bias, chunk, jax.random.key(0), 0.0)
    assert (cold == 0).all()


def test_soft_codes_approach_the_nearest_and_the_mean():
    cold = vq.soft_codes(X, CODE, BIAS, 1e-3)
    np.testing.assert_allclose(cold, CODE[DISTANCE.argmin(-1)], atol=1e-3)
    hot = vq.soft_codes(X, CODE, BIAS, 1e6)
    np.testing.assert_allclose(hot, np.broadcast_to(CODE.mean(0), hot.shape), atol=1e-3)
    noisy = vq.soft_codes(X, CODE, BIAS, 1.0, jax.random.key(0))
    assert not np.allclose(noisy, vq.soft_codes(X, CODE, BIAS, 1.0))


def test_straight_through_has_the_codes_bits_and_the_identity_jacobian():
    x, q = jnp.asarray(X[0]) * 1e4, jnp.asarray(CODE[0])
    np.testing.assert_array_equal(vq.straight_through(x, q), q)
    np.testing.assert_array_equal(jax.jacobian(vq.straight_through)(x, q), np.eye(4))


def test_rotation_is_orthogonal_up_to_the_ratio_of_lengths():
    x, q = jnp.asarray(X[0]), jnp.asarray(CODE[0])
    np.testing.assert_array_equal(vq.rotate(x, q), q)
    jac = np.asarray(jax.jacobian(vq.rotate)(x, q))
    ratio = np.linalg.norm(q) / np.linalg.norm(x)
    np.testing.assert_allclose(jac @ jac.T, ratio**2 * np.eye(4), atol=1e-4)
    np.testing.assert_allclose(jac @ x, q, atol=1e-5)
    assert np.isfinite(jax.jacobian(vq.rotate)(jnp.zeros(4), q)).all()


@pytest.mark.parametrize("matmul", [False, True])
def test_statistics_by_hand(matmul):
    x = jnp.asarray([[1.0, 2.0], [3.0, 4.0], [np.nan, np.inf], [5.0, 6.0]])
    count, total = vq.statistics(x, jnp.asarray([2, 0, -1, 2]), 3, matmul)
    np.testing.assert_array_equal(count, [1, 0, 2])
    np.testing.assert_array_equal(total, [[3, 4], [0, 0], [6, 8]])


STATISTICS = jax.jit(vq.statistics, static_argnums=2)


@settings(max_examples=15)
@given(st.integers(0, 10_000), st.floats(0.0, 1.0))
def test_statistics_count_every_kept_row_once(seed, kept):
    rng = np.random.default_rng(seed)
    x, index = rng.normal(size=(12, 2)).astype(np.float32), rng.integers(0, 5, 12)
    index = np.where(rng.uniform(size=12) < kept, index, -1)
    count, total = STATISTICS(x, index, 5)
    assert count.sum() == (index >= 0).sum()
    np.testing.assert_allclose(total.sum(0), x[index >= 0].sum(0), atol=1e-5)


def test_smoothing_keeps_the_mass():
    size = jnp.asarray([0.0, 3.0, 1.0, 0.0])
    live = jnp.asarray([True, True, True, False])
    out = vq.smoothed(size, 0.5, live)
    np.testing.assert_allclose(out[:3], (np.asarray([0, 3, 1]) + 0.5) / 5.5 * 4, rtol=1e-6)
    assert out[3] == 1.0
