"""Training batches of LatentWire: lengths, ragged ends, one record format for every task."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from latent_jax.backbones.tokenizer import ByteTokenizer
from latent_jax.core.config import parse
from latent_jax.core.errors import ConfigError
from latent_jax.systems.latentwire import recipe
from latent_jax.systems.latentwire.config import EncoderConfig, LatentWireRun
from latent_jax.systems.latentwire.prompts import PromptBuilder


def config(**data):
    return parse(
        LatentWireRun,
        {
            "system": "latentwire",
            "name": "x",
            "model": {"segment": 32},
            "data": {"text": "pydoc", "qa": "embedded", "length": 32, "segments": 64, **data},
            "train": {"steps": 1, "batch_size": 4},
        },
        "test",
    )


def batches(n, **data):
    cfg, tokenizer = config(**data), ByteTokenizer()
    stream = recipe.train_stream(cfg, tokenizer, PromptBuilder(tokenizer, cfg.prompt))
    return [next(stream) for _ in range(n)]


def test_every_batch_has_one_length_and_equally_many_tokens():
    shapes = {b["context"].shape for b in batches(24, lengths=[8, 16, 32])}
    assert shapes == {(16, 8), (8, 16), (4, 32)}


def test_short_texts_are_parts_of_the_long_ones():
    cfg, tokenizer = config(lengths=[8, 32]), ByteTokenizer()
    short, n = recipe._text_records(cfg, tokenizer, "reconstruct", 8)
    whole, _ = recipe._text_records(cfg, tokenizer, "reconstruct", 32)
    joined = np.concatenate([short(i)["context"] for i in range(4)])
    np.testing.assert_array_equal(joined, whole(0)["context"])
    assert n == 4 * 64


def test_ragged_share_ends_inside_a_span():
    lengths = [int(b["context_mask"][i].sum()) for b in batches(16, ragged=0.5) for i in range(4)]
    assert set(lengths) == {29, 30, 31, 32}
    assert 0.3 < np.mean(np.array(lengths) < 32) < 0.7


def test_a_continuation_follows_its_context():
    cfg, tokenizer = config(mix={"continue": 1.0}, continuation=8, ragged=1.0), ByteTokenizer()
    get, _ = recipe._text_records(cfg, tokenizer, "continue", 32)
    windows = recipe.text_segments(cfg, tokenizer, "train", 64, 8)
    record = get(3)
    joined = np.concatenate([record["context"], record["inputs"]])
    np.testing.assert_array_equal(joined, windows[3][: len(joined)])
    assert len(record["inputs"]) == 8


def test_evaluation_reads_its_own_texts(tmp_path):
    (tmp_path / "a.txt").write_text("aaaaaaa " * 2000)
    (tmp_path / "b.txt").write_text("bbbbbbb " * 2000)
    cfg = config(text=str(tmp_path / "a.txt"))
    cfg = dataclasses.replace(
        cfg, eval=dataclasses.replace(cfg.eval, text=str(tmp_path / "b.txt"), length=16)
    )
    tokenizer = ByteTokenizer()
    train = recipe.text_segments(cfg, tokenizer, "train", 4)
    held = recipe.text_segments(cfg, tokenizer, "validation", 4)
    assert train.shape == (4, 32) and held.shape == (4, 16)
    assert set(tokenizer.decode(train[0].tolist())) == {"a", " "}
    assert set(tokenizer.decode(held[0].tolist())) == {"b", " "}


def test_lengths_must_divide_the_longest():
    with pytest.raises(ConfigError, match="do not divide"):
        config(lengths=[12])


def test_pooling_the_cache_of_an_adapted_llm_is_refused():
    for slots in ("pooled", "both"):
        with pytest.raises(ConfigError, match="needs encoder.lora_on=memory"):
            EncoderConfig(slots=slots, lora_on="all", view="text").validate()
