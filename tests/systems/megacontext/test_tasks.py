"""Hidden facts: where they land, what a tiling opened there looks like, and who finds them."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from latent_jax import backbones
from latent_jax.core.errors import DataError
from latent_jax.run import resolve
from latent_jax.systems.megacontext import recipe, tasks
from latent_jax.systems.megacontext.episodes import SWITCHING, Episode, Filler, episodes, evenly
from latent_jax.systems.megacontext.eval_config import TASKS
from latent_jax.systems.megacontext.layout import Layout
from latent_jax.systems.megacontext.memory import Memory
from latent_jax.systems.megacontext.model_config import GistConfig, ModelConfig
from latent_jax.systems.megacontext.system import MegaContextSystem

LAYOUT = Layout(block=16, branching=8, slots=(2, 2), protected=1)
TEXT = "The wind had dropped by noon. Nobody came to the mill. " * 30
OTHER = "Ships lay in the harbour. Sailors sang on deck. " * 30


@pytest.fixture(scope="module")
def base():
    return backbones.load("tiny")


@pytest.fixture(scope="module")
def tokenizer(base):
    return base.tokenizer


@pytest.fixture(scope="module")
def filler(tokenizer):
    return Filler(TEXT, np.asarray(tokenizer.encode(TEXT), np.int32))


@pytest.fixture(scope="module")
def topics(filler, tokenizer):
    return [filler, Filler(OTHER, np.asarray(tokenizer.encode(OTHER), np.int32))]


@pytest.mark.parametrize("kind", TASKS)
def test_a_fact_lies_in_the_blocks_that_are_named(kind, tokenizer, filler, topics):
    made = list(episodes(kind, filler, topics, tokenizer, 16, 96, evenly(3)))
    for one in made:
        assert len(one.ids) == 96 * 16
        blocks = one.ids.reshape(96, 16)
        facts = tokenizer.decode(blocks[one.needle].reshape(-1))
        answer = tokenizer.decode(one.answers[0]).strip()
        assert answer in facts and len(one.answers) >= (4 if kind == "two_hop" else 8)
        around = [row for i, row in enumerate(blocks) if i not in one.needle]
        assert answer not in tokenizer.decode(np.concatenate(around))
        assert kind != "straddling" or len(one.needle) > 1
    depths = [one.needle[0] / 96 for one in made]
    assert depths == sorted(depths) and depths[0] < depths[-1]
    if kind not in ("two_hop", *SWITCHING):  # those stay in their part of the history
        assert depths[0] < 0.5 < depths[-1]


def test_two_hops_are_half_a_history_apart(tokenizer, filler):
    for one in episodes("two_hop", filler, [], tokenizer, 16, 96, [0.0, 1.0]):
        keeps, holds = (tokenizer.decode(one.ids.reshape(96, 16)[hop].reshape(-1))
                        for hop in one.hops)  # fmt: skip
        assert " keeps the " in keeps and "holds the number" in holds
        assert tokenizer.decode(one.answers[0]).strip() in holds
        assert 32 < one.hops[1][0] - one.hops[0][0] < 72


@pytest.mark.parametrize(("kind", "parts"), [("late_query", 2), ("topic_switch", 9)])
def test_topics_switch_after_the_fact(kind, parts, tokenizer, filler, topics):
    for depth in (0.0, 1.0):
        one = next(episodes(kind, filler, topics, tokenizer, 16, 144, [depth]))
        said = [tokenizer.decode(row) for row in one.ids.reshape(-1, 48)]
        # Which of the topics each three blocks are of, those of both apart.
        words = [["mill" in x or "wind" in x, "harbour" in x or "deck" in x] for x in said]
        first = [one for one, other in words if one != other]
        assert np.count_nonzero(np.diff(first)) == parts - 1
        assert one.needle[-1] < 144 / parts + 8
        assert abs(np.mean(first) - (parts + 1) // 2 / parts) < 0.15


def test_held_out_text_has_two_topics(tmp_path):
    config = resolve("megacontext/tiny", {})
    whole, (first, second) = recipe.filler(config), recipe.topics(config)
    assert first + second == whole and abs(len(first) - len(second)) < 0.2 * len(whole)
    (tmp_path / "ships.txt").write_text(OTHER)
    config = resolve("megacontext/tiny", {"eval.topic": str(tmp_path / "ships.txt")})
    first, second = recipe.topics(config)
    assert first == whole and second and second in OTHER


def test_a_history_too_short_for_the_fact_is_said(tokenizer, filler):
    with pytest.raises(DataError, match="raise eval.task_blocks"):
        next(episodes("passkey", filler, [], tokenizer, 16, 4, [0.5]))


def test_a_tiling_is_opened_only_where_the_fact_is():
    gist = tasks.opened(LAYOUT, 25, set(), {10})
    assert gist == [(2, 0), *((1, i) for i in range(8, 16)), (2, 2)]
    fine = tasks.opened(LAYOUT, 25, {10})
    assert fine[3] == (0, 10) and fine.count((1, 10)) == 0 and len(fine) == 10
    both = tasks.opened(LAYOUT, 25, {10}, {3, 10})
    assert both[:8] == [(1, i) for i in range(8)] and both[8:] == fine[1:]
    assert tasks.opened(LAYOUT, 25) == [(2, 0), (2, 1), (2, 2)]


def test_levels_are_added_until_the_history_fits():
    one = dataclasses.replace(LAYOUT, slots=(2,))
    assert tasks.roomy(one, 100, 1024).slots == (2,)
    assert tasks.roomy(one, 60_000, 1024).slots == (2, 2, 2, 2)


@pytest.mark.parametrize("kind", ["passkey", "key_value", "straddling", "late_query"])
def test_a_search_finds_by_words_and_not_by_chance(kind, tokenizer, filler, topics):
    """A hundred thousand tokens, four levels, 256 entries; no language model anywhere."""
    policies = ["bm25", "random", "recency"]
    length = 102_400
    found = tasks.reach(
        tokenizer, 1024, LAYOUT, filler, topics, [kind], policies, 256, [length], evenly(4)
    )
    assert found[f"reach.{kind}.t{length}.bm25"] == 1
    assert found[f"reach.{kind}.t{length}.random"] <= 0.25
    assert found[f"reach.{kind}.t{length}.recency"] <= 0.25
    assert len(found[f"reach.{kind}.t{length}.bm25.ci95"]) == 2


def test_two_facts_are_found_when_both_are(tokenizer, filler):
    """Words of the question lead to who keeps the box, but not to what is in it."""
    found = tasks.reach(
        tokenizer, 1024, LAYOUT, filler, [], ["two_hop"], ["bm25", "recency"], 256, [25_600],
        evenly(4),
    )  # fmt: skip
    hops = [found[f"reach.two_hop.t25600.bm25.hop{i}"] for i in (1, 2)]
    assert hops[0] == 1 and found["reach.two_hop.t25600.bm25"] <= min(hops)
    assert found["reach.two_hop.t25600.recency"] < hops[0]


def test_a_depth_has_results_of_its_own(tokenizer, filler):
    found = tasks.reach(
        tokenizer, 1024, LAYOUT, filler, [], ["passkey"], ["recency"], 64, [1600],
        [0.0, 0.0, 1.0], by_depth=True,
    )  # fmt: skip
    values = {name: x for name, x in found.items() if not name.endswith("ci95")}
    assert values == {
        "reach.passkey.t1600.d0.recency": 0.0, "reach.passkey.t1600.d100.recency": 0.0
    }  # fmt: skip


def test_a_fact_in_the_tail_is_raw_whatever_a_policy_does(tokenizer, filler, monkeypatch):
    """A tail of all but one block holds the facts, and the policy opens nothing of it."""
    layout = Layout(block=8, branching=4, slots=(1, 1), protected=7)
    needle = Episode(filler.ids[:64], [[3, 4]], filler.ids[:5], [])
    monkeypatch.setattr(tasks, "episodes", lambda *_: iter([needle]))
    found = tasks.reach(
        tokenizer, 1024, layout, filler, [], ["passkey"], ["recency"], 60, [64], [0.5]
    )
    assert found["reach.passkey.t64.recency"] == 1.0


def test_answers_behind_every_arm(base, untrained, filler, topics, tmp_path):
    """Every task through the tiny reader: the arms, a policy and what it found."""
    model = ModelConfig(layout=LAYOUT, gist=GistConfig(window=8))
    params = untrained(base, model)
    kinds, depths = ("two_hop", "late_query"), [0.2, 0.8]
    with Memory.open(tmp_path / "s", base, model, params, "x", writable=True) as memory:
        found = tasks.measure(
            memory, filler, topics, kinds, ["bm25"], 256, 64, depths, by_depth=False
        )
    arms = {"two_hop": {"hop1", "hop2"}, "late_query": set()}
    for kind in kinds:
        for arm in {"lod0", "gist", "dropped", "bm25"} | arms[kind]:
            assert np.isfinite(found[f"task.{kind}.{arm}.nll"])
            assert 0 <= found[f"task.{kind}.{arm}.accuracy"] <= 1
    nll = [found[f"task.two_hop.{arm}.nll"] for arm in ("lod0", "gist", "dropped", "hop1", "hop2")]
    assert len(set(nll)) == 5  # no two of them read the same
    parts = [found[f"task.two_hop.bm25.found{x}"] for x in ("", ".hop1", ".hop2")]
    assert parts[0] <= min(parts[1:]) and parts[1] == 1
    assert "task.late_query.bm25.found.hop1" not in found


def test_episodes_share_the_gists_of_their_filler(base, untrained, filler, topics, tmp_path):
    """Made once and kept, they are the same bit for bit, and so is all that is measured."""
    model = ModelConfig(layout=LAYOUT, gist=GistConfig(window=8, lead=4))
    params, found, calls = untrained(base, model), [], []
    for name in ("kept", "each"):
        with Memory.open(tmp_path / name, base, model, params, "x", writable=True) as memory:
            made, build = [], memory.build
            make = memory._make
            memory._make = lambda *a, make=make, made=made: (made.append(a[-1]), make(*a))[1]
            memory.build = lambda breaks, alike, build=build, name=name: build(
                breaks=breaks, alike=alike and name == "kept"
            )
            found.append(tasks.measure(
                memory, filler, topics, ["passkey"], ["recency", "bm25"], 256, 192, [0.2, 0.5, 0.8],
                alike=True,
            ))  # fmt: skip
            calls.append(len(made))
    assert found[0] == found[1]
    assert calls[0] < 0.7 * calls[1]
    gain = found[0]["task.passkey.bm25.gain"]
    nll = [found[0][f"task.passkey.{arm}.nll"] for arm in ("recency", "bm25", "lod0")]
    assert gain == pytest.approx((nll[0] - nll[1]) / (nll[0] - nll[2]))
    assert "task.passkey.recency.gain" not in found[0]


def test_a_pass_key_by_depth_and_length():
    overrides = {
        "eval.budgets": [160], "eval.policies": ["recency"], "eval.long": 24, "eval.task_rows": 2,
        "eval.passkey_blocks": [96, 128], "eval.passkey_depths": [0.0, 0.5],
        "eval.reach": [1024], "eval.reach_budget": 160,
    }  # fmt: skip
    system = MegaContextSystem(resolve("megacontext/tiny", overrides))
    variables = system.init({"params": jax.random.key(0)}, {})
    found = system._passkey(variables, system.frozen, {}, None)
    arms = {f"{arm}.{x}" for arm in ("lod0", "gist", "dropped", "recency")
            for x in ("nll", "accuracy")} | {"recency.found"}  # fmt: skip
    wanted = {f"task.passkey.t{t}.d{d}.{arm}" for t in (768, 1024) for d in (0, 50) for arm in arms}
    wanted |= {f"reach.passkey.t1024.d{d}.recency" for d in (0, 50)}
    assert set(found) == wanted | {f"{name}.ci95" for name in wanted}
    assert np.isfinite([found[name] for name in wanted]).all()
