"""Every term against a sum done by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax.systems.megacontext import lens_losses
from latent_jax.systems.megacontext.config import LossConfig
from latent_jax.systems.megacontext.layout import Layout
from latent_jax.systems.megacontext.lens import action_entries
from latent_jax.systems.megacontext.system import LENS_TERMS
from latent_jax.systems.megacontext.tiling import append, expand, start

SCORES = jnp.asarray([[1.0, -0.5, 0.25, 9.0], [0.5, 0.0, 9.0, 9.0]])
UTILITY = jnp.asarray([[0.5, -0.5, 0.5, jnp.nan], [1.0, 2.0, jnp.nan, jnp.nan]])
MASK = jnp.asarray([[True, True, True, False], [True, True, False, False]])


def test_regression_by_hand():
    term = lens_losses.regression(SCORES, UTILITY, MASK)
    # 0.25 + 0 + 0.0625 and 0.25 + 4, over five nodes
    assert float(term.value) == pytest.approx((0.25 + 0.0625 + 0.25 + 4) / 5)


def test_ranking_by_hand():
    term = lens_losses.ranking(SCORES, UTILITY, MASK)
    # Pairs: 0 over 1, 2 over 1 (0 and 2 are tied); in the second snapshot 1 over 0.
    wanted = np.log1p(np.exp([-1.5, -0.75, 0.5]))
    assert float(term.count) == 3
    assert float(term.value) == pytest.approx(wanted.mean(), rel=1e-6)


def test_ordered_by_hand():
    # Of three pairs the first two are in the right order; a tie is half.
    assert float(lens_losses.ordered(SCORES, UTILITY, MASK).value) == pytest.approx(2 / 3)
    assert float(lens_losses.ordered(0 * SCORES, UTILITY, MASK).value) == 0.5


def test_budget_by_hand():
    adds = jnp.asarray([[3.0, 3.0, 8.0, 50.0], [2.0, 2.0, 50.0, 50.0]])
    frees = jnp.asarray([[1.0, 4.0, 1.0, 50.0], [2.0, 2.0, 50.0, 50.0]])
    # P = 1 * 3 + 0.25 * 8 = 5, N = 0.5 * 4 = 2; then P = 1, N = 0.
    term = lens_losses.budget(SCORES, adds, frees, MASK)
    assert float(term.value) == pytest.approx(((3 / 7) ** 2 + 1) / 2, rel=1e-5)
    balanced = jnp.asarray([[1.0, -1.0, 0.0, 0.0]])
    assert float(lens_losses.budget(balanced, adds[:1], adds[:1], MASK[:1]).value) == 0
    silent = jax.grad(lambda s: lens_losses.budget(s, adds, frees, MASK).value)(0 * SCORES)
    assert bool(jnp.isfinite(silent).all())


def test_legality_by_hand():
    may_expand = jnp.asarray([[False, True, True, False], [False, False, True, True]])
    may_collapse = jnp.asarray([[True, False, True, False], [True, True, True, True]])
    # The first asks to sharpen what it cannot (1), the second to blur it (0.25), the fourth (0.25).
    term = lens_losses.legality(SCORES, may_expand, may_collapse, MASK)
    assert float(term.value) == pytest.approx((1 + 0.25 + 0.25) / 5)


def test_terms_are_weighted_and_the_padding_gives_no_gradient():
    entries = jnp.ones_like(SCORES)

    def loss(scores):
        measured = MASK.at[0, 2].set(False)
        terms = lens_losses.lens_terms(scores, UTILITY, measured, MASK, entries, entries)
        defaults = LossConfig()
        return sum(getattr(defaults, name) * term.value for name, term in terms.items()), terms

    (total, terms), gradient = jax.value_and_grad(loss, has_aux=True)(SCORES)
    assert set(terms) == set(LENS_TERMS)
    assert (terms["regression"].count, terms["ranking"].count) == (4, 2)
    weights = {"regression": 1.0, "ranking": 0.5, "budget": 0.1, "legality": 0.1}
    by_hand = sum(weights[name] * float(term.value) for name, term in terms.items())
    assert float(total) == pytest.approx(by_hand, rel=1e-6)
    assert bool(jnp.isfinite(gradient).all()) and not gradient[~MASK].any()


def test_what_an_action_moves_by_hand():
    layout = Layout(block=4, branching=3, slots=(1, 2), protected=1)
    tiling = append(layout, start(layout, 11, 15))
    # (2,0) (2,1) (1,6) (1,7) (1,8) (0,9) (0,10) (0,11)
    adds, frees = action_entries(layout, tiling)
    np.testing.assert_allclose(adds[:9], [1, 1, 3, 3, 3, 0, 0, 0, 0])
    np.testing.assert_allclose(frees[:9], [0, 0, 1 / 3, 1 / 3, 1 / 3, 3, 3, 0, 0])
    adds, frees = action_entries(layout, expand(layout, tiling, 3))
    np.testing.assert_allclose(frees[:9], [0, 0, 0, 3, 0, 3, 3, 0, 0])
