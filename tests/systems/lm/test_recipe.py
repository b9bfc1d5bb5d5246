"""Rows of the language model's mixture: what is supervised, and what may see what."""

from __future__ import annotations

import numpy as np
import pytest

from latent_jax.core.errors import ConfigError, DataError
from latent_jax.data.lookup import KEYS
from latent_jax.systems.latentwire.prompts import PromptBuilder
from latent_jax.systems.lm import recipe
from latent_jax.systems.lm.config import LMDataConfig, StageConfig, TokenizerConfig


@pytest.fixture(scope="module")
def tokenizer():
    return recipe.make_tokenizer(TokenizerConfig(kind="bytes"), LMDataConfig())


def test_answers_and_only_answers_of_a_lookup_are_supervised(tokenizer):
    stage = StageConfig(length=200, mix={"lookup": 1.0}, pairs=(2, 3), questions=3)
    for ids, marks in recipe.lookup_documents(tokenizer, LMDataConfig(), stage, 5, seed=0):
        text = tokenizer.decode(ids)
        facts = dict(f.split(": ") for f in text.split("\n")[0].rstrip(".").split(". "))
        asked = [line.split()[1].rstrip("?") for line in text.split("\n") if "Question" in line]
        shown = tokenizer.decode([i for i, m in zip(ids, marks, strict=True) if m == 2])
        assert shown == "".join(f" {facts[key]}\n" for key in asked)


def test_copies_repeat_and_supervise_the_second_half(tokenizer):
    stage = StageConfig(length=64, mix={"copy": 1.0}, copy=(4, 10))
    documents = recipe.copy_documents(
        tokenizer, ["some words to be copied " * 20], LMDataConfig(), stage, 12, 1
    )
    lengths = set()
    for ids, marks in documents:
        half = len(ids) // 2
        assert ids[:half] == ids[half:] and marks == [0] * half + [3] * half
        lengths.add(half - 1)
    assert lengths <= set(range(4, 11)) and len(lengths) > 2


def test_rows_pack_marks_beside_their_tokens(tokenizer):
    stage = StageConfig(rows=40, length=160, mix={"text": 1, "lookup": 2, "copy": 1}, pairs=(2, 2),
                        questions=2, copy=(4, 12))  # fmt: skip
    rows = recipe.rows(tokenizer, LMDataConfig(), stage)
    assert {v.shape for v in rows.values()} == {(40, 160)}
    assert set(np.unique(rows["kinds"])) == {0, 1, 2, 3}
    assert not rows["kinds"][rows["segment_ids"] == 0].any()
    assert not rows["kinds"][rows["positions"] == 0].any()
    again = recipe.rows(tokenizer, LMDataConfig(), stage)
    assert all((rows[k] == again[k]).all() for k in rows)
    held_out = recipe.rows(tokenizer, LMDataConfig(), stage, split="validation")
    seen = {tuple(r) for r in rows["tokens"].tolist()}
    assert not seen & {tuple(r) for r in held_out["tokens"].tolist()}


def test_a_lookup_that_fits_no_row_is_refused(tokenizer):
    stage = StageConfig(length=64, mix={"lookup": 1.0}, pairs=(8, 8), questions=5)
    with pytest.raises(DataError, match="does not fit rows of 64"):
        recipe.rows(tokenizer, LMDataConfig(), stage)


def test_impossible_stages_are_refused():
    with pytest.raises(ConfigError, match="unknown kind"):
        StageConfig(mix={"poems": 1.0}).validate()
    with pytest.raises(ConfigError, match="must fit a row"):
        StageConfig(length=32, copy=(4, 20)).validate()
    with pytest.raises(ConfigError, match="must end with the answer"):
        LMDataConfig(template="{context} {question} {answer}").validate()


def test_trained_tokenizer_is_deterministic_and_keeps_the_task_whole(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("plain words that stand for running text\n" * 50)
    source = LMDataConfig(text=str(text))
    config = TokenizerConfig(vocab_size=900)
    one, two = (recipe.make_tokenizer(config, source) for _ in range(2))
    assert one.sha256 == two.sha256
    words = [*KEYS, *(f" {k}" for k in KEYS), *(f" {n}" for n in range(10, 100)), "\n", " Question"]
    assert {len(one.encode(w)) for w in words[:-1]} == {1}


def test_layout_is_the_one_that_latentwire_asks_in(tokenizer):
    builder = PromptBuilder(tokenizer)
    ids = builder.context_ids("amber: 42.") + builder.prompt_ids("amber?")
    ids += builder.answer_ids("42")
    layout = LMDataConfig().template
    text = layout.replace("{context}", "amber: 42.").replace("{question}", "amber?")
    assert tokenizer.decode(ids) == text.replace("{answer}", "42")


def test_digits_are_tokens_of_their_own_where_wanted():
    joined, apart = (
        recipe.make_tokenizer(TokenizerConfig(digits=d), LMDataConfig())
        for d in (False, True)
    )
    text = "amber: 42. in 1984\n"
    assert apart.decode(apart.encode(text)) == text
    assert len(joined.encode(" 42")) == 1
    assert [apart.decode([i]) for i in apart.encode(" 42")] == [" 4", "2"]
    pieces = (apart.decode([i]) for i in range(apart.vocab_size))
    assert not [p for p in pieces if sum(c.isdigit() for c in p) > 1]
