"""EMA codebooks: the moving average, its invariants, and the restart of dead codes."""

from __future__ import annotations

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_jax.ops import vq, vq_init, vq_state

LIVE = jnp.ones((1, 4), bool)


EMA = jax.jit(vq_state.ema, static_argnames="cosine")
PICK = jax.jit(vq_init.pick_rows, static_argnums=2)
RESTART = jax.jit(vq_state.restart, static_argnames="cosine")


def book(k=4, d=2, seed=0):
    code = np.random.default_rng(seed).normal(size=(1, k, d)).astype(np.float32)
    return vq_state.fresh(jnp.asarray(code), jnp.ones((1, k), bool), True)


def test_sizes_start_at_one_beside_sums_equal_to_the_codes():
    state = book()
    np.testing.assert_array_equal(state.size, np.ones((1, 4)))
    np.testing.assert_array_equal(state.total, state.code)
    np.testing.assert_allclose(state.norm, (np.asarray(state.code) ** 2).sum(-1), rtol=1e-6)
    # Nothing chosen: sizes and sums decay together, the codes stay where they are.
    count = jnp.asarray([[8.0, 0, 0, 0]])
    total = jnp.zeros((1, 4, 2)).at[0, 0].set(8 * state.code[0, 0])
    moved = EMA(state, count, total, 0.9, 1e-5, LIVE)
    np.testing.assert_allclose(moved.code, state.code, rtol=1e-3)


def test_one_step_by_hand():
    state = book()
    count = jnp.asarray([[2.0, 0.0, 1.0, 0.0]])
    total = jnp.asarray([[[4.0, 2.0], [0, 0], [1.0, -1.0], [0, 0]]])
    moved = EMA(state, count, total, 0.9, 0.0, LIVE)
    size = 0.9 + 0.1 * np.asarray([2.0, 0, 1, 0])
    sums = 0.9 * np.asarray(state.code[0]) + 0.1 * np.asarray(total[0])
    np.testing.assert_allclose(moved.size[0], size, rtol=1e-6)
    np.testing.assert_allclose(moved.code[0], sums / size[:, None], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(moved.norm, vq_state.norms(moved.code), rtol=1e-6)


def test_masked_mass_is_11_2():
    """8 codes, decay 0.9, 40 valid of 64 rows: 0.9 * 8 + 0.1 * 40."""
    state = book(k=8, d=3)
    x = jnp.where(jnp.arange(64)[:, None] < 40, 1.0, jnp.nan) * jnp.ones((64, 3))
    index = jnp.where(jnp.arange(64) < 40, jnp.arange(64) % 8, -1)
    count, total = vq.statistics(x, index, 8)
    moved = EMA(state, count[None], total[None], 0.9, 1e-5, jnp.ones((1, 8), bool))
    np.testing.assert_allclose(moved.size.sum(), 11.2, rtol=1e-6)
    assert np.isfinite(moved.code).all()


@pytest.mark.parametrize("case", ["empty", "gate"])
def test_an_empty_batch_or_a_closed_gate_changes_no_bit(case):
    state = book()
    count = jnp.zeros((1, 4)) if case == "empty" else jnp.ones((1, 4))
    total = jnp.ones((1, 4, 2))
    gate = 1.0 if case == "empty" else 0.0
    moved = EMA(state, count, total, 0.9, 1e-5, LIVE, gate=gate)
    chex.assert_trees_all_equal(moved, state)
    if case == "empty":
        chex.assert_trees_all_equal(vq_state.track(state, count, 0.9), state)


@settings(max_examples=15)
@given(st.integers(0, 1000), st.floats(0.0, 0.99))
def test_mass_follows_the_rows_and_codes_stay_in_the_hull(seed, decay):
    rng = np.random.default_rng(seed)
    state = book(seed=seed)
    x, index = rng.normal(size=(12, 2)).astype(np.float32), rng.integers(0, 4, 12)
    count, total = vq.statistics(jnp.asarray(x), jnp.asarray(index), 4)
    moved = EMA(state, count[None], total[None], decay, 1e-6, LIVE)
    np.testing.assert_allclose(moved.size.sum(), decay * 4 + (1 - decay) * 12, rtol=1e-5)
    points = np.concatenate([x, state.code[0]])
    seen = np.asarray(moved.code[0])[np.asarray(moved.size[0]) > 1e-2]
    assert (seen <= points.max(0) + 1e-3).all() and (seen >= points.min(0) - 1e-3).all()


def test_track_usage_and_staleness():
    state = vq_state.track(book(), jnp.asarray([[3.0, 1.0, 0.0, 0.0]]), 0.5)
    np.testing.assert_allclose(state.usage[0], [0.5, 0.25, 0.125, 0.125])
    np.testing.assert_array_equal(state.stale[0], [0, 0, 1, 1])


def test_dead_needs_both_low_use_and_staleness_and_no_protection():
    for i, (low, stale, protected) in enumerate(itertools.product([0, 1], repeat=3)):
        state = book()._replace(
            usage=jnp.full((1, 4), 0.001 if low else 0.2),
            stale=jnp.full((1, 4), 10 if stale else 9),
        )
        guard = jnp.full((1, 4), bool(protected))
        gone = vq_state.dead(state, 0.1, 10, LIVE, guard)
        assert bool(gone.all()) == bool(low and stale and not protected), i
        assert bool(gone.any()) == bool(gone.all())
    none = vq_state.dead(state, 0.1, 10, LIVE & (jnp.arange(4) < 2))
    np.testing.assert_array_equal(none[0], [True, True, False, False])


@pytest.mark.parametrize("dead,rows,valid,expected", [
    ([1, 0, 1, 0], 2, 2, 2), ([1, 1, 1, 1], 2, 2, 2), ([1, 0, 1, 0], 2, 1, 1),
    ([0, 0, 0, 0], 2, 2, 0), ([1, 0, 1, 0], 2, 0, 0), ([0, 1, 0, 0], 3, 3, 1),
])  # fmt: skip
def test_restart(dead, rows, valid, expected):
    state = book()._replace(size=jnp.asarray([[0.01, 5.0, 0.02, 6.0]]))
    state = state._replace(stale=jnp.asarray([[30, 0, 40, 0]]))
    fresh = jnp.arange(rows * 2.0).reshape(1, rows, 2) + 10
    ok = (jnp.arange(rows) >= rows - valid)[None]  # the invalid ones come first
    gone = jnp.asarray([dead], bool)
    new = RESTART(state, gone, fresh, ok, 1.0, 1e-5, LIVE)
    changed = (np.asarray(new.code) != np.asarray(state.code)).any(-1)[0]
    assert changed.sum() == expected == int(new.resets[0])
    assert not (changed & ~np.asarray(dead, bool)).any()
    for k in np.flatnonzero(changed):
        assert new.size[0, k] == 1.0 and new.stale[0, k] == 0 and new.usage[0, k] == 0.25
    smooth = vq.smoothed(new.size, 1e-5, LIVE)
    agree = np.asarray(new.total / smooth[..., None])[0][changed]
    np.testing.assert_allclose(agree, np.asarray(new.code[0])[changed], rtol=1e-6)
    # Each row at most once, and never an invalid one.
    taken = {tuple(row) for row in np.asarray(new.code[0])[changed]}
    assert len(taken) == expected
    assert taken <= {tuple(row) for row in np.asarray(fresh[0])[np.asarray(ok[0])]}
    for name in ("code", "size", "total", "usage", "norm"):
        kept = ~changed
        before, after = np.asarray(getattr(state, name))[0], np.asarray(getattr(new, name))[0]
        if name == "norm":
            np.testing.assert_allclose(after[kept], before[kept], rtol=1e-6)
        else:
            np.testing.assert_array_equal(after[kept], before[kept])


def test_the_stalest_restart_first():
    state = book()._replace(stale=jnp.asarray([[30, 50, 40, 60]]))
    new = RESTART(
        state, jnp.ones((1, 4), bool), jnp.full((1, 1, 2), 9.0), jnp.ones((1, 1), bool),
        1.0, 1e-5, LIVE,
    )  # fmt: skip
    np.testing.assert_array_equal((new.code == 9.0).all(-1)[0], [False, False, False, True])


@settings(max_examples=15)
@given(st.lists(st.booleans(), min_size=5, max_size=5), st.sampled_from([2, 8]))
def test_picked_rows_are_distinct_and_kept(keep, count):
    row, own = PICK(jax.random.key(1), jnp.asarray(keep), count)
    picked = np.asarray(row)[np.asarray(own)]
    assert len(set(picked)) == len(picked) == min(count, sum(keep))
    assert all(keep[i] for i in picked)
    if any(keep):
        assert all(keep[i] for i in np.asarray(row))


def test_kmeans_finds_separated_clusters_and_ignores_padding():
    centre = np.asarray([[0, 0], [10, 0], [0, 10]], np.float32)
    x = np.repeat(centre, 20, 0) + np.random.default_rng(0).normal(size=(60, 2)) * 0.1
    x = np.concatenate([x, np.full((4, 2), 1e3)]).astype(np.float32)
    keep, live = jnp.arange(64) < 60, jnp.ones(3, bool)
    start = jnp.asarray(x[[0, 25, 50]])
    code = vq_init.kmeans(jnp.asarray(x), start, keep, live, 5)
    expected = [x[i * 20 : i * 20 + 20].mean(0) for i in range(3)]
    np.testing.assert_allclose(code, expected, atol=1e-4)


def test_fewer_rows_than_codes_give_distinct_codes():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2)), jnp.float32)
    code = vq_init.first_codes(jax.random.key(0), x, jnp.arange(5) < 3, jnp.ones(8, bool), 0)
    assert len(np.unique(np.asarray(code), axis=0)) == 8
    away = np.abs(np.asarray(code)[:, None] - np.asarray(x[:3])).max(-1).min(-1)
    assert away.max() < 0.05
