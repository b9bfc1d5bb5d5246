"""LensNet: what it may see, that padding changes nothing, and that it learns a planted utility."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from latent_jax.systems.megacontext import lens_losses, policies
from latent_jax.systems.megacontext.config import LossConfig
from latent_jax.systems.megacontext.layout import Layout
from latent_jax.systems.megacontext.lens import (
    TAIL_GISTS,
    Entries,
    LensNet,
    Tail,
    entries,
    nothing_seen,
    shared_words,
)
from latent_jax.systems.megacontext.tiling import start

NODES, WIDTH, LEVELS = 10, 4, 2


@functools.partial(jax.jit, static_argnums=1)
def snapshots(key, count):
    """Random contexts; a node is worth what it has in common with what the tail gists share."""
    keys = jax.random.split(key, 5)
    feature = jax.random.normal(keys[0], (count, NODES, WIDTH))
    wish = jax.random.normal(keys[1], (count, 1, WIDTH))
    noise = 0.3 * jax.random.normal(keys[2], (count, TAIL_GISTS, WIDTH))
    level = jax.random.randint(keys[3], (count, NODES), 0, LEVELS + 1)
    place = jnp.broadcast_to(jnp.arange(NODES), (count, NODES))
    mask = place < jax.random.randint(keys[4], (count, 1), NODES // 2, NODES + 1)
    context = Entries(feature, level, 1.0 * level, jnp.log1p(NODES - 1.0 - place), place, mask)
    gists = jnp.broadcast_to(NODES + jnp.arange(TAIL_GISTS), (count, TAIL_GISTS))
    tail = Tail(wish + noise, gists, jnp.ones((count, TAIL_GISTS), bool))
    utility = jax.vmap(policies.squash)((feature * wish).sum(-1), mask)
    return context, tail, utility


def drawn(lens, key=0):
    """Parameters whose scores are not all 0."""
    context, tail, _ = snapshots(jax.random.key(7), 2)
    variables = jax.jit(lens.init)(jax.random.key(key), context, tail)
    rows = variables["params"]["score"]["kernel"].shape
    variables["params"]["score"]["kernel"] = jax.random.normal(jax.random.key(key + 1), rows)
    return variables


@functools.cache
def small(causal: bool):
    lens = LensNet(LEVELS, width=8, heads=2, stacks=1, causal=causal)
    return lens, drawn(lens), jax.jit(lens.apply)


def test_padding_changes_nothing():
    lens, variables, apply = small(False)
    context, tail, _ = snapshots(jax.random.key(0), 2)
    scores = apply(variables, context, tail)
    rubbish = context._replace(
        feature=jnp.where(context.mask[..., None], context.feature, 1e4),
        level=jnp.where(context.mask, context.level, 0),
        log_width=jnp.where(context.mask, context.log_width, -50.0),
    )
    again = apply(variables, rubbish, tail)
    np.testing.assert_allclose(again, scores, atol=1e-6)
    assert not scores[~context.mask].any() and scores[context.mask].all()
    # Fewer tail gists: those that are masked may hold anything.
    two = tail._replace(mask=tail.mask.at[:, 2:].set(False))
    other = two._replace(feature=two.feature.at[:, 2:].set(1e4))
    np.testing.assert_allclose(
        apply(variables, context, two), apply(variables, context, other), atol=1e-6
    )
    assert float(jnp.abs(apply(variables, context, two) - scores).max()) > 1e-3


def test_no_gist_at_all_is_finite():
    _, variables, apply = small(False)
    context, tail, _ = snapshots(jax.random.key(0), 2)
    none = tail._replace(mask=jnp.zeros_like(tail.mask))
    assert bool(jnp.isfinite(apply(variables, context, none)).all())


@pytest.mark.parametrize("causal", [False, True])
def test_only_the_causal_lens_does_not_look_ahead(causal):
    _, variables, apply = small(causal)
    context, tail, _ = snapshots(jax.random.key(1), 2)
    # Gists between the nodes, so that a causal lens has something to read.
    tail = tail._replace(at=jnp.broadcast_to(jnp.asarray([0, 1, 3, 4, 6, 8]), tail.at.shape))
    before = apply(variables, context, tail)
    later_node = context._replace(feature=context.feature.at[:, 4].multiply(-3.0))
    later_gist = tail._replace(feature=tail.feature.at[:, 3].multiply(-3.0))
    for after in (apply(variables, later_node, tail), apply(variables, context, later_gist)):
        moved = np.asarray(jnp.abs(after - before).max(0))
        assert (moved[:4] < 1e-6).all() == causal and moved[4] > 1e-4


def ordered(scores, utility, mask):
    """Share of a snapshot's pairs in the right order."""
    better = (utility[:, :, None] > utility[:, None]) & mask[:, :, None] & mask[:, None]
    right = scores[:, :, None] > scores[:, None]
    return float((better & right).sum() / better.sum())


def test_learns_to_rank_a_planted_utility():
    lens = LensNet(LEVELS, width=16, heads=2, stacks=1)
    optimiser = optax.adam(optax.cosine_decay_schedule(0.02, 300))
    params = jax.jit(lens.init)(jax.random.key(0), *snapshots(jax.random.key(0), 1)[:2])

    def loss(params, key):
        context, tail, utility = snapshots(key, 64)
        scores = lens.apply(params, context, tail)
        ones = jnp.ones_like(scores)
        terms = lens_losses.lens_terms(scores, utility, context.mask, context.mask, ones, ones)
        return sum(getattr(LossConfig(), name) * term.value for name, term in terms.items())

    def step(state, key):
        params, moments = state
        updates, moments = optimiser.update(jax.grad(loss)(params, key), moments)
        return (optax.apply_updates(params, updates), moments), None

    @jax.jit
    def train(params):
        keys = jax.random.split(jax.random.key(1), 300)
        return jax.lax.scan(step, (params, optimiser.init(params)), keys)[0][0]

    context, tail, utility = snapshots(jax.random.key(2), 200)
    apply = jax.jit(lens.apply)
    assert ordered(apply(params, context, tail), utility, context.mask) == 0  # all alike
    trained = train(params)
    assert ordered(apply(trained, context, tail), utility, context.mask) > 0.85
    # What it learned is what the tail asks for, not which nodes are good in themselves.
    others = jax.tree.map(lambda x: jnp.roll(x, 1, 0), tail)
    assert 0.4 < ordered(apply(trained, context, others), utility, context.mask) < 0.6


def test_entries_of_a_tiling_by_hand():
    layout = Layout(block=4, branching=3, slots=(1, 2), protected=1)
    tiling = start(layout, 11, 15)
    # (2,0) (2,1) (1,6) (1,7) (1,8) (0,9) (0,10)
    rows = entries(layout, tiling, jnp.zeros((16, WIDTH)))
    np.testing.assert_allclose(rows.log_width[:7], np.log([12, 12, 4, 4, 4, 4, 4]), rtol=1e-6)
    np.testing.assert_allclose(
        rows.log_distance[:7], np.log1p([32, 20, 16, 12, 8, 4, 0]), rtol=1e-6
    )
    assert rows.at[:7].tolist() == [0, 3, 6, 7, 8, 9, 10] and rows.mask.sum() == 7


def test_a_lens_is_a_policy():
    lens, variables, apply = small(False)
    layout = Layout(block=4, branching=3, slots=(1, 2), protected=1)
    tiling = start(layout, 5, 9)
    assert tiling.level.shape == (NODES,) and tiling.count == 5
    feature = jax.random.normal(jax.random.key(0), (NODES, WIDTH))
    _, tails, _ = snapshots(jax.random.key(0), 2)
    tail = jax.tree.map(lambda x: x[0], tails)
    policy = jax.jit(policies.learned(layout, lens, variables))
    scores = policy(tiling, {"entry": feature, "tail": tail})
    rows = entries(layout, tiling, feature)
    batch = jax.tree.map(lambda x: jnp.stack([x, x]), (rows, tail))
    np.testing.assert_allclose(scores, apply(variables, *batch)[0], atol=1e-6)
    assert scores[:5].all() and not scores[5:].any()


def test_a_lens_that_sees_words_follows_them():
    lens = LensNet(2, width=16, words=True)
    layout = Layout(block=4, branching=3, slots=(1, 2), protected=1)
    tiling = start(layout, 5, 9)
    feature = jnp.zeros((NODES, WIDTH))
    _, tails, _ = snapshots(jax.random.key(0), 2)
    variables = lens.init(jax.random.key(0), *nothing_seen(WIDTH, True))
    variables["params"]["score"]["kernel"] = jnp.arange(16.0)[:, None]
    tail = jax.tree.map(lambda x: x[0], tails)
    policy = jax.jit(policies.learned(layout, lens, variables))
    of = lambda *best: policy(  # noqa: E731
        tiling, {"entry": feature, "tail": tail, "overlap": jnp.asarray(best)}
    )
    one, other = of(3.0, 0, 0, 0, 0, 0, 0, 0), of(0, 0, 0, 3.0, 0, 0, 0, 0)
    assert (np.abs(one - other)[:4] > 1e-4).any()
    # The tail's own words are not news.
    np.testing.assert_array_equal(of(3.0, 0, 0, 0, 9.0, 0, 0, 0), one)


def test_shared_words_by_hand():
    best, free = np.asarray([1.0, 4.0, 9.0], np.float32), np.asarray([True, True, False])
    found = shared_words(best, free)
    np.testing.assert_allclose(found[:, 0], [0.25, 1, 0])
    np.testing.assert_allclose(found[:, 1], np.log1p([1, 4, 0]) / 4, rtol=1e-6)
    np.testing.assert_allclose(shared_words(jnp.asarray(best), jnp.asarray(free)), found, rtol=1e-6)
    assert not shared_words(np.zeros(3, np.float32), free).any()
