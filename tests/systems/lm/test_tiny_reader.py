"""The shipped tiny readers do what their records say."""

from __future__ import annotations

import json

import numpy as np
import pytest

from latent_jax import backbones
from latent_jax.assets import asset
from latent_jax.data import lookup_examples
from latent_jax.systems.latentwire.prompts import PromptBuilder

FOLDERS = {"tiny": "tiny_reader", "tiny_qwen3": "tiny_qwen3"}


@pytest.fixture(scope="module", params=FOLDERS)
def reader(request):
    return backbones.load(request.param)


def test_size(reader):
    files = [p for p in asset(FOLDERS[reader.name]).iterdir() if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 4_500_000
    assert reader.parameter_count() <= 2_000_000


def test_it_answers_lookups_from_full_text_and_cannot_without(reader):
    builder = PromptBuilder(reader.tokenizer)
    examples = lookup_examples(60, seed=123, split="validation")

    def right(context):
        prompts = [
            builder.context_ids(context(e)) + builder.prompt_ids(e.question) for e in examples
        ]
        said = reader.generate(
            prompts, max_new_tokens=4, stop=list(builder.stop_ids), return_ids=True, batch_size=60
        )
        hits = [builder.text(s) == e.answers[0] for s, e in zip(said, examples, strict=True)]
        return np.mean(hits)

    assert right(lambda e: e.context) >= 0.9
    assert right(lambda e: "") <= 0.1


def test_they_are_of_two_families_and_tokenizers():
    one, two = (backbones.outline(name) for name in FOLDERS)
    assert (one.config.family, two.config.family) == ("llama", "qwen3")
    assert two.config.qk_norm and not one.config.qk_norm
    assert one.config.hidden_size != two.config.hidden_size
    assert one.config.num_layers != two.config.num_layers
    assert len(one.tokenizer.encode(" 42")) == 1 and len(two.tokenizer.encode(" 42")) == 2


def test_it_copies(reader):
    rng = np.random.default_rng(0)
    words = ["value", "string", "the", "object", "is", "returned", "function", "of", "class"]
    newline = reader.tokenizer.encode("\n")
    # No word twice: after a repeated word an induction head cannot know which copy to follow.
    rows = [reader.tokenizer.encode(" ".join(rng.permutation(words)[:8])) for _ in range(16)]
    said = reader.generate(
        [[*r, *newline] for r in rows], max_new_tokens=8, return_ids=True, batch_size=16
    )

    def overlap(targets):
        pairs = zip(said, targets, strict=True)
        return np.mean([np.mean(np.array(s[: len(r)]) == r[: len(s)]) for s, r in pairs])

    assert overlap(rows) >= 0.5
    assert overlap(rows[1:] + rows[:1]) <= 0.2


@pytest.mark.parametrize("folder", FOLDERS.values())
def test_record_says_how_it_was_made(folder):
    record = json.loads((asset(folder) / "record.json").read_text())
    assert {"config", "environment", "results", "curve", "parameters"} <= set(record)
    assert record["results"]["lookup.full_text.f1"] >= 0.95
    assert record["config"]["seed"] is not None and len(record["curve"]) >= 5
