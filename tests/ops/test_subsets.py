"""Leaving out columns of a linear map, against brute force and least squares in float64."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax.ops.subsets import inverse, refitted, removal_order, ridged

P = np.random.default_rng(0).standard_normal((3, 40, 6)) * [1, 2, 0.3, 1, 0.1, 3]
Y = np.random.default_rng(1).standard_normal((3, 6, 4))
GRAM = ridged(jnp.asarray(np.einsum("nti,ntj->nij", P, P), jnp.float32), 0.05)
WANTED = jnp.asarray(np.einsum("nid,njd->nij", Y, Y), jnp.float32)


def rest(n, kept):
    """What the kept columns cannot give: the ridge pays for every change of a row."""
    gram, kept = np.asarray(GRAM[n], np.float64), list(kept)
    lost = [i for i in range(6) if i not in kept]
    change = -Y[n].copy()
    change[kept] = np.linalg.solve(gram[np.ix_(kept, kept)], gram[np.ix_(kept, lost)] @ Y[n][lost])
    return np.einsum("id,ij,jd->", change, gram, change)


def test_the_inverse_is_the_library_s():
    np.testing.assert_allclose(
        inverse(GRAM), np.linalg.inv(np.asarray(GRAM, np.float64)), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("size", [65, 200])
def test_a_large_one_is_made_of_halves(size):
    rows = np.random.default_rng(0).normal(size=(2, 300, size)) * np.logspace(0, -2, size)
    gram = ridged(jnp.asarray(rows.swapaxes(1, 2) @ rows, jnp.float32), 0.1)
    found, true = np.asarray(inverse(gram)), np.linalg.inv(np.asarray(gram, np.float64))
    np.testing.assert_allclose(found, true, atol=2e-6 * np.abs(true).max())
    np.testing.assert_allclose(found, found.swapaxes(1, 2), atol=1e-6 * np.abs(true).max())


def test_each_column_left_out_is_the_cheapest_and_its_price_is_the_rise_of_the_error():
    rank, cost = jax.jit(removal_order)(GRAM, WANTED)
    for n in range(3):
        kept = list(range(6))
        for left in range(5, -1, -1):
            gone = int(np.flatnonzero(np.asarray(rank[n]) == left)[0])
            price = {i: rest(n, [k for k in kept if k != i]) for i in kept}
            assert gone == min(price, key=price.get)
            np.testing.assert_allclose(cost[n, left], price[gone] - rest(n, kept), rtol=2e-3)
            kept.remove(gone)


def test_kept_rows_make_up_for_the_others():
    for kept in itertools.combinations(range(6), 3):
        on = jnp.asarray([i in kept for i in range(6)])
        found = np.asarray(refitted(GRAM, jnp.asarray(Y, jnp.float32), on[None].repeat(3, 0)))
        assert not found[:, ~np.asarray(on)].any()
        for n in range(3):
            change = found[n] - Y[n]
            error = np.einsum("id,ij,jd->", change, np.asarray(GRAM[n], np.float64), change)
            np.testing.assert_allclose(error, rest(n, kept), rtol=1e-4)


def test_nothing_changes_where_all_is_kept():
    found = refitted(GRAM, jnp.asarray(Y, jnp.float32), jnp.ones((3, 6), bool))
    np.testing.assert_array_equal(found, Y.astype(np.float32))
