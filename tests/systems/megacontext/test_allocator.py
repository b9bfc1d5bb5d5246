"""The allocator: as a slow reference does, never over budget, and not given to thrashing."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax.core.errors import ConfigError
from latent_jax.systems.megacontext import tiling as tl
from latent_jax.systems.megacontext.allocator import FocusConfig, refocus, trace_length
from latent_jax.systems.megacontext.layout import Layout, cover_cost
from latent_jax.systems.megacontext.tiling import Tiling
from tests.systems.megacontext import reference

SMALL = Layout(block=4, branching=3, slots=(1, 2, 3), protected=2)
BUDGET = 40
EAGER = FocusConfig(residency=1, cooldown=0, hysteresis=0.0)


def nodes(tiling: Tiling) -> list[tuple[int, int]]:
    """Level and index of every node."""
    count = int(tiling.count)
    rows = np.asarray(tiling.level)[:count], np.asarray(tiling.index)[:count]
    return list(zip(*(row.tolist() for row in rows), strict=True))


def actions(trace) -> list[tuple[int, int, int]]:
    """Kind, level and index of every action."""
    rows = (np.asarray(row)[: int(trace.count)].tolist() for row in trace[:3])
    return list(zip(*rows, strict=True))


def scored(tiling: Tiling, scores: dict[tuple[int, int], float]) -> jax.Array:
    """Scores by node, 0 for those not named."""
    found = [scores.get(node, 0.0) for node in nodes(tiling)]
    return jnp.zeros(tiling.level.shape).at[: len(found)].set(jnp.asarray(found))


@pytest.mark.parametrize(
    ("layout", "budget", "config", "count"),
    [
        (SMALL, BUDGET, FocusConfig(), 2000),
        (
            Layout(block=8, branching=2, slots=(3, 4, 5, 6), protected=1), 48,
            FocusConfig(max_actions=3, residency=2, cooldown=4, tau_expand=0.1), 1000,
        ),
    ],
)  # fmt: skip
def test_does_what_the_slow_reference_does(layout, budget, config, count):
    rng = np.random.default_rng(0)
    states = [reference.random_state(layout, budget + layout.block, rng) for _ in range(count)]
    capacity = max(layout.capacity(budget), *map(len, states))
    tilings, scores = reference.arrays(states, capacity)
    step = jax.jit(jax.vmap(functools.partial(refocus, layout, config, budget)))
    got, traces = jax.tree.map(np.asarray, step(tilings, scores))
    wanted = [reference.refocus(layout, config, budget, nodes) for nodes in states]
    expected, _ = reference.arrays([after for after, _ in wanted], capacity)
    for name, ours, theirs in zip(Tiling._fields, got, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=name)
    listed, kinds = 0, set()
    for row, (_, done) in enumerate(wanted):
        assert traces.count[row] == len(done)
        for column, (kind, level, index, score, delta) in enumerate(done):
            assert traces.kind[row, column] == kind
            assert (traces.level[row, column], traces.index[row, column]) == (level, index)
            assert traces.score[row, column] == pytest.approx(score, abs=1e-6)
            assert traces.delta[row, column] == delta
            kinds.add((kind, bool(traces.forced[row, column])))
        listed += len(done)
    # Room was made, and expands were made with and without it.
    assert listed > count / 2 and kinds == {(1, False), (-1, False), (-1, True)}


@pytest.mark.parametrize(
    "count", [20_000, pytest.param(100_000, marks=pytest.mark.slow)]
)
def test_invariants_through_random_steps(count):
    steps, longest = 250, 75
    walkers = count // steps
    config = FocusConfig(residency=2, cooldown=4)
    assert cover_cost(SMALL, longest, 3) <= BUDGET < cover_cost(SMALL, longest + 27, 3)
    empty = tl.start(SMALL, 0, BUDGET)

    def step(state, key):
        tiling, length = state
        fresh, grow, draw = jax.random.split(key, 3)
        over = (length >= longest) & jax.random.bernoulli(fresh, 0.1)
        tiling = jax.tree.map(lambda a, b: jnp.where(over, a, b), empty, tiling)
        length = jnp.where(over, 0, length)
        grows = jax.random.bernoulli(grow, 0.5) & (length < longest)
        grown = tl.append(SMALL, tiling)
        tiling = jax.tree.map(lambda a, b: jnp.where(grows, a, b), grown, tiling)
        length = length + grows
        before = tl.cost(SMALL, tiling)
        scores = jax.random.uniform(draw, tiling.level.shape, minval=-1.0, maxval=1.0)
        tiling, trace = refocus(SMALL, config, BUDGET, tiling, scores)
        seen = tl.check(SMALL, tiling, length, BUDGET)
        chosen = (trace.kind != 0) & ~trace.forced
        whole = trace.count == (trace.kind != 0).sum()
        sums = before + trace.delta.sum() == tl.cost(SMALL, tiling)
        facts = (*seen, chosen.sum() <= config.max_actions, whole, sums)
        counts = [(trace.kind == 1).sum(), chosen.sum(), trace.forced.sum(), grows]
        return (tiling, length), (jnp.stack(facts), jnp.stack([jnp.asarray(c) for c in counts]))

    @jax.jit
    def walk(key):
        start = jax.tree.map(lambda x: jnp.broadcast_to(x, (walkers, *x.shape)), empty)
        keys = jax.random.split(key, (steps, walkers))
        state = (start, jnp.zeros(walkers, jnp.int32))
        _, (facts, counts) = jax.lax.scan(jax.vmap(step), state, keys)
        return facts.all((0, 1)), counts.sum((0, 1))

    facts, (expands, chosen, forced, grown) = jax.tree.map(np.asarray, walk(jax.random.key(0)))
    names = (*tl.Check._fields, "at most N_diff", "whole trace", "entries add up")
    assert facts.all(), dict(zip(names, facts.tolist(), strict=True))
    often = count / 10
    assert expands > often and chosen > 1.5 * expands and forced > often and grown > often


def full() -> Tiling:
    """Twelve blocks: nine as gists of level 1, one raw before the protected two; 21 entries."""
    level = [1] * 9 + [0] * 3
    pad = 41 - len(level)
    zeros = np.zeros(41, np.int32)
    return Tiling(
        jnp.asarray(level + [-1] * pad), jnp.asarray([*range(12)] + [0] * pad),
        jnp.asarray(zeros), jnp.asarray(zeros), jnp.int32(12),
    )  # fmt: skip


def test_an_expand_takes_free_room_before_it_blurs_anything():
    tiling, trace = refocus(
        SMALL, EAGER, BUDGET, full(), scored(full(), {(1, 4): 0.9, (0, 9): -0.9})
    )
    assert actions(trace) == [(1, 1, 4)]
    assert (0, 4) in nodes(tiling) and (0, 9) in nodes(tiling)
    assert int(trace.delta[0]) == 3


def test_an_expand_without_room_is_paid_by_the_lowest_group():
    scores = {(1, 0): 0.9, (0, 9): -0.5, **{(1, i): -0.7 for i in (3, 4, 5)}}
    tight = Layout(block=4, branching=3, slots=(1, 2, 3), protected=2)
    tiling, trace = refocus(tight, EAGER, 21, full(), scored(full(), scores))
    # The group of mean -0.7 frees 1 entry and does not suffice, the raw block frees the other 3.
    assert actions(trace) == [(-1, 2, 1), (-1, 1, 9), (1, 1, 0)]
    assert not trace.forced.any()
    assert int(tl.cost(tight, tiling)) == 20
    np.testing.assert_allclose(trace.score[:3], [-0.7, -0.5, 0.9], rtol=1e-6)


def test_nothing_is_blurred_for_room_that_nobody_uses():
    scores = {(0, 9): -1.0, **{(1, i): -1.0 for i in range(9)}}
    tiling, trace = refocus(SMALL, EAGER, BUDGET, full(), scored(full(), scores))
    assert int(trace.count) == 0 and nodes(tiling) == nodes(full())


def test_a_group_is_kept_while_one_of_it_is_to_be_sharpened():
    scores = {(1, 0): 0.5, (1, 1): -5.0, (1, 2): -5.0}
    tiling, trace = refocus(SMALL, EAGER, 21, full(), scored(full(), scores))
    assert int(trace.count) == 0 and nodes(tiling) == nodes(full())


@pytest.mark.parametrize("score, acts", [(0.2, 0), (0.21, 1)])
def test_threshold(score, acts):
    _, trace = refocus(SMALL, EAGER, BUDGET, full(), scored(full(), {(1, 3): score}))
    assert int(trace.count) == acts


def test_ties_go_to_the_older():
    scores = jnp.where(tl.valid(full()), 0.5, 0.0)
    tiling, trace = refocus(SMALL, EAGER, BUDGET, full(), scores)
    assert actions(trace) == [(1, 1, i) for i in range(4)]


def test_forced_room_comes_from_the_lowest_score_then_the_oldest():
    tiling = full()._replace(age=jnp.where(tl.valid(full()), 9, 0))
    _, trace = refocus(SMALL, EAGER, 20, tiling, scored(tiling, {(1, 4): -0.6, (0, 9): -0.1}))
    assert actions(trace) == [(-1, 2, 1)] and bool(trace.forced[0])
    _, trace = refocus(SMALL, EAGER, 20, tiling, jnp.zeros(41))
    assert actions(trace) == [(-1, 2, 0)]
    # Whatever the scores say, and whoever has not rested: room is made.
    late = FocusConfig(residency=1000, cooldown=1000)
    made, trace = refocus(SMALL, late, 14, tiling, jnp.full(41, 9.0))
    assert int(tl.cost(SMALL, made)) <= 14 and bool(trace.forced[: int(trace.count)].all())


def test_what_has_rested_makes_room_first():
    age = jnp.where(jnp.arange(41) == 9, 0, 9) * tl.valid(full())
    config = FocusConfig(residency=3)
    scores = scored(full(), {(0, 9): -1.0})
    _, trace = refocus(SMALL, config, 20, full()._replace(age=age), scores)
    assert actions(trace) == [(-1, 2, 0)]


def test_a_history_that_cannot_fit_is_taken_as_far_as_it_goes():
    least = cover_cost(SMALL, 12, 3)
    tiling, _ = refocus(SMALL, EAGER, least - 1, full(), jnp.zeros(41))
    assert int(tl.cost(SMALL, tiling)) == least
    assert bool(tl.check(SMALL, tiling, 12).ok)


def test_a_node_stays_for_its_residency_and_is_not_undone_before_its_cooldown():
    config = FocusConfig(residency=2, cooldown=5, hysteresis=0.0)
    wants = {(1, 4): 0.9, (0, 4): -0.9, (1, 0): 0.9}
    tiling, done = full(), []
    for t in range(1, 12):
        tiling, trace = refocus(SMALL, config, 24, tiling, scored(tiling, wants))
        done += [(t, *action) for action in actions(trace)]
    # At 2 all have rested and block 0 opens. Block 4 has to wait for room until it is sold: never,
    # for block 0 is not wanted less. So only one action ever happens.
    assert done == [(2, 1, 1, 0)]
    tiling, done = full(), []
    for t in range(1, 14):
        sign = 0.9 if t <= 2 else -0.9
        wants = {(1, 0): sign, (0, 0): sign, (1, 8): 0.9 if t > 2 else 0.0}
        tiling, trace = refocus(SMALL, config, 24, tiling, scored(tiling, wants))
        done += [(t, *action) for action in actions(trace)]
    # Opened at 2, it may be closed for block 8 from 2 + 5 on.
    assert done == [(2, 1, 1, 0), (7, -1, 1, 0), (7, 1, 1, 8)]


def test_hysteresis_raises_the_bar_of_undoing_only():
    last = jnp.where(jnp.arange(41) == 3, tl.COLLAPSED, 0)
    tiling = full()._replace(last=last)
    sure = FocusConfig(residency=1, cooldown=0, hysteresis=0.3)
    scores = scored(tiling, {(1, 3): 0.45, (1, 6): 0.3})
    assert actions(refocus(SMALL, sure, BUDGET, tiling, scores)[1]) == [(1, 1, 6)]
    scores = scored(tiling, {(1, 3): 0.55, (1, 6): 0.3})
    assert actions(refocus(SMALL, sure, BUDGET, tiling, scores)[1]) == [(1, 1, 3), (1, 1, 6)]


def test_no_number_breaks_it():
    scores = jnp.full(41, jnp.nan).at[0].set(jnp.inf).at[9].set(-jnp.inf)
    tiling, trace = refocus(SMALL, EAGER, 21, full(), scores)
    assert actions(trace) == [(-1, 1, 9), (1, 1, 0)]
    assert bool(tl.check(SMALL, tiling, 12, 21).ok) and bool(jnp.isfinite(trace.score).all())


def test_padding_and_length_of_the_arrays_do_not_matter():
    scores = scored(full(), {(1, 0): 0.9, (0, 9): -0.5})
    tiling, trace = refocus(SMALL, EAGER, 21, full(), scores)
    again, same = refocus(SMALL, EAGER, 21, full(), jnp.where(tl.valid(full()), scores, 1e9))
    jax.tree.map(np.testing.assert_array_equal, (tiling, trace), (again, same))
    short = jax.tree.map(lambda x: x[:22] if x.ndim else x, full())
    small, other = refocus(SMALL, EAGER, 21, short, scores[:22])
    assert nodes(small) == nodes(tiling)
    jax.tree.map(np.testing.assert_array_equal, trace, other)


def test_arrays_too_short_for_the_budget_are_refused():
    with pytest.raises(ConfigError, match="arrays of 41 nodes are too short.*41 entries"):
        refocus(SMALL, EAGER, 41, full(), jnp.zeros(41))


def test_length_of_a_trace():
    # 32 entries over: two gists of 4 for raw blocks free 28 each.
    assert trace_length(Layout(slots=(4, 16)), 4) == 6
    assert trace_length(Layout(slots=(1, 31)), 4) == 36
