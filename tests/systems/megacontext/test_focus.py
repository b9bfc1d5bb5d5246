"""The focus for a question: opened from the coarsest, best node first, the rest to what is new."""

from __future__ import annotations

import numpy as np
import pytest

from latent_jax.core.errors import ConfigError
from latent_jax.systems.megacontext import tiling as tl
from latent_jax.systems.megacontext.focus import Focus, RuntimeConfig
from latent_jax.systems.megacontext.layout import Layout
from latent_jax.systems.megacontext.store import GistTree, TreeSpec

LAYOUT = Layout(block=8, branching=4, slots=(1, 1, 1), protected=1)
BLOCKS, BUDGET = 100, 56


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Block i holds token i alone, but for two neighbours that share a fact and the last one."""
    spec = TreeSpec(1000, 1, LAYOUT.slots, block=8, branch=4)
    ids = np.repeat(np.arange(BLOCKS), 8)
    ids[37 * 8 + 7], ids[38 * 8] = 501, 502
    ids[-8:] = np.arange(600, 608)
    with GistTree.create(tmp_path_factory.mktemp("focus") / "store", spec) as made:
        made.append(ids)
        yield made


def settled(tree, policy, query, **settings):
    focus = Focus(tree, LAYOUT, RuntimeConfig(BUDGET, policy, **settings))
    tiling = focus.settle(np.asarray(query))
    assert bool(tl.check(LAYOUT, tiling, BLOCKS, BUDGET).ok)
    return focus, tiling


def test_it_opens_the_way_to_what_is_asked_for(tree):
    """The top covers 16 blocks; three expansions of 3, 3 and 7 entries lead to a block."""
    focus, tiling = settled(tree, "bm25", [501, 502])
    nodes = tl.nodes(tiling)
    assert (0, 37) in nodes and (0, 38) in nodes
    first = [(int(level[0]), int(index[0])) for level, index in
             zip(focus.history.gist_level, focus.history.gist_index, strict=True)][:3]  # fmt: skip
    assert first == [(3, 2), (2, 9), (1, 37)]
    assert (focus.history.kind >= 0).all()  # nothing is opened only to be closed again


def test_the_tail_does_not_find_itself(tree):
    """When the newest text is the query, the block beside it must not count as holding it."""
    _, tiling = settled(tree, "bm25", [*range(600, 608), 20])
    assert (0, 20) in tl.nodes(tiling)


def test_what_is_left_goes_to_the_newest_text(tree):
    _, tiling = settled(tree, "bm25", [501])
    nodes = tl.nodes(tiling)
    raw = [index for level, index in nodes if level == 0]
    assert raw[-2:] == [98, 99]
    left = BUDGET - int(tl.cost(LAYOUT, tiling))
    cheapest = min(int(LAYOUT.expand_costs[level]) for level, _ in nodes if level)
    assert left < cheapest


def test_a_question_without_a_known_word_leaves_the_newest_text(tree):
    _, tiling = settled(tree, "bm25", [999])
    _, newest = settled(tree, "recency", [999])
    raw = [index for level, index in tl.nodes(tiling) if level == 0]
    assert raw == [index for level, index in tl.nodes(newest) if level == 0]


def test_so_many_nodes_are_opened_and_no_more(tree):
    _, tiling = settled(tree, "bm25", [501], iterations=2)
    assert (1, 37) in tl.nodes(tiling)


def test_a_context_that_is_too_small_is_said_before_the_history_is_read(tree):
    class Reading:
        def rank(self, *_):
            raise AssertionError("the history was read")

    focus = Focus(tree, LAYOUT, RuntimeConfig(16, "match"), finder=Reading())
    with pytest.raises(ConfigError, match="raise W"):
        focus.settle(np.asarray([501]))
