"""Several readers of one wire: whose tokens, whose latents, whose gradients, whose answers."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import latent_jax
from latent_jax.backbones import Backbone, ByteTokenizer, Decoder, outline
from latent_jax.backbones.testing import random_params, tiny_config
from latent_jax.core import trees
from latent_jax.core.config import apply_overrides, parse
from latent_jax.core.errors import CheckpointError, ConfigError, WireError
from latent_jax.data.squad import QAExample
from latent_jax.systems.latentwire import reader_start, rescore
from latent_jax.systems.latentwire.config import LatentWireRun, ModelConfig
from latent_jax.systems.latentwire.model import Wire, own_slots
from latent_jax.systems.latentwire.system import LatentWireSystem
from latent_jax.systems.latentwire.wire import read_header
from latent_jax.train.optimizers import GroupedOptimizer
from latent_jax.train.state import create_state
from latent_jax.train.step import make_train_step

RUN = {
    "system": "latentwire",
    "model": {"segment": 32, "ratio": 4, "private": 1,
              "readers": {"tiny": {"name": "tiny", "hidden": 8, "private": 2}},
              "encoder": {"slots": "both", "lora_rank": 2, "lora_alpha": 2}},
    "data": {"text": "pydoc", "qa": "lookup:pairs=2-3", "length": 32, "max_context": 64,
             "max_prompt": 40, "segments": 40, "questions": 40,
             "mix": {"reconstruct": 0.5, "answer": 0.5}},
    "eval": {"segments": 4, "quick_segments": 2, "questions": 4},
    "train": {"steps": 6, "batch_size": 2, "optimizer": {"lr": 0.1, "warmup_steps": 0}},
}  # fmt: skip


def config(**changes):
    """The run with dotted settings changed."""
    return parse(LatentWireRun, apply_overrides(RUN, changes))


@functools.cache
def main_backbone():
    shape = tiny_config(num_layers=2, vocab_size=262)
    params = random_params(shape, jax.random.key(0))
    return Backbone("bytes", shape, params, ByteTokenizer(), "0" * 64, Decoder(shape))


def system_of(**changes):
    return LatentWireSystem(config(**changes), main_backbone())


@pytest.fixture(scope="module")
def system():
    return system_of()


@pytest.fixture(scope="module")
def batch(system):
    stream = system.train_data("main", None)
    return jax.tree.map(jnp.asarray, next(b for b in stream if "asked" not in b))


@pytest.fixture(scope="module")
def params(system, batch):
    return system.init({"params": jax.random.key(1)}, batch)["params"]


# Text in the tokens of each


def test_spans_are_found_in_the_other_readers_tokens():
    encoder, reader = ByteTokenizer(), outline("tiny").tokenizer
    text = "amber: 42. cedar: 17."
    ids, inside = reader_start.token_spans(encoder, reader, encoder.encode(text), 8)
    assert ids == reader.encode(text) and inside.shape == (3, len(ids))
    for j in range(3):
        begin, end = 8 * j, 8 * (j + 1)
        for token, (a, b) in enumerate(reader.offsets(text)):
            assert inside[j, token] == (a < end and b > begin)
    assert inside.any(0).all() and inside.any(1).all()


def test_each_reader_is_fed_the_same_text_in_its_own_tokens(system, batch):
    ours, theirs = system.backbone.tokenizer, system.readers["tiny"].backbone.tokenizer
    for row in range(2):
        said = np.asarray(batch["inputs"][row])[np.asarray(batch["inputs_mask"][row])]
        retold = np.asarray(batch["tiny.inputs"][row])[np.asarray(batch["tiny.inputs_mask"][row])]
        assert retold[-1] == theirs.eos_id and len(retold) < len(said)
        assert theirs.decode(retold[:-1]) == ours.decode(said)
        np.testing.assert_array_equal(batch["tiny.supervised"][row], batch["tiny.inputs_mask"][row])
    specs = {s.name: s.arrays for s in system.batch_specs("main")}
    shapes = {k: v.shape for k, v in specs["reconstruct-32"].items()}
    assert shapes == {k: v.shape for k, v in batch.items() if k != "valid"}


def test_questions_are_supervised_from_the_first_token_of_the_answer(system):
    stream = system.train_data("main", None)
    asked = next(b for b in stream if "asked" in b)
    reader = system.readers["tiny"].backbone.tokenizer
    for row in range(2):
        mask = asked["tiny.supervised"][row]
        answer = reader.decode(asked["tiny.inputs"][row][mask])
        ours = system.backbone.tokenizer.decode(asked["inputs"][row][asked["supervised"][row]])
        assert answer == ours and answer.strip().isdigit() and answer.endswith("\n")


def test_turns_alternate_between_readers():
    system = system_of(**{"data.turns": "alternating"})
    names = [s.name for s in system.batch_specs("main")]
    assert names == ["reconstruct-32-main", "reconstruct-32-tiny", "answer-main", "answer-tiny"]
    stream = system.train_data("main", None)
    seen = [next(stream) for _ in range(16)]
    mine, theirs = (["inputs" in b for b in seen], ["tiny.inputs" in b for b in seen])
    assert mine == [not x for x in theirs] and 6 <= sum(mine) <= 10


# Shared and private latents


def test_a_reader_gets_the_shared_latents_and_its_own():
    shape = parse(ModelConfig, RUN["model"])
    slots = 2 * (8 + 3)  # two segments of 32 tokens
    z = jnp.arange(slots, dtype=jnp.float32)[None, :, None]
    wire = Wire(z, z[..., 0] >= 0, jnp.zeros((1, slots), int), jnp.array([64]))
    own = {r: own_slots(wire, shape, r).z[0, :, 0].astype(int).tolist() for r in ("main", "tiny")}
    assert own["main"] == [*range(8), 8, *range(11, 19), 19]
    assert own["tiny"] == [*range(8), 9, 10, *range(11, 19), 20, 21]
    plain = dataclasses.replace(shape, private=0, readers={})
    assert own_slots(wire, plain) is wire


# Who learns


def test_a_readers_loss_reaches_its_adapter_and_the_encoder_but_no_other_reader(
    system, params, batch
):
    @jax.jit
    @jax.jacrev
    def gradients(p):
        found, _, _ = system.loss_terms({"params": p}, system.frozen, batch, {}, False)
        terms = found["reconstruct.tiny"], found["reconstruct"]
        return jnp.stack([t.sum / t.count for t in terms])

    flat = trees.flatten(gradients(params))
    theirs, ours = ({k for k, g in flat.items() if g[i].any()} for i in range(2))
    assert {"readers/tiny/map", "readers/tiny/tasks", "readers/tiny/outer"} <= theirs
    assert {"pool/k", "gate", "private"} <= theirs & ours
    assert "tasks" in ours - theirs and not [k for k in ours if k.startswith("readers/")]


@pytest.mark.slow
def test_adding_a_reader_moves_its_adapter_alone(system, params, batch):
    labels = system.param_labels(params)
    assert {"reader_tiny", "lora_a", "pool", "memory", "frozen"} <= set(jax.tree.leaves(labels))
    optimizer = GroupedOptimizer.create(system.config.train.optimizer, labels, 6)
    step = make_train_step(system, optimizer, seed=0, active=("reader_tiny",))
    state = create_state({"params": jax.tree.map(jnp.copy, params)}, optimizer.init(params), {})
    after, _ = step(state, system.frozen, batch)
    before, after = trees.flatten(params), trees.flatten(after.params)
    moved = {k for k in before if not np.array_equal(before[k], after[k])}
    assert moved <= {f"readers/tiny/{n}" for n in ("map", "inner", "outer", "tasks", "out_mean",
                                                    "out_scale")}  # fmt: skip
    assert {"readers/tiny/map", "readers/tiny/tasks"} <= moved


def test_the_start_is_what_the_reader_makes_of_the_text(system, params):
    """The fitted map explains a good part of the reader's own states; a shuffled one none."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((300, 6)), rng.standard_normal((6, 4))
    y = x @ w * [1, 10, 0.1, 1] + [0, 5, 0, -2]
    f = reader_start.regression(x, y)
    back = ((x - f["in_mean"]) * f["in_scale"]) @ f["map"] * f["out_scale"] + f["out_mean"]
    np.testing.assert_allclose(back, y, atol=0.02 * y.std(0).max())
    assert "outer" not in f
    stretch = float(params["readers"]["tiny"]["stretch"])
    assert 0.2 < stretch < 0.8  # a few bytes per token


def test_the_start_explains_what_is_not_linear():
    """Products of two numbers: no linear map finds them, the residual layer does, on new rows."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4000, 4)) + 3
    y = np.stack([(x[:, 0] - 3) * (x[:, 1] - 3), x[:, 2] + 7], axis=1)
    inner = rng.standard_normal((4, 200)).astype(np.float32)

    def unexplained(inner):
        f = reader_start.regression(x[:3000], y[:3000], inner)
        s = (x[3000:] - f["in_mean"]) * f["in_scale"]
        said = s @ f["map"]
        if inner is not None:
            said = said + np.asarray(jax.nn.gelu(jnp.asarray(s @ inner))) @ f["outer"]
        error = said * f["out_scale"] + f["out_mean"] - y[3000:]
        return (error**2).mean(0) / y[3000:].var(0)

    linear, layered = unexplained(None), unexplained(inner)
    assert linear[0] > 0.9 and layered[0] < 0.1
    assert max(linear[1], layered[1]) < 0.01


def test_a_span_is_cut_into_parts_of_consecutive_tokens():
    inside = np.array([[0, 1, 1, 1, 0], [0, 0, 0, 1, 1]], bool)
    weight = reader_start.parts(inside, 2)
    assert weight[0].tolist() == [[0, 0.5, 0.5, 0, 0], [0, 0, 0, 1, 0]]
    assert weight[1].tolist() == [[0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]
    whole = reader_start.parts(inside, 1)[:, 0]
    np.testing.assert_array_equal(whole, inside / inside.sum(1, keepdims=True))
    more = reader_start.parts(inside, 4)
    assert (more.sum(2) == 1).all() and not more[:, :, ~inside.any(0)].any()


def test_several_entries_per_latent_are_spread_over_its_span(system, params):
    many = system_of(**{"model.private": 0, "model.readers.tiny.private": 0,
                        "model.readers.tiny.entries": 2})  # fmt: skip
    adapter = many.readers["tiny"].adapter
    fresh = reader_start.fresh(many.readers, jax.random.key(0))["tiny"]
    z = jax.random.normal(jax.random.key(1), (1, 3, adapter.width))
    wire = Wire(z, jnp.array([[True, True, False]]), jnp.array([[1, 5, 9]]), jnp.array([8]))
    prefix = adapter.apply({"params": fresh}, wire, method="prefix")
    assert prefix.mask[0].tolist() == [True] * 4 + [False] * 2
    assert prefix.positions[0].tolist() == [0, 2, 4, 6, 8, 10]
    assert prefix.kv.k.shape[2] == 6
    # Halves of one latent are made of nothing else.
    moved = adapter.apply({"params": fresh}, wire._replace(z=z.at[:, 1].add(1.0)), method="prefix")
    changed = jnp.any(moved.kv.v != prefix.kv.v, axis=(0, 1, 3, 4))
    assert changed.tolist() == [False, False, True, True, False, False]


# What travels


@pytest.mark.slow
def test_what_is_written_before_a_reader_is_added_is_read_after(tmp_path):
    first = system_of(**{"model.readers": {}, "model.private": 0})
    ids = jnp.zeros((1, 32), jnp.int32)
    variables = first.init({"params": jax.random.key(1)}, {"context": ids})
    wire = first.wire(variables, first.frozen)
    packed = wire.compress(["amber: 42. cedar: 17.", "x"]).pack("int8")
    out = first.export(variables, first.frozen, str(tmp_path / "c"))["written"]
    added = system_of(
        **{"model.private": 0, "model.readers.tiny.private": 0, "model.start": str(out),
           "data.read_by": ["tiny"]}
    )  # fmt: skip
    params = added.init({"params": jax.random.key(2)}, {"context": ids})
    both = added.wire(params, added.frozen)
    z = both.unpack(packed)
    assert len(both.read_by("main").answer(z, "cedar?", 3)) == 2
    assert len(both.read_by("tiny").answer(z, "cedar?", 3)) == 2
    assert len(both.read_by("tiny").reconstruct(z)) == 2
    with pytest.raises(WireError, match=r"no adapter for the reader 'gemma3'; it has main \(bytes"):
        both.read_by("gemma3")
    with pytest.raises(ConfigError, match="sends private latents to nobody"):
        system_of(**{"model.start": str(out)}).init({"params": jax.random.key(2)}, {"context": ids})


def test_private_latents_travel_and_each_reader_finds_its_own(system, params):
    wire = system.wire({"params": params}, system.frozen)
    z = wire.compress(["amber: 42. cedar: 17. and then a second segment", "x"])
    back = wire.unpack(z.pack())
    assert back.private == 3 and back.latents == z.latents == [12 + 2 * 3, 1 + 3]
    for name in ("z", "positions"):
        np.testing.assert_array_equal(getattr(back, name)[back.mask], getattr(z, name)[z.mask])
    assert read_header(z.pack())[0].positions is None  # they stand where the layout says
    reader = system.readers["tiny"].latents(wire.latents)
    for latents, n in ((wire.latents, [14, 2]), (reader, [16, 3])):
        assert latents.prefix(back.wire).mask.sum(1).tolist() == n


# All of them together


def test_candidates_are_scored_per_byte_or_as_a_whole():
    answers = rescore.candidates({"a": ["no", "x"], "b": ["yes indeed", "x"]})
    assert answers == [["no", "yes indeed"], ["x"]]
    one = np.array([-1.0])
    scores = [[np.array([-3.0, -6.0]), one], [np.array([-5.0, -4.0]), one]]
    # product: -8 against -10; per byte: -4 / 3 against -5 / 11
    assert rescore.choose(answers, scores, "product") == ["no", "x"]
    assert rescore.choose(answers, scores, "mean") == ["yes indeed", "x"]


@pytest.mark.slow
def test_an_answers_probability_is_that_of_its_tokens(system, params):
    wire = system.wire({"params": params}, system.frozen)
    examples = [QAExample(str(i), "t", c, "cedar?", ("17",), (0,))
                for i, c in enumerate(["cedar: 17.", "cedar: 17. amber: 42. elm: 3."])]  # fmt: skip
    reader = system.readers["tiny"]
    judge = rescore.Judge(reader.backbone, reader.latents(wire.latents), reader.builder)
    answers = [["17", "a longer answer"], ["17"]]
    found = rescore.log_probabilities(
        judge, wire.builder, examples, answers, batch_size=2, segment=32
    )
    assert [len(x) for x in found] == [2, 1]
    assert all((x < 0).all() and np.isfinite(x).all() for x in found)
    assert found[0][1] < found[0][0]
    alone = rescore.log_probabilities(
        judge, wire.builder, examples[:1], answers[:1], batch_size=2, segment=32
    )
    np.testing.assert_allclose(alone[0], found[0], atol=2e-3)


# What cannot be


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.readers": {"main": {"name": "tiny"}}}, "'main' is no short name"),
        ({"data.read_by": ["gemma"]}, "no reader gemma; there are: main, tiny"),
        ({"model.encoder.slots": "pooled"}, r"private latents \(main, tiny\) are memory slots"),
        ({"data.read_by": ["tiny"], "losses.distil_logits": 1.0}, "only the main reader is a"),
        ({"data.read_by": ["tiny"], "losses.contrast": 0.1}, "losses.contrast: of the main reader"),
    ],
)
def test_impossible_readers(changes, message):
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def test_texts_beyond_another_readers_window_are_refused():
    with pytest.raises(ConfigError, match=r"readers.tiny: a text and .* tiny reads 512: lower"):
        system_of(**{"data.max_context": 256})


def test_an_adapter_for_other_weights_is_refused(system, params):
    wire = dataclasses.replace(
        system.wire({"params": params}, system.frozen), readers={"tiny": "f" * 64}
    )
    with pytest.raises(CheckpointError, match=r"its adapter was trained for tiny \(ffff"):
        wire.read_by("tiny")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A compressor that its own reader was trained with."""
    out = str(tmp_path_factory.mktemp("alone") / "tiny")
    latent_jax.run("latentwire/tiny", out=out, mesh__data=1, eval__segments=0, eval__questions=0)
    return out


def check_answers(results, reader):
    """Nearly as good as from the reader's own full text, and by the latents."""
    f1 = {arm: results[f"{reader}.f1.{arm}"] for arm in ("latent", "full_text", "shuffled")}
    assert f1["full_text"] >= 0.9 and f1["latent"] >= 0.85 * f1["full_text"], f1
    assert f1["shuffled"] <= 0.1, f1


@pytest.mark.slow
def test_two_readers_of_two_families_answer_from_one_wire(tmp_path, alone):
    results = latent_jax.run(
        "latentwire/two_readers", out=str(tmp_path / "run"), mesh__data=1, model__start=alone
    )
    for reader in ("squad", "squad.qwen.x4"):
        check_answers(results, reader)
    assert results["ae.token_accuracy"] > 3 * results["ae.token_accuracy.shuffled"]
    assert results["joint.f1.oracle"] >= results["joint.f1.mean"] >= 0.9


@pytest.mark.slow
def test_a_reader_added_later_answers_from_the_wire_as_it_was(tmp_path, alone):
    both = str(tmp_path / "both")
    results = latent_jax.run(
        "latentwire/two_readers_add", out=both, mesh__data=1, model__start=alone, eval__segments=0
    )
    check_answers(results, "squad.qwen.x4")
    old, new = (latent_jax.LatentWire.load(run) for run in (alone, both))
    texts = ["amber: 42. cedar: 17.", "quill: 33. kelp: 58."]
    sent = old.compress(texts)
    np.testing.assert_array_equal(new.compress(texts).z, sent.z)
    said = new.read_by("qwen").answer(new.unpack(sent.pack()), ["cedar?", "kelp?"], 4)
    assert said == ["17", "58"]
