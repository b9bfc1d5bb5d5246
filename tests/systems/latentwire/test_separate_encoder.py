"""Another frozen LLM than the reader as sentence encoder: what it reads, and what of it counts."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors

from latent_jax import backbones, cli
from latent_jax.backbones.decoder import Decoder
from latent_jax.backbones.testing import byte_reader
from latent_jax.core.config import parse, to_dict
from latent_jax.core.errors import CheckpointError, ConfigError, WireError
from latent_jax.systems.latentwire.api import LatentWire
from latent_jax.systems.latentwire.assets import WEIGHTS
from latent_jax.systems.latentwire.config import LatentWireRun, ModelConfig
from latent_jax.systems.latentwire.first_shape import as_first
from latent_jax.systems.latentwire.reconstruct import evaluate_ae
from latent_jax.systems.latentwire.separate_encoder import (
    PART,
    apart,
    open_encoder,
    respelled,
    separate_states,
)
from latent_jax.systems.latentwire.system import LatentWireSystem

ENCODER = {"slots": "states", "output": "hidden", "backbone": "tiny_qwen3", "pooler": "queries"}
MODEL = {"segment": 8, "ratio": 4, "adapter": {"kind": "soft"}, "wire": {"d_z": 12},
         "encoder": ENCODER}  # fmt: skip
RUN = {
    "system": "latentwire",
    "model": MODEL,
    "data": {"text": "pydoc", "qa": "lookup", "length": 16, "max_context": 128, "max_prompt": 64,
             "segments": 20, "questions": 20, "mix": {"reconstruct": 1.0}},
    "eval": {"segments": 4, "quick_segments": 2},
    "train": {"steps": 6, "batch_size": 3},
}  # fmt: skip
TEXTS = ["abcdefghijklmnopqr", "xyz12345"]


def changed(**encoder):
    return {**MODEL, "encoder": {**ENCODER, **encoder}}


@pytest.fixture(scope="module")
def system():
    return LatentWireSystem(parse(LatentWireRun, RUN), byte_reader())


@pytest.fixture(scope="module")
def batch(system):
    return jax.tree.map(jnp.asarray, next(system.train_data("main", None)))


@pytest.fixture(scope="module")
def params(system, batch):
    return system.init({"params": jax.random.key(1)}, batch)["params"]


@pytest.fixture(scope="module")
def wire(system, params):
    return system.wire({"params": params}, system.frozen)


@pytest.fixture(scope="module")
def reader():
    return backbones.load("tiny")


def states(separate, ids, mask):
    frozen = {PART: separate.frozen}
    return np.asarray(separate_states(separate.body, frozen, jnp.asarray(ids), jnp.asarray(mask)))


def test_every_token_is_spelled_in_the_encoders_own(reader):
    own = backbones.load("tiny_qwen3").tokenizer
    size = reader.config.vocab_size
    table = respelled(reader.tokenizer, own, size, 8)
    assert table.shape[0] == size and 1 < table.shape[1] <= 8
    text = "The mill at Dunmore burned down in 1911."
    pieces = [p for i in reader.tokenizer.encode(text) for p in table[i].tolist() if p >= 0]
    assert own.decode(pieces) == reader.tokenizer.decode(reader.tokenizer.encode(text))
    # What both know by the same name is one piece, what is longer than allowed is cut.
    same = [i for i in range(size) if own.token_to_id(reader.tokenizer.id_to_token(i)) is not None]
    assert len(same) > 100
    assert ((table[same] >= 0).sum(1) == 1).all()
    assert table[same[50], 0] == own.token_to_id(reader.tokenizer.id_to_token(same[50]))
    assert respelled(reader.tokenizer, own, size, 2).shape == (size, 2)


def test_a_state_is_the_mean_of_what_its_pieces_get(reader):
    separate = open_encoder(parse(ModelConfig, {**MODEL, "segment": 32, "sink": False}), reader)
    ids = np.asarray([reader.tokenizer.encode("Dunmore's watermill, anno 1911")])
    found = states(separate, ids, np.ones(ids.shape, bool))
    own = separate.backbone
    assert found.shape == (*ids.shape, own.config.hidden_size)
    # The encoder itself, on the same pieces without any gap.
    each = [separate.pieces[i][separate.pieces[i] >= 0].tolist() for i in ids[0]]
    assert max(map(len, each)) > 1
    assert separate.body.sink is None  # which would stand in front
    flat = jnp.asarray([sum(each, [])])
    apply = Decoder(own.config, parent=None).apply
    x = apply({"params": own.params}, flat, method="embed")
    where = jnp.arange(flat.shape[1])[None]
    hidden = apply({"params": own.params}, x, where, where >= 0).hidden[0]
    edges = np.cumsum([0, *map(len, each)])
    means = [np.asarray(hidden[a:b]).mean(0) for a, b in zip(edges, edges[1:], strict=False)]
    np.testing.assert_allclose(found[0], means, atol=1e-4)


def test_shapes_of_latents(system, params, wire):
    width = backbones.load("tiny_qwen3").config.hidden_size
    assert width != byte_reader().config.hidden_size
    assert params["down"].shape == (width, 12)
    assert params["up"].shape == (12, byte_reader().config.hidden_size)
    z = wire.compress(TEXTS)
    assert z.latents == [5, 2] and z.wire.z.shape[2] == wire.width == 12
    # It is part of what is frozen, and of nothing that is trained or given to the reader.
    assert PART in system.frozen["reader"] and PART not in params
    assert set(wire.backbone.params) == set(apart(system.frozen["reader"]))
    assert all(map(str, wire.reconstruct(z))) and len(wire.answer(z, "What is it?")) == 2


def test_padding_does_not_matter(wire):
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(3, 200, (3, 16)), jnp.int32)
    mask = jnp.arange(16) < jnp.array([16, 9, 3])[:, None]
    run = jax.jit(lambda ids: wire.latents.compress(ids, mask))
    runs = [run(x) for x in (ids, jnp.where(mask, ids, 7))]
    real = np.asarray(runs[0].mask)
    assert real.sum(1).tolist() == [4, 3, 1]
    np.testing.assert_allclose(*(np.asarray(r.z)[real] for r in runs), atol=1e-5)
    assert np.isfinite(np.asarray(runs[0].z)).all()
    # And alone a text becomes what it becomes beside a longer one.
    together, alone = wire.encode(TEXTS), wire.encode(TEXTS[1])
    np.testing.assert_allclose(together.z[1, :2], alone.z[0, :2], atol=1e-4)


def test_gradient_reaches_what_sums_it_up_and_nothing_of_it(system, params, batch):
    def loss(params, frozen):
        frozen = {"reader": {**system.frozen["reader"], PART: frozen}}
        terms = system.loss_terms({"params": params}, frozen, batch, {}, False)[0]
        return terms["reconstruct"].value

    known = system.frozen["reader"][PART]

    def of(params, weights):
        return loss(params, {**known, "params": weights})

    step = jax.jit(jax.value_and_grad(of, argnums=(0, 1)))
    here, (own, theirs) = step(params, known["params"])
    assert all(float(jnp.abs(x).max()) == 0 for x in jax.tree.leaves(theirs))
    for name in ("pool", "down", "up"):
        assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(own[name])) > 0, name
    # Although the loss looks at it.
    other, _ = step(params, jax.tree.map(lambda x: x * 1.5, known["params"]))
    assert abs(float(other) - float(here)) > 1e-6


def test_evaluation_reads_it_as_training_did(system, params, wire, batch):
    terms = system.loss_terms({"params": params}, system.frozen, batch, {}, False)[0]
    found, _ = evaluate_ae(
        wire.backbone, wire.latents, np.asarray(batch["context"]), arms=("latent", "shuffled"),
        batch_size=3, segment=8, sink=wire.sink,
    )  # fmt: skip
    np.testing.assert_allclose(found["ae.nll"], terms["reconstruct"].value, rtol=1e-4)
    assert abs(found["ae.nll.shuffled"] - found["ae.nll"]) > 1e-5


@pytest.fixture(scope="module")
def exported(system, params, tmp_path_factory):
    to = tmp_path_factory.mktemp("separate") / "out"
    system.export({"params": params}, system.frozen, str(to))
    return to


def test_round_trip_without_the_encoders_weights(exported, system, params, wire):
    loaded = LatentWire.load(exported, byte_reader())
    np.testing.assert_allclose(loaded.encode(TEXTS).z, wire.encode(TEXTS).z, atol=1e-5)
    with safetensors.safe_open(exported / WEIGHTS, framework="numpy") as f:
        names, meta = set(f.keys()), f.metadata()
    assert not any(PART in n or "layers" in n or "pieces" in n for n in names), names
    assert meta["encoder"] == system.separate.backbone.sha256
    # Bytes of the one are the other's.
    message = loaded.compress(TEXTS)
    again = LatentWire.load(exported, byte_reader()).unpack(message.pack("fp32"))
    real = np.asarray(message.wire.mask)
    np.testing.assert_array_equal(again.wire.mask, real)
    np.testing.assert_array_equal(*(np.asarray(m.wire.z)[real] for m in (again, message)))


def test_other_weights_of_the_encoder_are_refused(exported, system):
    config = system.config.model
    with pytest.raises(CheckpointError, match=r"encoder.backbone=tiny_qwen3: .* other weights"):
        open_encoder(config, byte_reader(), sha256="f" * 64)
    assert open_encoder(config, byte_reader(), sha256=system.separate.backbone.sha256)


def test_a_wire_is_the_encoders_own(wire):
    separate = wire.separate
    renamed = dataclasses.replace(separate.backbone, sha256="e" * 64)
    other = dataclasses.replace(wire, separate=dataclasses.replace(separate, backbone=renamed))
    assert other.origin.encoder_sha256 != wire.origin.encoder_sha256
    with pytest.raises(WireError):
        other.unpack(wire.compress(TEXTS).pack("fp32"))
    # The place that it was loaded from is none of its identity.
    moved = dataclasses.replace(wire.config.encoder, backbone="elsewhere")
    moved = dataclasses.replace(wire, config=dataclasses.replace(wire.config, encoder=moved))
    assert moved.origin.encoder_sha256 == wire.origin.encoder_sha256


def test_without_one_the_settings_are_none():
    shape = as_first(to_dict(ModelConfig()))
    assert not {"backbone", "pieces"} & set(shape["encoder"])
    assert open_encoder(ModelConfig(), byte_reader()) is None


def test_the_first_layers_alone(reader):
    three, one = (
        open_encoder(parse(ModelConfig, changed(layers=n)), reader) for n in (0, 1)
    )  # fmt: skip
    assert one.body.config.num_layers == 1 < three.body.config.num_layers
    ids = np.asarray([reader.tokenizer.encode("the mill burned")])
    mask = np.ones(ids.shape, bool)
    assert np.abs(states(one, ids, mask) - states(three, ids, mask)).max() > 1e-3


@pytest.mark.parametrize(
    "model, told",
    [
        (changed(slots="heads", output="kv", pooler="mean"), "slots=states or anchor: heads"),
        (changed(slots="memory", pooler="mean"), "slots=states or anchor: memory"),
        (changed(slots="bytes"), "slots=states or anchor: bytes"),
        (changed(backbone=""), "encoder.backbone is empty"),
        (changed(pieces=0), "encoder.pieces"),
        (changed(lora_on="all", lora_rank=2), "encoder.lora_on=memory"),
        ({**MODEL, "wire": {}}, "set wire.d_z"),
        ({**MODEL, "wire": {"d_z": 8, "fit": "vocabulary"}}, "wire.fit=vocabulary"),
    ],
)
def test_what_it_cannot_be_put_with(model, told):
    with pytest.raises(ConfigError, match=told):
        parse(ModelConfig, model)


def test_what_the_encoder_itself_has_not(reader):
    with pytest.raises(ConfigError, match="encoder.layers=9: encoder.backbone=tiny_qwen3 has 3"):
        open_encoder(parse(ModelConfig, changed(layers=9)), reader)
    with pytest.raises(ConfigError, match="model.segment=1024: .* reads 512 tokens"):
        open_encoder(parse(ModelConfig, {**MODEL, "segment": 1024}), reader)


@pytest.mark.parametrize(
    "setting, told",
    [
        ("model.encoder.backbone=no_such_llm", "no_such_llm"),
        ("model.encoder.slots=heads", "heads"),
        ("model.encoder.pieces=0", "encoder.pieces"),
        ("model.encoder.layers=9", "encoder.layers=9"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, setting, told):
    monkeypatch.chdir(tmp_path)
    command = ["run", "latentwire/smoke/separate_encoder", "-q", "--out", "r", "--set", setting]
    code = cli.main(command)
    said = capsys.readouterr().err.strip()
    assert code == 2 and told in said and "\n" not in said and "Traceback" not in said
