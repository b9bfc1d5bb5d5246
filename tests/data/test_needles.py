"""Needle episodes: facts where they are said to be, answers only there, the same for a seed."""

from __future__ import annotations

import itertools
import re

import pytest

from latent_jax.core.errors import DataError
from latent_jax.data import needles
from latent_jax.data.paraphrases import PARAPHRASES

PROSE = " ".join(
    f"The {a} walked to the {b} and sat down for a while." for a, b in itertools.product(
        ("farmer", "sailor", "baker", "doctor", "miller"),
        ("river", "market", "harbour", "chapel", "orchard", "quarry"),
    )
)  # fmt: skip
CODE = "\n".join(f"def f{i}(x):\n    return x * {i} + {i % 7}\n" for i in range(60))


def words(text: str) -> int:
    return len(text.split())


BUILDERS = {
    "passkey": lambda seed: needles.passkey(PROSE, 5000, 0.4, seed),
    "key_value": lambda seed: needles.key_value(PROSE, 5000, 0.4, seed),
    "paraphrased": lambda seed: needles.paraphrased(PROSE, 5000, 0.4, seed),
    "two_hop": lambda seed: needles.two_hop(PROSE, 5000, (0.2, 0.8), seed),
    "straddling": lambda seed: needles.straddling(PROSE, 5000, 0.4, words, 32, seed),
    "topic_switch": lambda seed: needles.topic_switch([PROSE, CODE], 5000, 1, seed),
    "late_query": lambda seed: needles.late_query([PROSE, CODE], 5000, 0.4, seed),
}


@pytest.mark.parametrize("kind", BUILDERS)
def test_what_every_episode_is(kind):
    one, same, other = (BUILDERS[kind](seed) for seed in (0, 0, 1))
    assert one == same and one != other and one.kind == kind
    assert 4000 < len(one.text) < 6500
    facts = [one.text[start:stop] for start, stop in one.needles]
    number = one.answer.strip()
    # The answer is in its facts, and nowhere else.
    assert number in facts[-1] and all(f.endswith(".") for f in facts)
    outside = one.text
    for fact in facts:
        assert outside.count(fact) == 1
        outside = outside.replace(fact, "")
    assert number not in outside and number not in one.question
    assert one.answer not in one.distractors and len(set(one.distractors)) == len(one.distractors)
    assert all(len(wrong) == len(one.answer) for wrong in one.distractors)
    assert list(one.needles) == sorted(one.needles)


def test_a_paraphrase_shares_no_content_word():
    plain = set("a an the in of for with from at by on to is are was were he she it his her they we that this these those there do did does can one has have until any not no or and".split())  # fmt: skip  # noqa: E501
    for said, asked, begun in PARAPHRASES:
        fact, question = (
            set(re.findall(r"[a-z]+", part.replace("{n}", "").lower())) - plain
            for part in (said, f"{asked} {begun}")
        )
        assert len(fact) >= 3 and len(question) >= 3 and not fact & question


@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("filler", [PROSE, CODE, "x" * 50])
def test_a_needle_lies_at_its_depth(depth, filler):
    episode = needles.passkey(filler, 20_000, depth)
    start, stop = episode.needles[0]
    middle = start / (len(episode.text) - (stop - start))
    assert middle == pytest.approx(depth, abs=0.03)


def test_a_needle_stands_between_sentences():
    episode = needles.passkey(PROSE, 5000, 0.5)
    start, stop = episode.needles[0]
    assert episode.text[:start].endswith(". ") and episode.text[stop:].startswith(" The ")


def test_distractors_of_the_text_are_in_the_text():
    episode = needles.key_value(PROSE, 5000, 0.4, pairs=5)
    assert len(episode.distractors) == 4
    assert all(f"is{wrong}." in episode.text for wrong in episode.distractors)
    chain = needles.two_hop(PROSE, 5000, (0.9, 0.1), chains=3)
    assert len(chain.needles) == 2 and len(chain.distractors) == 2
    keeps, holds = sorted((chain.text[a:b] for a, b in chain.needles), key=len)
    box = keeps.split()[3]
    assert holds.startswith(f"The {box} box") and chain.answer.strip() in holds
    assert keeps.split()[0] in chain.question and box not in chain.question
    # Depths are of the facts, not of the order in which they are read.
    assert chain.text.index(holds) < chain.text.index(keeps)


@pytest.mark.parametrize("block", [8, 32])
@pytest.mark.parametrize("seed", range(5))
def test_a_straddling_needle_is_cut_by_a_block(block, seed):
    episode = needles.straddling(PROSE, 8000, 0.3 + 0.1 * seed, words, block, seed)
    start, stop = episode.needles[0]
    first, last = words(episode.text[:start]), words(episode.text[:stop])
    assert last - first == 5
    cut = block - first % block
    # As near to the middle of its five words as a whole word allows.
    assert cut in (2, 3)


def test_topics_come_back():
    episode = needles.topic_switch([PROSE, CODE], 9000, rounds=2)
    assert len(episode.switches) == 4 and len(episode.distractors) == 3
    edges = [0, *episode.switches, len(episode.text)]
    parts = [episode.text[a:b] for a, b in itertools.pairwise(edges)]
    assert ["def f" in part for part in parts] == [False, True, False, True, False]
    assert [part.count("The code of") for part in parts] == [1, 1, 1, 1, 0]
    start, stop = episode.needles[0]
    assert stop < episode.switches[0] and episode.answer.strip() in episode.text[start:stop]


def test_a_late_question_comes_after_another_text():
    episode = needles.late_query([PROSE, CODE], 6000, 0.7, pairs=5)
    (switch,), (start, stop) = episode.switches, episode.needles[0]
    first, second = episode.text[:switch], episode.text[switch:]
    assert first.count("The code of") == 5 and "The code of" not in second
    assert "def f" not in first and "def f" in second and len(episode.distractors) == 4
    assert 0.5 < start / switch < 0.85 and episode.answer.strip() in first[start:stop]


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda: needles.passkey("  ", 100, 0.5), "filler holds no text"),
        (lambda: needles.passkey(PROSE, 0, 0.5), "length=0"),
        (lambda: needles.passkey(PROSE, 100, 1.5), "depth=1.5 must be 0 to 1"),
        (lambda: needles.passkey(PROSE, 100, 0.5, distractors=-1), "distinct numbers"),
        (lambda: needles.key_value(PROSE, 100, 0.5, pairs=1), "pairs=1"),
        (lambda: needles.two_hop(PROSE, 100, (0, 1), chains=99), "chains=99 must be 2 to 24"),
        (lambda: needles.straddling(PROSE, 400, 0.0, words), "no boundary of 32-token blocks"),
        (lambda: needles.topic_switch([PROSE], 100), "1 fillers in 1 rounds"),
        (lambda: needles.late_query([PROSE], 100, 0.5), "1 fillers; it needs two"),
        (lambda: needles.late_query([PROSE, CODE], 100, 0.5, pairs=1), "late_query: pairs=1"),
    ],
)
def test_what_cannot_be_is_refused(call, problem):
    with pytest.raises(DataError, match=problem):
        call()
