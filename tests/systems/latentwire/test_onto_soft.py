"""A deep prefix as a residual onto that of soft tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax.backbones.testing import byte_reader
from latent_jax.core.config import parse
from latent_jax.core.errors import ConfigError
from latent_jax.systems.latentwire import cost
from latent_jax.systems.latentwire.config import LatentWireRun, ModelConfig
from latent_jax.systems.latentwire.given import prefix_to_given
from latent_jax.systems.latentwire.latents import Prefix, unflatten_kv
from latent_jax.systems.latentwire.reconstruct import evaluate_ae
from latent_jax.systems.latentwire.system import LatentWireSystem

RUN = {
    "system": "latentwire",
    "model": {"segment": 8, "ratio": 2, "encoder": {"slots": "embedded", "output": "hidden"},
              "wire": {"d_z": 40}, "adapter": {"onto_soft": True}},
    "data": {"text": "pydoc", "qa": "lookup", "length": 16, "max_context": 128, "max_prompt": 64,
             "segments": 200, "questions": 20, "mix": {"reconstruct": 1.0}},
    "eval": {"segments": 4, "quick_segments": 2},
    "train": {"steps": 6, "batch_size": 8},
}  # fmt: skip


@pytest.fixture(scope="module")
def system():
    return LatentWireSystem(parse(LatentWireRun, RUN), byte_reader())


@pytest.fixture(scope="module")
def batch(system):
    return jax.tree.map(jnp.asarray, next(system.train_data("main", None)))


@pytest.fixture(scope="module")
def params(system, batch):
    return system.init({"params": jax.random.key(1)}, batch)["params"]


def shown(system, params, batch):
    reader, args = system.frozen["reader"], (batch["context"], batch["context_mask"])
    wire = system.model.apply({"params": params}, reader, *args, method="compress")
    prefix = system.model.apply({"params": params}, wire, frozen=reader, method="prefix")
    return wire, prefix


def test_it_begins_as_the_soft_tokens_and_moves_off_by_the_gate(system, params, batch):
    wire, prefix = shown(system, params, batch)
    soft = wire.z @ params["soft"] + params["soft_mean"]
    alone = Prefix(None, soft, wire.mask, wire.positions, prefix.start, prefix.sink)
    body, reader = system.body, system.frozen["reader"]
    expected = prefix_to_given(body, reader, alone).kv
    found = prefix_to_given(body, reader, prefix).kv
    np.testing.assert_allclose(found.k, expected.k, atol=1e-5)
    np.testing.assert_allclose(found.v, expected.v, atol=1e-5)
    half = {**params, "onto": jnp.array([0.0, 0.5])}
    moved = shown(system, half, batch)[1].kv
    flat = (wire.z @ params["up"]) * params["out_scale"] + params["out_mean"]
    inv = body.apply({"params": reader}, method=lambda m: m.inv_freq)
    deep = unflatten_kv(flat, system.backbone.config, jnp.asarray(inv), wire.positions, wire.mask)
    np.testing.assert_allclose(moved.k[0], prefix.kv.k[0], atol=1e-5)
    np.testing.assert_allclose(moved.k[1], prefix.kv.k[1] + 0.5 * deep.k[1], atol=1e-4)
    np.testing.assert_allclose(moved.v[1], prefix.kv.v[1] + 0.5 * deep.v[1], atol=1e-4)


def test_soft_tokens_start_near_the_embeddings_that_they_stand_for(system, params, batch):
    wire, _ = shown(system, params, batch)
    soft = np.asarray(wire.z @ params["soft"] + params["soft_mean"])
    text = np.asarray(system.frozen["reader"]["embed"])[np.asarray(batch["context"])]
    means = text.reshape(len(text), -1, 2, text.shape[-1]).mean(2)
    error = np.square(soft - means).mean() / np.square(means - means.mean((0, 1))).mean()
    assert error < 0.2


def test_gradient_reaches_both_ways_once_the_gate_is_open(system, params, batch):
    def reached(params):
        def loss(params):
            found = system.loss_terms({"params": params}, system.frozen, batch, {}, False)[0]
            return found["reconstruct"].value

        flat = jax.jit(jax.grad(loss))(params)
        return {k for k, g in flat.items() if any(jnp.abs(x).max() > 0
                                                  for x in jax.tree.leaves(g))}  # fmt: skip

    closed, opened = reached(params), reached({**params, "onto": jnp.full(2, 0.3)})
    assert {"soft", "soft_mean", "onto", "down", "tasks"} <= closed
    assert not {"up", "out_mean", "out_scale"} & closed
    assert {"soft", "onto", "up", "out_mean"} <= opened
    labels = system.param_labels(params)
    assert (labels["soft"], labels["onto"]) == ("bottleneck", "gate")


def test_padding_does_not_matter(system, params, batch):
    mask = jnp.arange(16) < jnp.array([16, 5] * 4)[:, None]
    ids = batch["context"]
    runs = [
        shown(system, params, {"context": x, "context_mask": mask})[1].kv
        for x in (ids, jnp.where(mask, ids, 7))
    ]
    real = np.asarray(runs[0].mask)
    for name in ("k", "v"):
        one, other = (np.asarray(getattr(kv, name))[:, real] for kv in runs)
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_evaluation_reads_as_training_did(system, params, batch):
    opened = {**params, "onto": jnp.full(2, 0.3)}
    terms = system.loss_terms({"params": opened}, system.frozen, batch, {}, False)[0]
    wire = system.wire({"params": opened}, system.frozen)
    found, _ = evaluate_ae(
        wire.backbone, wire.latents, np.asarray(batch["context"]), arms=("latent",), batch_size=8,
        segment=8, sink=wire.sink,
    )  # fmt: skip
    np.testing.assert_allclose(found["ae.nll"], terms["reconstruct"].value, rtol=1e-4)
    text = "soft tokens are run once"
    assert cost.cost(wire, wire.compress(text), [text]).latent_flops > 0


@pytest.mark.parametrize(
    "shape, message",
    [
        ({"adapter": {"onto_soft": True}}, "needs a map of its own: set wire.d_z"),
        ({"adapter": {"onto_soft": True, "kind": "soft"}, "wire": {"d_z": 4}}, "of a deep prefix"),
    ],
)
def test_it_needs_a_deep_prefix_with_a_map(shape, message):
    with pytest.raises(ConfigError, match=message):
        parse(ModelConfig, shape)
