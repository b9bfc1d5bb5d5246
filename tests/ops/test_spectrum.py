"""Effective rank against values known by hand."""

from __future__ import annotations

import numpy as np
import pytest

from latent_jax.ops.spectrum import effective_rank


@pytest.mark.parametrize("n", [1, 2, 7])
def test_equal_eigenvalues_count_fully(n):
    assert effective_rank(np.full(n, 0.3)) == pytest.approx(n)


def test_by_hand():
    # shares 1/2, 1/4, 1/4: entropy 3/2 ln 2
    assert effective_rank(np.asarray([1.0, 2.0, 1.0])) == pytest.approx(2**1.5)


def test_scale_order_zeros_and_rounding_change_nothing():
    rng = np.random.default_rng(0)
    x = rng.random(9)
    own = effective_rank(x)
    assert 1 < own < 9
    assert effective_rank(1e-30 * x) == pytest.approx(own)
    assert effective_rank(rng.permutation(x)) == pytest.approx(own)
    assert effective_rank(np.append(x, [0.0, -1e-9])) == pytest.approx(own)


def test_a_single_direction_and_none():
    assert effective_rank(np.asarray([5.0, 0.0])) == 1.0
    assert effective_rank(np.zeros(3)) == 1.0


def test_of_a_gaussian_cloud_is_between_its_dimensions():
    x = np.random.default_rng(0).standard_normal((4000, 6)) * [1, 1, 1, 1e-3, 1e-3, 1e-3]
    assert effective_rank(np.linalg.svd(x, compute_uv=False) ** 2) == pytest.approx(3, rel=1e-2)
