"""LoRA on the reader: it acts behind latents alone, in training as in evaluation, and is told."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax.backbones.testing import byte_reader
from latent_jax.core.config import parse
from latent_jax.core.errors import ConfigError
from latent_jax.core.fields import to_dict
from latent_jax.systems.latentwire import baselines, reader_lora, suite
from latent_jax.systems.latentwire.config import LatentWireRun, ModelConfig
from latent_jax.systems.latentwire.evaluate import evaluate_qa
from latent_jax.systems.latentwire.first_shape import as_first
from latent_jax.systems.latentwire.reconstruct import evaluate_ae
from latent_jax.systems.latentwire.system import LatentWireSystem

RUN = {
    "system": "latentwire",
    "model": {"segment": 16, "ratio": 4, "prompt_tokens": 2, "encoder": {"slots": "pooled"},
              "reader_lora": {"rank": 2, "alpha": 4, "targets": ["q", "v", "down"], "layers": 2}},
    "data": {"text": "pydoc", "qa": "lookup", "length": 16, "max_context": 128, "max_prompt": 64,
             "segments": 20, "questions": 20, "mix": {"reconstruct": 0.5, "answer": 0.5}},
    "losses": {"distil_logits": 1.0},
    "eval": {"segments": 4, "quick_segments": 2, "questions": 4},
    "train": {"steps": 6, "batch_size": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def system():
    return LatentWireSystem(parse(LatentWireRun, RUN), byte_reader(3))


@pytest.fixture(scope="module")
def batches(system):
    """One batch per task, and questions on raw text."""
    stream = system.train_data("main", None)
    made = {k: next(b for b in stream if ("asked" in b) == (k == "answer"))
            for k in ("answer", "reconstruct")}  # fmt: skip
    made["raw"] = next(system.train_data("prompt", None))
    return jax.tree.map(jnp.asarray, made)


@pytest.fixture(scope="module")
def params(system, batches):
    return system.init({"params": jax.random.key(1)}, batches["reconstruct"])["params"]


@pytest.fixture(scope="module")
def moved(params):
    """After some training, as it were."""
    lora = jax.tree.map(lambda x: x + 0.3 * jnp.sin(jnp.arange(x.size).reshape(x.shape)),
                        params["reader_lora"])  # fmt: skip
    return {**params, "reader_lora": lora}


def term(system, params, batch, name):
    return system.loss_terms({"params": params}, system.frozen, batch, {}, False)[0][name]


def test_a_fresh_one_changes_nothing_and_adapts_the_first_layers_alone(system, params, moved):
    latents = system.wire({"params": params}, system.frozen).latents
    found = reader_lora.reading(latents, system.backbone)
    jax.tree.map(np.testing.assert_array_equal, found.params, system.backbone.params)
    deltas = system.wire({"params": moved}, system.frozen).latents.deltas()
    assert set(deltas) == {"q", "v", "down"}
    for delta in deltas.values():
        assert delta["a"].shape[0] == 3 and float(jnp.abs(delta["a"][2] @ delta["b"][2]).max()) == 0
        assert float(jnp.abs(delta["a"][1] @ delta["b"][1]).max()) > 0


def test_it_learns_from_latents_and_from_no_text(system, moved, batches):
    def gradient(batch, name):
        def loss(params):
            return term(system, params, batch, name).value

        flat = jax.grad(loss)(moved)
        size = {k: sum(float(jnp.abs(x).sum()) for x in jax.tree.leaves(g))
                for k, g in flat.items()}  # fmt: skip
        return {k for k, v in size.items() if v > 0}

    assert gradient(batches["answer"], "answer") == {"reader_lora", "pool", "prompt"}
    assert gradient(batches["reconstruct"], "reconstruct") == {"reader_lora", "pool", "tasks"}
    # The phase that trains the prompt reads raw text, for which the reader is as it was.
    assert gradient(batches["raw"], "answer") == {"prompt"}


def test_the_teacher_is_the_reader_without_it(system, params, moved, batches):
    def teacher(p):
        aux = system.loss_terms({"params": p}, system.frozen, batches["answer"], {}, False)[2]
        return aux["teacher_nll"].value

    assert float(teacher(moved)) == float(teacher(params))
    student = [float(term(system, p, batches["answer"], "answer").value) for p in (params, moved)]
    assert abs(student[0] - student[1]) > 1e-3


def test_evaluation_reads_as_training_did(system, moved, batches):
    batch = batches["reconstruct"]
    trained = term(system, moved, batch, "reconstruct").value
    wire = system.wire({"params": moved}, system.frozen)
    whole = np.asarray(batch["context"])
    assert np.asarray(batch["context_mask"]).all()
    found, _ = evaluate_ae(
        wire.backbone, wire.latents, whole, arms=("latent",), batch_size=2, segment=16,
        sink=wire.sink,
    )  # fmt: skip
    np.testing.assert_allclose(found["ae.nll"], trained, rtol=1e-4)


def test_text_arms_never_see_it(system, params, moved):
    arms = ("latent", "full_text", "token_budget_head", "kv_topk", "no_context")

    def scores(p):
        wire = system.wire({"params": p}, system.frozen)
        return evaluate_qa(
            wire.backbone, wire.latents, system.held_out_questions(), arms, builder=system.builder,
            ratio=4.0, max_context=128, max_new_tokens=2, batch_size=4, segment=16, sink=wire.sink,
        )[0]  # fmt: skip

    before, after = scores(params), scores(moved)
    for arm in arms[1:]:
        assert after[f"squad.nll.{arm}"] == before[f"squad.nll.{arm}"]
    assert abs(after["squad.nll.latent"] - before["squad.nll.latent"]) > 1e-3


def test_a_person_gets_the_reader_that_was_trained(system, moved):
    wire = system.wire({"params": moved}, system.frozen)
    assert wire.reading.params is not wire.backbone.params
    z = wire.encode("a b c d e f")
    given = baselines.latent_given(
        "latent", wire.reading.decoder, wire.reading.params, wire.latents, z,
        np.arange(1, dtype=np.int32), jax.random.key(0),
    )  # fmt: skip
    assert given.start.tolist() == [16]
    assert wire.rebuild_ids(z) is not None
    # What is sent is the encoder's, whoever reads it.
    frozen = parse(ModelConfig, {**RUN["model"], "reader_lora": {}})
    own = {k: v for k, v in wire.params.items() if k != "reader_lora"}
    plain = type(wire)(wire.backbone, frozen, own, wire.builder, wire.tasks, wire.name)
    assert plain.origin == wire.origin and plain.not_frozen is None


def test_that_it_is_not_frozen_is_told_everywhere(system, moved, tmp_path):
    wire = system.wire({"params": moved}, system.frozen)
    count = sum(x.size for x in jax.tree.leaves(moved["reader_lora"]))
    assert wire.not_frozen == (
        "NOT frozen: LoRA of rank 2 on q, v, down of the first 2 layers "
        f"({count:,} trained numbers)"
    )
    assert reader_lora.numbers(wire.config, wire.params) == {
        "reader.frozen": 0, "reader.trained_parameters": count,
    }  # fmt: skip
    assert suite.demonstrate(wire, "a b c d", None)["reader"] == wire.not_frozen
    assert suite.diagnosis(system, wire, None)["reader"] == wire.not_frozen
    variables = {"params": moved}
    system.export(variables, system.frozen, str(tmp_path / "made"))
    record = json.loads((tmp_path / "made" / "record.json").read_text())
    assert record["reader"] == wire.not_frozen
    assert reader_lora.numbers(ModelConfig(), {}) == {}


def test_compressors_without_one_are_what_they_were():
    assert "reader_lora" not in as_first(to_dict(ModelConfig()))
    with pytest.raises(ConfigError, match="reader_lora.targets: unknown \\['x'\\]"):
        parse(ModelConfig, {"reader_lora": {"rank": 2, "targets": ["x"]}})
