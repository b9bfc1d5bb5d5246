"""Baselines: what each prefers, and where the allocator ends up with it."""

from __future__ import annotations

import dataclasses
import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax.core.errors import ConfigError
from latent_jax.systems.megacontext import policies
from latent_jax.systems.megacontext import tiling as tl
from latent_jax.systems.megacontext.allocator import FocusConfig, refocus
from latent_jax.systems.megacontext.focus import RuntimeConfig
from latent_jax.systems.megacontext.layout import Layout
from latent_jax.systems.megacontext.policy_names import POLICIES

LAYOUT = Layout(block=4, branching=3, slots=(1, 2), protected=1)
BUDGET = 20
CONFIG = FocusConfig(residency=1, cooldown=0, hysteresis=0.0)


def nodes(tiling):
    """Level and index of every node."""
    count = int(tiling.count)
    rows = np.asarray(tiling.level)[:count], np.asarray(tiling.index)[:count]
    return list(zip(*(row.tolist() for row in rows), strict=True))


def settled(policy, tiling, features=None, budget=BUDGET, steps=12):
    """Where a policy's focus comes to rest on a history that stays as it is."""

    score = jax.jit(policy)
    for _ in range(steps):
        tiling, trace = refocus(LAYOUT, CONFIG, budget, tiling, score(tiling, features or {}))
    return tiling, int(trace.count)


def context():
    """Twelve blocks: two gists of level 2, three of level 1, three raw; 19 entries."""
    return tl.append(LAYOUT, tl.start(LAYOUT, 11, 15, capacity=31))


def test_example():
    assert doctest.testmod(policies) == (0, 3)


def test_recency_sharpens_what_is_near():
    tiling, still = settled(policies.recency(LAYOUT), context())
    assert still == 0
    near = [level for level, _ in nodes(tiling)]
    assert near == sorted(near, reverse=True) and near.count(0) >= 3
    scores = policies.recency(LAYOUT)(context(), {})
    # seven nodes before the protected one
    np.testing.assert_allclose(
        scores[:9], [-1, -2 / 3, -1 / 3, 0, 1 / 3, 2 / 3, 1, 0, 0], atol=1e-6
    )


def test_the_sink_stays_sharp():
    scores = policies.sink_recency(LAYOUT)(context(), {})
    plain = policies.recency(LAYOUT)(context(), {})
    assert scores[0] == 1 and (scores[1:] == plain[1:]).all()
    # Room enough for the sink, which opens in two steps, and for one near block before it.
    tiling, _ = settled(policies.sink_recency(LAYOUT), context(), budget=26)
    assert nodes(tiling)[0] == (0, 0) and (0, 8) in nodes(tiling)


def test_uniform_wants_the_finest_level_that_fits():
    # Eleven blocks as gists of level 1 and one raw are 15 entries; level 0 would be 48.
    scores = policies.uniform(LAYOUT, BUDGET)(context(), {})
    assert scores[:9].tolist() == [1, 1, 0, 0, 0, -1, -1, 0, 0]
    assert policies.uniform(LAYOUT, 48)(context(), {})[:9].tolist() == [1] * 5 + [0] * 4
    assert policies.uniform(LAYOUT, 14)(context(), {})[:9].tolist() == [0, 0, *[-1] * 5, 0, 0]
    tiling, still = settled(policies.uniform(LAYOUT, BUDGET), context())
    assert still == 0 and all(level <= 1 for level, _ in nodes(tiling))


def test_random_is_drawn_by_its_key():
    policy = policies.random(LAYOUT)
    one, same = (policy(context(), {}, jax.random.key(0)) for _ in range(2))
    other = policy(context(), {}, jax.random.key(1))
    assert (one == same).all() and not (one == other).all()
    assert -1 <= float(one.min()) < -0.2 < 0.2 < float(one.max()) <= 1


def test_bm25_by_hand():
    ids = np.array([[1, 2, 3, 4], [1, 1, 5, 6], [7, 8, 9, 10], [7, 1, 1, 1]])
    got = policies.bm25(ids, np.array([1, 7, 7, 99]), k1=1.2)
    # One in three of four blocks, seven in two.
    one, seven = np.log1p(1.5 / 3.5), np.log1p(2.5 / 2.5)
    wanted = [one, one * 2 * 2.2 / 3.2, seven, seven + one * 3 * 2.2 / 4.2]
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    assert not policies.bm25(ids, np.array([], int)).any()
    assert policies.bm25(ids[:0], np.array([1])).shape == (0,)


def test_blocks_are_scored_in_pairs_for_what_lies_across_two():
    ids = np.array([[1, 2], [3, 4], [5, 6], [7, 8]])
    seen = []

    def score(pairs):
        seen.append(pairs.tolist())
        return (pairs == 5).sum(1) * (pairs == 4).sum(1)

    assert policies.across(score, ids).tolist() == [0, 1, 1, 0]
    assert seen == [[[1, 2, 3, 4], [3, 4, 5, 6], [5, 6, 7, 8]]]
    assert policies.across(lambda x: x.sum(1), ids[:1]).tolist() == [3]
    assert policies.across(lambda x: x.sum(1), ids[:0]).shape == (0,)


def test_bm25_brings_back_what_the_tail_speaks_of():
    overlap = jnp.zeros(20).at[1].set(3.0).at[15].set(99.0)  # beyond the history: not read
    policy = policies.bm25_to_tail(LAYOUT)
    best = policies.best_block(LAYOUT, context(), overlap)
    assert best[:9].tolist() == [3.0] + [0.0] * 8
    scores = policy(context(), {"overlap": overlap})
    assert scores[:9].tolist() == [1, *[-1] * 6, 0, 0]
    assert (policy(context(), {"overlap": 0 * overlap})[:9] <= 0).all()
    tiling, _ = settled(policy, context(), {"overlap": overlap})
    assert (0, 1) in nodes(tiling)


def test_the_oracle_keeps_order_and_sign_of_what_was_measured():
    utility = jnp.asarray([0.001, -0.002, 0.0, 0.0005] + [jnp.inf] * 17)
    mask = jnp.arange(21) < 4
    small = policies.squash(jnp.where(mask, utility, 0.0), mask)
    assert jnp.argsort(small[:4]).tolist() == [1, 2, 3, 0]
    assert (jnp.sign(small[:4]) == jnp.sign(utility[:4])).all() and float(small.max()) > 0.2
    # In other units it decides the same, and the padding is not read.
    np.testing.assert_allclose(policies.squash(1e3 * utility, mask), small, rtol=1e-5)
    tiling = context()
    measured = jnp.where(tl.valid(tiling), 0.01, jnp.nan)
    assert bool(jnp.isfinite(policies.oracle(LAYOUT)(tiling, {"utility": measured})).all())


def test_names():
    assert set(POLICIES) == set(policies.NAMES) and len(POLICIES) == len(policies.NAMES)
    for name in (*policies.BASELINES, "uniform"):
        assert callable(policies.make(name, LAYOUT, BUDGET))
    with pytest.raises(ConfigError, match="policy 'lens': this run has no lens"):
        policies.make("lens", LAYOUT, BUDGET)
    with pytest.raises(ConfigError, match="'oracel' is unknown; there are attention, bm25, lens"):
        policies.make("oracel", LAYOUT, BUDGET)


def test_attention_is_compared_by_the_entries_that_an_action_is_about():
    """Opening a gist of level 2 adds 4 entries here, one of level 1 adds 6: of equally much
    attention the former is worth more for each.
    """
    layout = Layout(block=8, branching=4, slots=(2, 4), protected=1)
    tiling = tl.start(layout, 14, 40)
    level, count = np.asarray(tiling.level), int(tiling.count)
    score = policies.make("attention", layout, 40)
    found = np.asarray(score(tiling, {"attention": jnp.ones(level.shape)}, None))
    assert {1, 2} <= set(level[:count])
    assert found[level == 2].min() > found[level == 1].max()
    assert (found[count - 1 :] == 0).all()  # the tail, and the padding
    loud = jnp.ones(level.shape).at[int(np.flatnonzero(level == 1)[0])].set(9.0)
    found = np.asarray(score(tiling, {"attention": loud}, None))
    assert found.argmax() == np.flatnonzero(level == 1)[0]


def test_a_focus_that_settles_can_pay_for_an_upper_node():
    """Opening one takes 112 entries here, and a raw block gives 28: with the expand itself five
    actions, more than a step of a growing history may take.
    """
    layout = Layout(block=32, branching=32, slots=(4, 16), protected=1)
    tiling = tl.start(layout, 64, 512)
    level, count = np.asarray(tiling.level), int(tiling.count)
    scores = jnp.where(jnp.asarray(level) == 2, 1.0, -1.0)
    config = RuntimeConfig().focus
    for focus, opened in ((config, True), (dataclasses.replace(config, max_actions=4), False)):
        after, _ = refocus(layout, focus, 512, tiling, scores)
        assert (2 not in np.asarray(after.level)[: int(after.count)]) == opened
    assert 2 in level[:count]
