"""Hidden facts: where they land, what a tiling opened there looks like, and who finds them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from latent_jax import backbones
from latent_jax.core.errors import DataError
from latent_jax.systems.megacontext import tasks
from latent_jax.systems.megacontext.eval_config import TASKS
from latent_jax.systems.megacontext.layout import Layout

LAYOUT = Layout(block=16, branching=8, slots=(2, 2), protected=1)
TEXT = "The wind had dropped by noon. Nobody came to the mill. " * 30


@pytest.fixture(scope="module")
def tokenizer():
    return backbones.outline("tiny").tokenizer


@pytest.fixture(scope="module")
def filler(tokenizer):
    return np.asarray(tokenizer.encode(TEXT), np.int32)


@pytest.mark.parametrize("kind", TASKS)
def test_a_fact_lies_in_the_blocks_that_are_named(kind, tokenizer, filler):
    made = list(tasks.episodes(kind, TEXT, filler, tokenizer, 16, 96, rows=3))
    for one in made:
        assert len(one.ids) == 96 * 16
        first, last = one.needle[0], one.needle[-1]
        fact = tokenizer.decode(one.ids[first * 16 : (last + 1) * 16])
        answer = tokenizer.decode(one.answers[0]).strip()
        assert answer in fact and len(one.answers) >= 8
        around = np.concatenate([one.ids[: first * 16], one.ids[(last + 1) * 16 :]])
        assert answer not in tokenizer.decode(around)
        assert kind != "straddling" or len(one.needle) > 1
    depths = [one.needle[0] / 96 for one in made]
    assert depths == sorted(depths) and depths[0] < 0.5 < depths[-1]


def test_a_history_too_short_for_the_fact_is_said(tokenizer, filler):
    with pytest.raises(DataError, match="raise eval.task_blocks"):
        next(tasks.episodes("passkey", TEXT, filler, tokenizer, 16, 4, rows=1))


def test_a_tiling_is_opened_only_where_the_fact_is():
    assert tasks.opened(LAYOUT, 25, [10], 1) == [(2, 0), *((1, i) for i in range(8, 16)), (2, 2)]
    fine = tasks.opened(LAYOUT, 25, [10], 0)
    assert fine[3] == (0, 10) and fine.count((1, 10)) == 0 and len(fine) == 10
    assert tasks.opened(LAYOUT, 25, [], 0) == [(2, 0), (2, 1), (2, 2)]


def test_levels_are_added_until_the_history_fits():
    one = dataclasses.replace(LAYOUT, slots=(2,))
    assert tasks.roomy(one, 100, 1024).slots == (2,)
    assert tasks.roomy(one, 60_000, 1024).slots == (2, 2, 2, 2)


@pytest.mark.parametrize("kind", ["passkey", "key_value", "straddling"])
def test_a_search_finds_by_words_and_not_by_chance(kind, tokenizer, filler):
    """A hundred thousand tokens, four levels, 256 entries; no language model anywhere."""
    policies = ["bm25", "random", "recency"]
    length = 102_400
    found = tasks.reach(
        tokenizer, 1024, LAYOUT, TEXT, filler, [kind], policies, 256, [length], 4
    )
    assert found[f"reach.{kind}.t{length}.bm25"] == 1
    assert found[f"reach.{kind}.t{length}.random"] <= 0.25
    assert found[f"reach.{kind}.t{length}.recency"] <= 0.25
    assert len(found[f"reach.{kind}.t{length}.bm25.ci95"]) == 2


def test_a_fact_in_the_tail_is_raw_whatever_a_policy_does(tokenizer, filler, monkeypatch):
    """A tail of all but one block holds the facts, and the policy opens nothing of it."""
    layout = Layout(block=8, branching=4, slots=(1, 1), protected=7)
    needle = tasks.Episode(filler[:64], [3, 4], filler[:5], [])
    monkeypatch.setattr(tasks, "episodes", lambda *_: iter([needle]))
    found = tasks.reach(
        tokenizer, 1024, layout, "", filler, ["passkey"], ["recency"], 60, [64], 1
    )
    assert found["reach.passkey.t64.recency"] == 1.0
