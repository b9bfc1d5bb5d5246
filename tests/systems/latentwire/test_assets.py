"""Compressor files: round trip, wrong reader, damage."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from latent_jax.backbones.backbone import Backbone
from latent_jax.backbones.decoder import Decoder
from latent_jax.backbones.testing import random_params, tiny_config
from latent_jax.backbones.tokenizer import ByteTokenizer
from latent_jax.core.config import parse
from latent_jax.core.errors import CheckpointError, DataError
from latent_jax.systems.latentwire import bottleneck
from latent_jax.systems.latentwire.api import LatentWire
from latent_jax.systems.latentwire.assets import (
    WEIGHTS,
    load_compressor,
    read_compressor,
    save_compressor,
    trained_tasks,
    training_record,
)
from latent_jax.systems.latentwire.config import EncoderConfig, LatentWireRun, ModelConfig
from latent_jax.systems.latentwire.model import Compressor

READER = tiny_config("llama", vocab_size=300)
CONFIG = ModelConfig(segment=8, encoder=EncoderConfig(lora_rank=2))


def backbone(sha256="a" * 64):
    params = random_params(READER, jax.random.key(0))
    return Backbone("tiny-random", READER, params, ByteTokenizer(), sha256, Decoder(READER))


@pytest.fixture(scope="module")
def params():
    ids = np.zeros((1, 8), np.int32)
    model, reader = Compressor(CONFIG, READER), backbone().params
    return jax.jit(model.init)(jax.random.key(1), reader, ids, ids == 0)["params"]


@pytest.fixture
def directory(tmp_path, params):
    return save_compressor(tmp_path / "c", params, CONFIG, backbone(), ["reconstruct"], {"seed": 3})


def test_round_trip(directory, params):
    stored = load_compressor(directory, backbone())
    assert stored.config == CONFIG
    assert stored.record == {"seed": 3}
    assert stored.tasks == ("reconstruct",)
    jax.tree.map(np.testing.assert_array_equal, stored.params, jax.tree.map(np.asarray, params))


def test_large_matrices_are_stored_as_int8(tmp_path):
    x = np.random.default_rng(0).standard_normal((2, 300, 200)).astype(np.float32)
    save_compressor(tmp_path, {"big": x, "small": x[0, 0]}, CONFIG, backbone(), [], {})
    back = read_compressor(tmp_path).params
    step = np.abs(x).max(1, keepdims=True) / 127
    assert np.all(np.abs(back["big"] - x) <= step / 2 + 1e-6)
    np.testing.assert_array_equal(back["small"], x[0, 0])
    assert (tmp_path / WEIGHTS).stat().st_size < 1.1 * x.size


def test_another_readers_compressor_is_refused(directory):
    with pytest.raises(CheckpointError, match="trained on tiny-random"):
        load_compressor(directory, backbone("b" * 64))


@pytest.mark.parametrize("damage", [lambda b: b[:40], lambda b: b"x" * len(b)])
def test_damaged_file_is_one_line(directory, damage):
    path = directory / WEIGHTS
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match="not a readable compressor"):
        read_compressor(directory)


def test_unknown_name_lists_what_there_is():
    with pytest.raises(CheckpointError, match="no packaged compressor"):
        read_compressor("nothing-of-that-name")


def _run(path, start, *steps):
    """The files of a run that trained to ``steps``, 100 tokens in each row of its log."""
    path.mkdir()
    (path / "config.yaml").write_text(f"name: {path.name}\nmodel: {{start: {start}}}\n")
    (path / "environment.json").write_text('{"jax": "1.0"}')
    rows = [{"step": step, "units.tokens": 100, "eval.loss": 1 / step} for step in steps]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "results.json").write_text('{"ae.nll": 2.0}')
    return path


def test_record_of_a_run_that_started_from_runs_and_a_compressor(tmp_path, params, directory):
    first = _run(tmp_path / "first", directory, 10)
    second = _run(tmp_path / "second", first, 10, 20)
    record = training_record(_run(tmp_path / "third", second, 5))
    assert (record["steps"], record["tokens"], record["results"]) == (5, 100, {"ae.nll": 2.0})
    assert [b["name"] for b in record["before"]] == [str(directory), str(first), str(second)]
    assert record["before"][0] == {"seed": 3, "name": str(directory)}
    assert [b["steps"] for b in record["before"][1:]] == [10, 20]
    assert record["before"][2]["tokens"] == 200
    assert record["before"][2]["config"]["name"] == "second"
    assert not any("results" in b or "before" in b for b in record["before"])


def test_a_run_that_was_not_evaluated_while_training_is_recorded_by_its_losses(tmp_path):
    run = _run(tmp_path / "run", "null", 10)
    rows = [{"step": i, "phase": "main", "loss": 1.0 / i, "grad_norm": 1.0} for i in range(1, 201)]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    curve = training_record(run)["curve"]
    assert 50 <= len(curve) <= 100 and curve[0] == {"step": 1, "phase": "main", "loss": 1.0}
    (run / "metrics.jsonl").write_text(json.dumps(rows[0] | {"eval.ae.nll": 2.0}))
    assert training_record(run)["curve"] == [rows[0] | {"eval.ae.nll": 2.0}]


@pytest.mark.parametrize(
    "given, expected",
    [
        ({"data": {"mix": {"reconstruct": 1, "answer": 1}}}, ("reconstruct", "answer")),
        ({"losses": {"answer": 0.0}, "data": {"mix": {"reconstruct": 1, "answer": 1}}},
         ("reconstruct",)),
        ({"losses": {"answer": 0.0, "distil_logits": 1.0}, "data": {"mix": {"answer": 1}}},
         ("answer",)),
        ({"losses": {"proceed": {"kind": "delay", "begin": 4}}, "train": {"steps": 5},
          "data": {"mix": {"continue": 1}}}, ("continue",)),
        ({"losses": {"answer": 0.0}, "data": {"mix": {"reconstruct": 1, "answer": 1}},
          "train": {"phases": [{"weights": {"answer": 1.0}}]}}, ("reconstruct", "answer")),
    ],
)  # fmt: skip
def test_a_task_was_trained_if_a_loss_counts_it(given, expected):
    assert trained_tasks(parse(LatentWireRun, {"system": "latentwire", **given})) == expected


def test_what_does_not_divide_is_told_with_its_count():
    given = {"model": {"ratio": 3, "segment": 64}, "data": {"length": 64, "lengths": [32, 16]}}
    found = parse(LatentWireRun, {"system": "latentwire", **given}).spans
    assert found[0] == (
        "model.ratio=3 does not divide 64 tokens (data.length): M = ceil(64 / 3) = 22 latents, of "
        "which the last stands for 1 token"
    )
    assert [line.split(" = ")[2].split()[0] for line in found] == ["22", "11", "6"]
    given["model"]["ratio"] = 4
    assert parse(LatentWireRun, {"system": "latentwire", **given}).spans == ()


def test_record_whose_start_is_gone_is_one_line(tmp_path):
    run = _run(tmp_path / "run", tmp_path / "gone", 10)
    with pytest.raises(CheckpointError, match="gone: .*not there"):
        training_record(run)


def test_start_with_other_shapes_is_refused(params):
    wrong = {"memory": np.zeros(3)}
    with pytest.raises(CheckpointError, match="memory"):
        bottleneck.adopt(params, wrong, "old")
    with pytest.raises(CheckpointError, match="unknown"):
        bottleneck.adopt(params, {"unknown": np.zeros(3)}, "old")


def test_api_honours_ratio_segments_and_batches(directory):
    wire = LatentWire.load(directory, backbone())
    texts = ["abcdefghijklmnopqr", "xyz"]
    z = wire.compress(texts)
    # 18 bytes: 8 + 8 + 2 in segments of 8 at ratio 4 are 2 + 2 + 1 latents; 3 bytes are 1.
    assert np.asarray(z.mask).sum(1).tolist() == [5, 1]
    assert [len(ids) for ids in wire.rebuild_ids(z)] == [18, 3]
    assert all(isinstance(answer, str) for answer in wire.answer(z, "what?", max_new_tokens=2))
    alone = wire.compress(texts[1])
    np.testing.assert_allclose(alone.z[0, 0], z.z[1, 0], atol=1e-5)


@pytest.mark.parametrize("text,line", [("", "empty"), ("x" * 600, "600 tokens")])
def test_unusable_texts_are_refused(directory, text, line):
    with pytest.raises(DataError, match=line):
        LatentWire.load(directory, backbone()).compress(text)
