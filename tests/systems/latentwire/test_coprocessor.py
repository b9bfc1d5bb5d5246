"""Differences that are added to the reader's own cache of fixed words."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax.backbones.sink import sink_kv
from latent_jax.backbones.testing import byte_reader
from latent_jax.core.config import parse
from latent_jax.core.errors import ConfigError
from latent_jax.systems.latentwire.config import LatentWireRun, ModelConfig
from latent_jax.systems.latentwire.reconstruct import evaluate_ae
from latent_jax.systems.latentwire.system import LatentWireSystem

RUN = {
    "system": "latentwire",
    "model": {"segment": 8, "ratio": 4, "encoder": {"slots": "pooled"}, "wire": {"d_z": 6},
              "adapter": {"kind": "coprocessor", "carrier": "abc", "hidden": 16}},
    "data": {"text": "pydoc", "qa": "lookup", "length": 16, "max_context": 128, "max_prompt": 64,
             "segments": 20, "questions": 20, "mix": {"reconstruct": 1.0}},
    "eval": {"segments": 4, "quick_segments": 2},
    "train": {"steps": 6, "batch_size": 3},
}  # fmt: skip
READER = byte_reader(4)


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
def moved(params):
    """With differences that are some."""
    out = 0.3 * jax.random.normal(jax.random.key(3), params["coprocessor"]["out"].shape)
    return {**params, "coprocessor": {**params["coprocessor"], "out": out}}


@pytest.fixture(scope="module")
def shown(system):
    @jax.jit
    def run(params, ids, mask):
        frozen = system.frozen["reader"]
        wire = system.model.apply({"params": params}, frozen, ids, mask, method="compress")
        apply = system.model.apply({"params": params}, wire, jnp.float32, frozen, method="prefix")
        return wire, apply

    return lambda params, batch: run(params, batch["context"], batch["context_mask"])


def test_at_first_it_is_the_cache_of_the_words(shown, system, params, batch):
    wire, prefix = shown(params, batch)
    words = READER.tokenizer.encode("abc")
    ids = np.resize(words, wire.mask.shape)
    ids = np.stack([np.resize(words, wire.mask.shape[1])] * len(ids))
    x = READER.decoder.apply({"params": READER.params}, jnp.asarray(ids), method="embed")
    first = sink_kv(READER.decoder, READER.params, jnp.int32(system.sink), len(ids))
    own = READER.decoder.apply(
        {"params": READER.params}, x, wire.positions, wire.mask, prefix=first
    ).kv
    np.testing.assert_allclose(prefix.kv.k, own.k, atol=1e-5)
    np.testing.assert_allclose(prefix.kv.v, own.v, atol=1e-5)


def test_differences_are_in_units_of_the_caches_own_entries(shown, params, moved, batch):
    (wire, before), (_, after) = shown(params, batch), shown(moved, batch)
    real = np.asarray(wire.mask)
    for name in ("k", "v"):
        old, new = (np.asarray(getattr(p.kv, name))[:, real] for p in (before, after))
        share = np.sqrt(((new - old) ** 2).mean((1, 2, 3)) / (old**2).mean((1, 2, 3)))
        assert (share > 0.05).all() and (share < 5).all(), name


def test_padding_does_not_matter(shown, moved, batch):
    mask = jnp.arange(16) < jnp.array([16, 9, 3])[:, None]
    runs = []
    for ids in (batch["context"], jnp.where(mask, batch["context"], 7)):
        wire, prefix = shown(moved, {"context": ids, "context_mask": mask})
        runs.append(np.asarray(prefix.kv.v)[:, np.asarray(wire.mask)])
    np.testing.assert_allclose(*runs, atol=1e-5)


def test_the_last_map_learns_first_and_then_all_of_it(system, params, moved, batch):
    @jax.jit
    def gradient(params):
        def loss(params):
            found = system.loss_terms({"params": params}, system.frozen, batch, {}, False)[0]
            return found["reconstruct"].value

        return jax.grad(loss)(params)

    def reached(params):
        flat = gradient(params)
        moves = lambda tree: any(jnp.abs(x).max() > 0 for x in jax.tree.leaves(tree))  # noqa: E731
        return {k for k, g in flat.items() if k != "coprocessor" and moves(g)} | {
            f"coprocessor/{k}" for k, g in flat["coprocessor"].items() if moves(g)
        }

    assert reached(params) == {"coprocessor/out", "tasks"}
    names = {"norm", "up", "mix", "mix_norm", "out"}
    assert {f"coprocessor/{n}" for n in names} | {"pool", "down"} <= reached(moved)
    assert set(jax.tree.leaves(system.param_labels(moved)["coprocessor"])) == {"adapter"}
    assert "up" not in params and "out_mean" not in params


def test_decoding_and_scoring_read_it_as_training_did(system, moved, batch):
    terms = system.loss_terms({"params": moved}, system.frozen, batch, {}, False)[0]
    wire = system.wire({"params": moved}, system.frozen)
    found, _ = evaluate_ae(
        wire.backbone, wire.latents, np.asarray(batch["context"]), arms=("latent", "shuffled"),
        batch_size=3, segment=8, sink=wire.sink,
    )  # fmt: skip
    np.testing.assert_allclose(found["ae.nll"], terms["reconstruct"].value, rtol=1e-4)
    assert abs(found["ae.nll.shuffled"] - found["ae.nll"]) > 1e-4
    assert isinstance(wire.rebuild_ids(wire.encode("words"))[0], list)


@pytest.mark.parametrize(
    "adapter,told",
    [
        ({"kind": "coprocessor", "carrier": ""}, "carrier is empty"),
        ({"kind": "coprocessor", "residual": "mlp"}, "of a linear map"),
        ({"kind": "coprocessor", "depths": [1]}, "wants different layers"),
        ({"kind": "coprocessor", "onto_soft": True}, "of a deep prefix"),
    ],
)
def test_what_a_coprocessor_cannot_have(adapter, told):
    with pytest.raises(ConfigError, match=told):
        parse(ModelConfig, {"adapter": adapter})
