"""Answers that were cut shorter or decoded with nudges stand beside the greedy ones."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax.backbones.testing import byte_reader as reader
from latent_jax.core.config import parse
from latent_jax.core.errors import ConfigError
from latent_jax.data.squad import QAExample
from latent_jax.report.record import headline
from latent_jax.systems.latentwire import baselines, evaluate
from latent_jax.systems.latentwire.config import EvalConfig
from latent_jax.systems.latentwire.extraction import check_rules, extract
from latent_jax.systems.latentwire.given import Asked, prefill
from latent_jax.systems.latentwire.nudge_config import NudgeConfig
from latent_jax.systems.latentwire.nudges import nudged
from latent_jax.systems.latentwire.prompts import PromptBuilder, PromptConfig, pad_rows
from latent_jax.systems.latentwire.scoring import decode

BUILDER = PromptBuilder(reader().tokenizer, PromptConfig(question="\n{q}"))
NEW = 6


@pytest.mark.parametrize(
    "rule, said, kept",
    [
        ("words:1", "Denver Broncos", "Denver"),
        ("words:3", "in 1911", "in 1911"),
        ("words:3", "", ""),
        ("punctuation", "Denver Broncos, who won", "Denver Broncos"),
        ("punctuation", "3.5 million. Then", "3.5 million"),
        ("punctuation", "the mill (Dunmore)", "the mill"),
        ("punctuation", "St. Paul", "St"),
        ("punctuation", "nothing to cut", "nothing to cut"),
        ("punctuation", ". the", ""),
    ],
)
def test_rules_cut_answers(rule, said, kept):
    assert extract(rule, said) == kept


@pytest.mark.parametrize("rule", ["words:0", "words", "spans", "words:-1"])
def test_unknown_rules_are_refused(rule):
    with pytest.raises(ConfigError, match="eval.extract: unknown rule"):
        check_rules([rule])
    with pytest.raises(ConfigError, match="eval.extract"):
        parse(EvalConfig, {"extract": [rule]})


def test_schedules_and_bans():
    assert NudgeConfig(gain=0.5).gains(3).tolist() == [0.5] * 3
    assert NudgeConfig(gain=0.0, gain_tokens=4).gains(5).tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert not NudgeConfig().on and NudgeConfig(ban_eos=1).on
    size, eos = reader().config.vocab_size, reader().tokenizer.eos_id
    banned = NudgeConfig(ban_eos=1, min_tokens=2).banned(BUILDER, size, 4)
    assert banned[0, eos] and banned[:2, BUILDER.stop_id].all() and not banned[2:].any()
    assert banned.sum() == 2 * len(BUILDER.stop_ids)
    bare = PromptBuilder(reader().tokenizer, PromptConfig(answer="{a}"))
    banned = NudgeConfig(not_first=("t",)).banned(bare, size, 4)
    assert np.argwhere(banned).tolist() == [[0, ord("t")]]
    with pytest.raises(ConfigError, match=r"not_first: 'the' .* is 3 tokens"):
        NudgeConfig(not_first=("the",)).banned(bare, size, 4)
    with pytest.raises(ConfigError, match="a gain of 1 has no way back"):
        parse(EvalConfig, {"nudges": {"gain_tokens": 2}})


@pytest.fixture(scope="module")
def asked():
    """Texts of several lengths as a prefix, behind which are questions of several lengths."""
    rng = np.random.default_rng(0)
    texts = pad_rows([rng.integers(97, 122, n).tolist() for n in (8, 5, 3)], 8)
    prompts = pad_rows([rng.integers(97, 122, n).tolist() for n in (4, 6, 2)], 6, left=True)
    body, params = reader().decoder, reader().params
    given = baselines.Given(prefill(body, params, *texts), None, None, texts[1].sum(-1))
    return Asked(given, *map(jnp.asarray, prompts))


def run(asked, rows=(0, 1, 2), **nudges):
    options = {"sink": False, "rows": np.array(rows), "seed": 0}
    return nudged(reader(), asked, NEW, NudgeConfig(**nudges), BUILDER, **options)


def test_without_a_nudge_it_is_greedy_decoding(asked):
    greedy = decode(reader(), asked, NEW, BUILDER.stop_ids)
    same = run(asked)
    np.testing.assert_array_equal(same[1], greedy[1])
    for ours, theirs, n in zip(same[0], *greedy, strict=True):
        np.testing.assert_array_equal(ours[:n], theirs[:n])
    # The smallest nucleus is the best token.
    np.testing.assert_array_equal(run(asked, first_top_p=1e-6)[0], same[0])


def test_a_gain_is_of_the_text_alone_and_follows_its_schedule(asked):
    plain, loud = run(asked)[0], run(asked, gain=30.0)[0]
    assert (plain != loud).any()
    kv = asked.given.kv
    by_hand = asked._replace(given=asked.given._replace(kv=kv._replace(v=30 * kv.v)))
    np.testing.assert_array_equal(loud, run(by_hand)[0])
    once = run(asked, gain=30.0, gain_tokens=1)[0]
    np.testing.assert_array_equal(once[:, 0], loud[:, 0])
    assert (once != loud).any()
    # The sink is no text.
    rows = {"sink": True, "rows": np.arange(3)}
    spared = nudged(reader(), asked, NEW, NudgeConfig(gain=30.0), BUILDER, **rows)[0]
    by_hand = asked._replace(
        given=asked.given._replace(kv=kv._replace(v=kv.v.at[:, :, 1:].multiply(30)))
    )
    np.testing.assert_array_equal(spared, run(by_hand)[0])


def test_what_is_banned_is_not_said_and_draws_follow_the_question(asked):
    first = int(run(asked)[0][0, 0])
    stops = PromptBuilder(reader().tokenizer, PromptConfig(question="\n{q}"))
    stops.stop_ids = (first,)  # greedily, the first answer is empty
    options = {"sink": False, "rows": np.arange(3)}
    assert nudged(reader(), asked, NEW, NudgeConfig(), stops, **options)[1][0] == 1
    said, lengths = nudged(reader(), asked, NEW, NudgeConfig(min_tokens=3), stops, **options)
    assert lengths[0] > 3 and first not in said[0, :3]
    drawn = [run(asked, rows, first_top_p=1.0)[0][:, 0] for rows in ((0, 1, 2), (3, 1, 4))]
    assert (drawn[0] != run(asked)[0][:, 0]).any()
    assert drawn[0][1] == drawn[1][1]


def test_they_are_reported_beside_the_greedy_score():
    settings = {"ratio": 4.0, "batch_size": 4, "segment": 16, "max_new_tokens": 4}
    arms = ("full_text", "no_context")
    rows = [QAExample(f"{i}", "t", f"k{i}: {i}{i}.", f"k{i}?", (f"{i}{i}",)) for i in range(3)]
    call = (reader(), None, rows, arms)
    plain, samples = evaluate.evaluate_qa(*call, builder=BUILDER, score=False, **settings)
    found, same = evaluate.evaluate_qa(
        *call, builder=BUILDER, score=False, extract=("words:1", "punctuation"),
        nudges=NudgeConfig(min_tokens=4, ban_eos=4), **settings,
    )  # fmt: skip
    assert {k: v for k, v in found.items() if k in plain} == plain and same == samples
    beside = {k for k in found if k not in plain}
    for kind in ("extract.words1", "extract.punctuation", "nudged"):
        for arm in arms:
            assert {f"squad.{kind}.f1.{arm}", f"squad.{kind}.f1.{arm}.ci95"} <= beside
    assert all(k.startswith(("squad.extract.", "squad.nudged.")) for k in beside)
    assert not beside & set(headline(found, limit=100))
