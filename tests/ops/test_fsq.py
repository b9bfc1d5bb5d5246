"""FSQ and LFQ: grids, codecs and gradients."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax.ops import fsq

FSQ = jax.jit(fsq.fsq, static_argnums=(1, 2))
DECODE = jax.jit(fsq.fsq_decode, static_argnums=1)
LFQ = jax.jit(fsq.lfq, static_argnums=1)

X = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32) * 2


@pytest.mark.parametrize("levels", [(8, 5, 3), (6, 3, 4)])
def test_fsq_hits_every_code_and_decodes_to_its_bits(levels):
    x = np.linspace(-4, 4, 400, dtype=np.float32)[:, None].repeat(3, 1)
    value, index = FSQ(x, levels, 1)
    for d, n in enumerate(levels):
        assert len(np.unique(np.asarray(value)[:, d])) == n
    grid = np.asarray(list(itertools.product(*(np.linspace(-4, 4, 40),) * 3)), np.float32)
    assert set(np.asarray(FSQ(grid, levels, 1)[1])[:, 0]) == set(range(int(np.prod(levels))))
    np.testing.assert_array_equal(DECODE(index, levels), value)


def test_fsq_by_hand():
    # Odd levels: tanh(x) * (5 - 1) / 2 * 1.001, rounded, over 2; index is digit + 2.
    value, index = FSQ(jnp.asarray([[0.0, 0.6, -9.0]]), (5, 5, 5), 1)
    np.testing.assert_allclose(value, [[0.0, 0.5, -1.0]])
    assert int(index[0, 0]) == 2 + 3 * 5 + 0 * 25


def test_fsq_stages_refine_the_cell():
    error = []
    for stages in (1, 2, 3):
        value, index = FSQ(X, (5, 4, 3), stages)
        bounded = fsq.fsq_bound(X, (5, 4, 3)) / np.asarray([2.0, 2.0, 1.0])
        error.append(float(jnp.abs(value - bounded).max()))
        assert index.shape == (64, stages) and int(index.max()) < 60 and int(index.min()) >= 0
        np.testing.assert_allclose(DECODE(index, (5, 4, 3)), value, atol=1e-6)
    assert error[1] < 0.4 * error[0] and error[2] < 0.4 * error[1]


def test_fsq_gradient_is_that_of_the_squashing():
    grad = jax.grad(lambda x: FSQ(x, (5, 4, 3), 1)[0].sum())(X)
    half = jnp.asarray([2.0, 2.0, 1.0])
    expected = jax.grad(lambda x: (fsq.fsq_bound(x, (5, 4, 3)) / half).sum())(X)
    np.testing.assert_allclose(grad, expected, rtol=1e-5, atol=1e-6)


def test_lfq_by_hand_and_back():
    value, index = LFQ(jnp.asarray([[0.7, -0.1, 1.4]]), 2)
    np.testing.assert_allclose(value, [[0.5, -0.5, 1.5]])
    assert index.tolist() == [[0b101, 0b110]]
    value, index = LFQ(X, 3)
    np.testing.assert_allclose(fsq.lfq_decode(index, 3), value)
    assert (fsq.lfq_decode(jnp.full((1, 2), -1), 3) == 0).all()
    np.testing.assert_array_equal(jax.jacobian(lambda x: LFQ(x, 3)[0])(X[0]), np.eye(3))


def test_lfq_entropies_by_hand():
    x = jnp.asarray([[100.0, 0.0], [-100.0, 0.0], [5.0, 5.0]])
    each, mean = fsq.lfq_entropy(x, jnp.asarray([True, True, False]))
    np.testing.assert_allclose(each, np.log(2), rtol=1e-3)  # one certain bit, one open
    np.testing.assert_allclose(mean, 2 * np.log(2), rtol=1e-3)  # both open on average
