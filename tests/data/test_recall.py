"""Text in which facts are asked for again."""

from __future__ import annotations

import re

import pytest

from latent_jax.core.errors import DataError
from latent_jax.data.recall import recall_text
from latent_jax.data.text import load_texts

PROSE = [f"w{i}" for i in range(500)]


def _sections(text):
    """Facts, words of prose and questions of each section."""
    found = re.findall(r"((?:\w+: \d+\. )+)((?:w\d+ )+)((?:\w+\? \d+(?: |$))+)", text)
    assert "".join("".join(part) for part in found) == text
    return [
        (dict(re.findall(r"(\w+): (\d+)", facts)), prose.split(),
         re.findall(r"(\w+)\? (\d+)", asked)) for facts, prose, asked in found
    ]  # fmt: skip


def test_all_that_was_stated_is_asked_for_and_answered():
    sections = _sections(recall_text(PROSE, "train", (3, 5), (4, 9), (2, 2), sections=50))
    assert len(sections) == 50
    for facts, prose, asked in sections:
        assert 3 <= len(facts) <= 5 and 4 <= len(prose) <= 9 and len(asked) == 2 * len(facts)
        assert set(asked) == set(facts.items())
        begin = PROSE.index(prose[0])
        assert prose == PROSE[begin : begin + len(prose)]
    orders = [tuple(facts.items()) == tuple(asked[: len(facts)]) for facts, _, asked in sections]
    assert sum(orders) < 25


def test_no_other_answer_to_a_question_is_near():
    sections = _sections(recall_text(PROSE, "train", sections=200))
    for i, (facts, _, _) in enumerate(sections):
        assert not any(set(facts) & set(before) for before, _, _ in sections[max(i - 3, 0) : i])


def test_splits_and_seeds_differ_and_repeat():
    made = {
        (split, seed): recall_text(PROSE, split, sections=20, seed=seed)
        for split in ("train", "validation") for seed in (0, 1)
    }  # fmt: skip
    assert len(set(made.values())) == 4
    assert made["train", 1] == recall_text(PROSE, "train", sections=20, seed=1)


def test_options_in_the_name_of_the_source():
    (small,) = load_texts("recall:facts=2,words=3-4,times=2,sections=5,seed=3", "train")
    assert len(re.findall(r"\w+: \d+\.", small)) == 10
    assert len(re.findall(r"\w+\? \d+", small)) == 20
    assert len(load_texts("recall:sections=2", "all")) == 2
    (held,) = load_texts("recall:sections=2", "validation")
    assert load_texts("recall:sections=2", "all")[1] == held


@pytest.mark.parametrize("option, said", [
    ("facts=x", "'facts=x' is not one of"), ("keys=3", "'keys=3' is not one of"),
    ("facts=3-2", "1 <= low <= high"), ("facts=40", "<= 11"), ("words=0", "1 <= low"),
    ("sections=0", "at least 1"), ("times=1-2-3", "is not one of"),
])  # fmt: skip
def test_refused(option, said):
    with pytest.raises(DataError, match=said):
        load_texts(f"recall:{option}", "train")
