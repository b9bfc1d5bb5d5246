"""The tiling: sizes by hand, moves there and back, what is refused, histories of any length."""

from __future__ import annotations

import doctest

import jax
import numpy as np
import pytest

from latent_jax.core.config import parse
from latent_jax.core.errors import ConfigError
from latent_jax.systems.megacontext import layout
from latent_jax.systems.megacontext import tiling as tl
from latent_jax.systems.megacontext.layout import Layout, cover_cost

SMALL = Layout(block=4, branching=3, slots=(1, 2), protected=1)


def nodes(tiling):
    """Level and index of every node."""
    count = int(tiling.count)
    rows = np.asarray(tiling.level)[:count], np.asarray(tiling.index)[:count]
    return list(zip(*(row.tolist() for row in rows), strict=True))


def test_sizes_by_hand():
    layout = Layout(block=32, branching=32, slots=(4, 16, 16), protected=8)
    assert layout.levels == 3
    assert layout.widths.tolist() == [1, 1, 32, 1024]
    assert layout.costs.tolist() == [32, 4, 16, 16]
    assert layout.expand_costs.tolist() == [0, 28, 112, 496]
    assert layout.collapse_gains.tolist() == [28, 112, 496, 0]
    assert layout.capacity(1024) == 257
    # 1 + 31 blocks: of the 24 before the tail none fills a node of level 2.
    assert cover_cost(layout, 32, 3) == 8 * 32 + 24 * 4
    assert cover_cost(layout, 8 + 1024 + 64 + 3, 3) == 8 * 32 + 16 + 2 * 16 + 3 * 4
    assert cover_cost(layout, 5, 3) == 5 * 32


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"slots": []}, "slots is empty"),
        ({"slots": [32]}, "level 1 costs 32 entries and replaces a raw block at 32"),
        ({"slots": [1, 32]}, "level 2 costs 32 entries and replaces 32 gists below at 32"),
        ({"slots": [0]}, "out of range"),
        ({"slots": [1] * 8}, "more blocks than an int32 counts"),
        ({"protected": 0}, "protected = 0: out of range"),
    ],
)
def test_impossible_sizes_are_refused(settings, problem):
    with pytest.raises(ConfigError, match=problem):
        parse(Layout, settings)


def test_start_by_hand():
    # Blocks 0-8 in three gists of level 2 (6), 9 in one of level 1 (1), 10 raw (4): 11 entries.
    assert tl.coarsest(SMALL, 11) == [(2, 0), (2, 1), (2, 2), (1, 9), (0, 10)]
    assert nodes(tl.start(SMALL, 11, 11)) == [(2, 0), (2, 1), (2, 2), (1, 9), (0, 10)]
    # 3 more make block 9 raw, 1 more opens the nearest group, and 2 do not open a block of it.
    opened = [(2, 0), (2, 1), (1, 6), (1, 7), (1, 8), (0, 9), (0, 10)]
    assert nodes(tl.start(SMALL, 11, 15)) == opened
    # What is left after the nearest group opens the next one rather than lie idle.
    assert nodes(tl.start(SMALL, 11, 17)) == [*((1, i) for i in range(9)), (0, 9), (0, 10)]
    assert nodes(tl.start(SMALL, 2, 100)) == [(0, 0), (0, 1)]
    assert nodes(tl.start(SMALL, 0, 4)) == []


def test_a_start_that_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="3 entries is smaller than its protected tail of 1 bl"):
        tl.start(SMALL, 1, 3)
    with pytest.raises(ConfigError, match="11 blocks needs 11 entries at its coarsest .* has 10"):
        tl.start(SMALL, 11, 10)
    with pytest.raises(ConfigError, match="arrays of 12 nodes .* needs 13"):
        tl.start(SMALL, 11, 12, capacity=12)


def test_a_start_fits_for_every_length_and_is_finer_nearby():
    layout = Layout(block=8, branching=2, slots=(3, 4, 5, 6), protected=2)
    budget, capacity = 64, 40
    made = [tl.start(layout, n, budget, capacity) for n in range(49)]
    stacked = jax.tree.map(lambda *x: np.stack(x), *made)
    check = jax.jit(jax.vmap(lambda t, n: tl.check(layout, t, n, budget)))
    for name, held in zip(tl.Check._fields, check(stacked, np.arange(49)), strict=True):
        assert held.all(), name
    for n, tiling in enumerate(made):
        rows = nodes(tiling)
        # What an end too short for a coarser node makes finer, the coarsest tiling has as well.
        forced = {level for level, _ in tl.coarsest(layout, n)}
        steps = zip(rows, rows[1:], strict=False)
        assert all(a[0] >= b[0] or a[0] in forced for a, b in steps)
        used = sum(int(layout.costs[level]) for level, _ in rows)
        raw = all(level == 0 for level, _ in rows)
        assert raw or budget - used < max(layout.expand_costs)


def test_moves_by_hand():
    tiling = tl.start(SMALL, 11, 15)
    tiling = tiling._replace(age=tiling.age.at[:7].set(5))
    finer = jax.jit(tl.expand, static_argnums=0)
    coarser = jax.jit(tl.collapse, static_argnums=0)
    one = finer(SMALL, tiling, 1)
    assert nodes(one) == [(2, 0), *((1, i) for i in range(3, 9)), (0, 9), (0, 10)]
    assert one.age[:9].tolist() == [5, 0, 0, 0, 5, 5, 5, 5, 5]
    assert one.last[:9].tolist() == [0, 1, 1, 1, 0, 0, 0, 0, 0]
    assert int(tl.cost(SMALL, one)) == 16
    back = coarser(SMALL, one, 1)
    assert nodes(back) == nodes(tiling) and back.last[:3].tolist() == [0, -1, 0]
    assert nodes(finer(SMALL, tiling, 3))[2:5] == [(1, 6), (0, 7), (1, 8)]
    assert nodes(coarser(SMALL, finer(SMALL, tiling, 3), 3)) == nodes(tiling)
    grown = jax.jit(tl.append, static_argnums=0)(SMALL, tiling)
    assert nodes(grown) == [*nodes(tiling), (0, 11)]
    for made, history in ((one, 11), (back, 11), (grown, 12)):
        assert bool(tl.check(SMALL, made, history).ok)


def test_what_is_legal_by_hand():
    tiling = tl.start(SMALL, 11, 15)
    tiling = jax.jit(tl.append, static_argnums=0)(SMALL, tiling)
    # (2,0) (2,1) (1,6) (1,7) (1,8) (0,9) (0,10) (0,11): the group, 9 and 10 may; 11 is protected.
    may = jax.jit(tl.legal, static_argnums=0)(SMALL, tiling)
    assert np.flatnonzero(may.expand).tolist() == [0, 1, 2, 3, 4]
    assert np.flatnonzero(may.collapse).tolist() == [2, 5, 6]
    mixed = jax.jit(tl.expand, static_argnums=0)(SMALL, tiling, 3)
    may = jax.jit(tl.legal, static_argnums=0)(SMALL, mixed)
    # A raw block among gists of level 1 is as wide as they are, and still no sibling.
    assert np.flatnonzero(may.collapse).tolist() == [3, 5, 6]


def test_the_check_sees_what_is_broken():
    good = tl.start(SMALL, 11, 15)
    check = jax.jit(lambda t: tl.check(SMALL, t, 11, 15))
    assert bool(check(good).ok)
    broken = {
        "covered": good._replace(index=good.index.at[1].set(2)),
        "levels": good._replace(level=good.level.at[0].set(3)),
        "tail": good._replace(level=good.level.at[6].set(1)),
        "padding": good._replace(age=good.age.at[9].set(1)),
        "budget": good._replace(level=good.level.at[2].set(0)),
    }
    for name, tiling in broken.items():
        assert not bool(getattr(check(tiling), name)), name
    full = good._replace(count=good.level.shape[0] + good.count * 0)
    assert not bool(check(tl.append(SMALL, full)).padding)


def test_children_stand_where_their_text_does_unless_a_node_is_wider_than_a_base_can_look():
    assert doctest.testmod(layout).failed == 0
    for branching, slots in ((4, (4, 4, 4)), (8, (4, 1, 1)), (32, (4, 4))):
        made = Layout(block=32, branching=branching, slots=slots)
        for level in range(1, made.levels + 1):
            assert made.room(level) == 32 * made.widths[level]
    far = Layout(block=32, branching=32, slots=(4,) * 5)
    assert [far.room(level) for level in range(1, 6)] == [32, 1024, 3008, 4992, 6976]
