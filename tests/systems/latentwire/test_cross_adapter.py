"""Gated cross-attention blocks in front of chosen layers of the frozen reader."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax.backbones.decoder import KV
from latent_jax.backbones.generate import generate_ids
from latent_jax.backbones.padding import take_rows
from latent_jax.backbones.testing import byte_reader
from latent_jax.core.config import parse
from latent_jax.core.errors import ConfigError, DataError
from latent_jax.systems.latentwire import cost, look
from latent_jax.systems.latentwire.config import LatentWireRun, ModelConfig
from latent_jax.systems.latentwire.given import prefix_to_given
from latent_jax.systems.latentwire.latents import Prefix
from latent_jax.systems.latentwire.model import read
from latent_jax.systems.latentwire.reconstruct import evaluate_ae
from latent_jax.systems.latentwire.system import LatentWireSystem

RUN = {
    "system": "latentwire",
    "model": {"segment": 8, "ratio": 4, "encoder": {"slots": "pooled"}, "wire": {"d_z": 6},
              "adapter": {"kind": "cross", "depths": [2, 1], "hidden": 16}},
    "data": {"text": "pydoc", "qa": "lookup", "length": 16, "max_context": 128, "max_prompt": 64,
             "segments": 20, "questions": 20, "mix": {"reconstruct": 1.0}},
    "eval": {"segments": 4, "quick_segments": 2},
    "train": {"steps": 6, "batch_size": 3},
}  # fmt: skip
READER = byte_reader(4)
GATES = ("gate", "mlp_gate")


@pytest.fixture(scope="module")
def system():
    return LatentWireSystem(parse(LatentWireRun, RUN), READER)


@pytest.fixture(scope="module")
def batch(system):
    return jax.tree.map(jnp.asarray, next(system.train_data("main", None)))


@pytest.fixture(scope="module")
def params(system, batch):
    return system.init({"params": jax.random.key(1)}, batch)["params"]


@pytest.fixture(scope="module")
def opened(params):
    """With gates that let something through."""
    open_ = {name: jnp.full(2, 0.7) for name in GATES}
    return {**params, "cross": {**params["cross"], **open_}}


def shown(system, params, batch):
    args = system.frozen["reader"], batch["context"], batch["context_mask"]
    wire = system.model.apply({"params": params}, *args, method="compress")
    return wire, system.model.apply({"params": params}, wire, method="prefix")


def hidden(prefix, seed=5):
    x = jax.random.normal(jax.random.key(seed), (3, 5, READER.config.hidden_size))
    run = jax.jit(lambda p: read(READER.decoder, READER.params, p, x, jnp.ones((3, 5), bool)).kv)
    return run(prefix)


def test_closed_gates_leave_the_reader_as_it_was(system, params, batch):
    _, prefix = shown(system, params, batch)
    assert prefix.kv.k.shape[2] == 0  # nothing of a latent is in the cache
    none = Prefix(prefix.kv._replace(cross=None), None, prefix.mask, *prefix[3:])
    for ours, theirs in zip(hidden(prefix)[:2], hidden(none)[:2], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_blocks_act_in_front_of_their_layers_and_on_latents_that_are_real(system, opened, batch):
    wire, prefix = shown(system, opened, batch)
    none = Prefix(prefix.kv._replace(cross=None), None, prefix.mask, *prefix[3:])
    moved = jnp.abs(hidden(prefix).k - hidden(none).k).max((1, 2, 3, 4))
    assert float(moved[0]) == 0 and float(moved[1:].min()) > 1e-3
    assert prefix.kv.cross.on.tolist() == [False, True, True, False]
    # A latent that is not real is not read; a text without any reads nothing.
    blocks = prefix.kv.cross
    gone = blocks.mask.at[0].set(False)
    masked = prefix._replace(kv=prefix.kv._replace(cross=blocks._replace(mask=gone)))
    other = blocks._replace(mask=gone, v=blocks.v.at[:, 0].add(9.0), k=blocks.k.at[:, 0].add(9.0))
    np.testing.assert_array_equal(
        hidden(masked).v, hidden(prefix._replace(kv=prefix.kv._replace(cross=other))).v
    )
    np.testing.assert_array_equal(hidden(masked).k[:, 1:], hidden(prefix).k[:, 1:])


def test_padding_does_not_matter(system, opened, batch):
    mask = jnp.arange(16) < jnp.array([16, 9, 3])[:, None]
    ids = batch["context"]
    runs = [
        hidden(shown(system, opened, {"context": x, "context_mask": mask})[1])
        for x in (ids, jnp.where(mask, ids, 7))
    ]
    np.testing.assert_allclose(runs[0].v, runs[1].v, atol=1e-5)


def test_gates_learn_first_and_then_all_of_it(system, params, opened, batch):
    def reached(params):
        def loss(params):
            found = system.loss_terms({"params": params}, system.frozen, batch, {}, False)[0]
            return found["reconstruct"].value

        flat = jax.jit(jax.grad(loss))(params)
        moves = lambda tree: any(jnp.abs(x).max() > 0 for x in jax.tree.leaves(tree))  # noqa: E731
        return {k for k, g in flat.items() if k != "cross" and moves(g)} | {
            f"cross/{k}" for k, g in flat["cross"].items() if moves(g)
        }

    assert {"cross/gate", "cross/mlp_gate", "tasks"} == reached(params)
    names = {"q", "k", "v", "out", "norm", "mlp_norm", "up", "down", "memory_norm", *GATES}
    assert {f"cross/{n}" for n in names} | {"pool", "down"} <= reached(opened)
    labels = system.param_labels(opened)
    assert set(jax.tree.leaves(labels["cross"])) == {"adapter"}
    assert "up" not in params and "out_mean" not in params


def test_decoding_and_scoring_read_them_as_training_did(system, opened, batch):
    terms = system.loss_terms({"params": opened}, system.frozen, batch, {}, False)[0]
    wire = system.wire({"params": opened}, system.frozen)
    texts = np.asarray(batch["context"])
    found, _ = evaluate_ae(
        wire.backbone, wire.latents, texts, arms=("latent", "shuffled"), batch_size=3, segment=8,
        sink=wire.sink,
    )  # fmt: skip
    np.testing.assert_allclose(found["ae.nll"], terms["reconstruct"].value, rtol=1e-4)
    assert abs(found["ae.nll.shuffled"] - found["ae.nll"]) > 1e-4


def test_greedy_decoding_is_the_teacher_forced_argmax(system, opened, batch):
    _, prefix = shown(system, opened, batch)
    given = prefix_to_given(READER.decoder, READER.params, prefix)
    lead = jax.random.normal(jax.random.key(2), (3, 2, READER.config.hidden_size))
    made = generate_ids(
        READER.decoder, READER.params, lead, max_new_tokens=4, start=given.start, prefix=given.kv
    ).tokens
    frozen = {"params": READER.params}
    x = jnp.concatenate(
        [lead, READER.decoder.apply(frozen, jnp.asarray(made)[:, :-1], method="embed")], axis=1
    )
    out = read(READER.decoder, READER.params, prefix, x, jnp.ones(x.shape[:2], bool)).hidden
    logits = READER.decoder.apply(frozen, out[:, 1:], method="unembed")
    np.testing.assert_array_equal(jnp.argmax(logits, -1), made)
    # Some rows of a batch take their own memories along.
    kept = take_rows(given.kv, np.array([2]))
    one = generate_ids(
        READER.decoder, READER.params, lead[2:], max_new_tokens=4, start=given.start[2:],
        prefix=kept,
    ).tokens  # fmt: skip
    np.testing.assert_array_equal(one[0], made[2])


def test_what_has_no_entries_costs_fewer_numbers_and_is_near_no_token(system, opened):
    wire = system.wire({"params": opened}, system.frozen)
    text = "blocks"
    found = cost.cost(wire, wire.compress(text), [text])
    one = READER.config.num_kv_heads * READER.config.head_dim * 2 * 4
    assert found.latent_kv_bytes == found.latents * 2 * one
    # Keys and values of both blocks, of latents of 6 numbers, and nothing of the LLM.
    assert 0 < found.latent_flops == 2 * found.latents * 6 * (2 * one // 4)
    with pytest.raises(DataError, match="near no token"):
        look.nearest(wire, text)
    assert isinstance(wire.rebuild_ids(wire.encode(text))[0], list)


def test_an_ordinary_prefix_has_none():
    kv = KV(jnp.zeros((1, 1, 0, 1, 2)), jnp.zeros((1, 1, 0, 1, 2)), jnp.zeros((1, 0), bool))
    assert kv.cross is None and kv.bias is None


@pytest.mark.parametrize(
    "shape, message",
    [
        ({"adapter": {"kind": "cross"}}, "wants different layers"),
        ({"adapter": {"depths": [1]}}, "the other kinds none"),
        ({"adapter": {"kind": "cross", "depths": [1, 1]}}, "wants different layers"),
        ({"adapter": {"kind": "cross", "depths": [1], "residual": "mlp"}}, "are of a linear map"),
        ({"adapter": {"kind": "cross", "depths": [1]}, "encoder": {"carry": 1}}, "encoder.carry"),
    ],
)
def test_impossible_blocks_are_refused(shape, message):
    with pytest.raises(ConfigError, match=message):
        parse(ModelConfig, shape)


def test_a_layer_that_the_reader_does_not_have_is_refused(batch):
    model = {**RUN["model"], "adapter": {"kind": "cross", "depths": [4]}}
    system = LatentWireSystem(parse(LatentWireRun, {**RUN, "model": model}), READER)
    with pytest.raises(ConfigError, match=r"adapter.depths=\[4\]: the reader has layers 0 to 3"):
        system.init({"params": jax.random.key(1)}, batch)
