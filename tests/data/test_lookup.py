"""Key lookup."""

from __future__ import annotations

import re

import pytest

from latent_jax.core.errors import DataError
from latent_jax.data import load_squad, lookup_examples, lookup_texts


def _facts(context):
    return dict(re.findall(r"(\w+): (\w+)\.", context))


@pytest.mark.parametrize("values", ["number", "word"])
def test_answers_follow_from_the_context(values):
    for example in lookup_examples(100, values=values, pairs=(2, 6)):
        facts = _facts(example.context)
        assert 2 <= len(facts) <= 6
        (answer,) = example.answers
        assert facts[example.question.rstrip("?")] == answer
        (start,) = example.starts
        assert example.context[start : start + len(answer)] == answer


def test_determinism_and_disjoint_splits():
    assert lookup_examples(50, seed=4) == lookup_examples(50, seed=4)
    assert lookup_examples(50, seed=4) != lookup_examples(50, seed=5)
    train = {e.context for e in lookup_examples(2000)}
    held = lookup_examples(200, split="validation")
    assert not train & {e.context for e in held}
    assert load_squad("lookup", "validation") == held


def test_options_in_the_name_of_the_source():
    got = load_squad("lookup:pairs=2-3,values=word,n=12,seed=5", "train")
    assert got == lookup_examples(12, 5, "train", (2, 3), "word")
    assert len(load_squad("lookup:pairs=3", "all")) == 4200
    for bad in ("lookup:pairs=x", "lookup:keys=3", "lookup:n", "lookup:n=0", "lookup:pairs=1-2-3"):
        with pytest.raises(DataError, match="lookup"):
            load_squad(bad, "train")


def test_a_constant_answer_is_worth_little():
    answers = [e.answers[0] for e in lookup_examples(1000)]
    assert max(map(answers.count, set(answers))) < 40


def test_texts_are_solved_episodes_between_prose():
    prose = ["once upon a time", "the end"]
    texts = lookup_texts(20, questions=2, mix=prose)
    assert len(texts) == 22 and set(prose) < set(texts)
    for text in set(texts) - set(prose):
        context, rest = text.split("\n", 1)
        solved = re.findall(r"Q: (\w+)\?\nA: (\w+)\n", rest)
        assert len(solved) == 2
        assert all(_facts(context)[key] == value for key, value in solved)


def test_texts_keep_a_template_with_braces():
    (text,) = lookup_texts(1, questions=1, template="<{context}> {x} {question} {answer}|")
    assert re.fullmatch(r"<(\w+: \d+\. ?)+> \{x\} \w+\? \d+\|", text)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"n": 0}, "n=0"),
        ({"pairs": (5, 2)}, "pairs="),
        ({"values": "colour"}, "values='colour'"),
        ({"template": "{context} {question}"}, "lacks {answer}"),
        ({"questions": 0}, "questions=0"),
    ],
)
def test_bad_options(options, says):
    with pytest.raises(DataError, match=re.escape(says)):
        lookup_texts(**({"n": 3} | options))
