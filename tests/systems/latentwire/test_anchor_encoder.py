"""One vector for a text, made beside its semantic anchor and expanded to all slots."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax.backbones.testing import byte_reader
from latent_jax.core.config import parse
from latent_jax.core.errors import ConfigError
from latent_jax.systems.latentwire.anchor_encoder import alignment, semantic_anchor
from latent_jax.systems.latentwire.config import LatentWireRun
from latent_jax.systems.latentwire.reconstruct import evaluate_ae
from latent_jax.systems.latentwire.system import LatentWireSystem

RUN = {
    "system": "latentwire",
    "model": {"segment": 8, "ratio": 4, "adapter": {"kind": "soft"},
              "encoder": {"slots": "anchor", "output": "hidden", "anchor_width": 16}},
    "losses": {"anchor": 0.5},
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
def compress(system):
    run = jax.jit(
        lambda p, i, m: system.model.apply(
            {"params": p}, system.frozen["reader"], i, m, method="compress"
        )
    )
    return lambda params, ids, mask: run(params, ids, mask)


def test_the_anchor_is_the_mean_of_real_states_and_lets_no_gradient_through():
    states = jnp.arange(12.0).reshape(1, 4, 3)
    mask = jnp.array([[True, True, False, False]])
    np.testing.assert_allclose(semantic_anchor(states, mask)[0], [1.5, 2.5, 3.5])
    assert float(jnp.abs(jax.grad(lambda x: semantic_anchor(x, mask).sum())(states)).max()) == 0
    assert not np.isnan(semantic_anchor(states, mask & False)).any()


def test_alignment_is_a_cosine_over_texts_that_are_not_empty():
    x = jnp.array([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    real = jnp.array([True, True, False])
    near = alignment(x, x * 5, real)
    assert float(near.value) == pytest.approx(0, abs=1e-6) and float(near.count) == 2
    assert float(alignment(x, -x, real).value) == pytest.approx(2)


def test_all_slots_of_a_segment_come_of_one_vector(compress, params, batch):
    ids, mask = batch["context"][:, :8], batch["context_mask"][:, :8]
    whole = compress(params, ids, mask)
    assert whole.z.shape == (3, 2, READER.config.hidden_size)
    # A slot is another map of the vector, so a word of the second span moves the first slot.
    other = compress(params, ids.at[:, 7].add(1), mask)
    assert (np.abs(other.z - whole.z).max(2) > 0).all()
    rows = np.asarray(whole.z).reshape(3, -1)
    expand = np.asarray(params["pool"]["expand"])  # slots, width, d
    vector, *_ = np.linalg.lstsq(np.concatenate(expand, 1).T, rows.T, rcond=None)
    np.testing.assert_allclose(np.concatenate(expand, 1).T @ vector, rows.T, atol=1e-4)


def test_padding_does_not_matter(compress, params, batch):
    mask = jnp.arange(16) < jnp.array([16, 9, 3])[:, None]
    runs = [
        compress(params, ids, mask)
        for ids in (batch["context"], jnp.where(mask, batch["context"], 7))
    ]
    real = np.asarray(runs[0].mask)
    np.testing.assert_allclose(*(np.asarray(r.z)[real] for r in runs), atol=1e-5)
    assert real.sum(1).tolist() == [4, 3, 1]


def test_gradient_reaches_all_of_it(system, params, batch):
    def terms(params):
        return system.loss_terms({"params": params}, system.frozen, batch, {}, False)[0]

    @jax.jit
    def steepest(params):
        """Of each part, the largest gradient of both terms."""
        found = []
        for name in ("reconstruct", "anchor"):
            own = jax.grad(lambda p, name=name: terms(p)[name].value)(params)["pool"]
            parts = {k: jnp.stack([jnp.abs(x).max() for x in jax.tree.leaves(g)]).max()
                     for k, g in own.items()}  # fmt: skip
            found.append(parts)
        return found

    rebuilt, aligned = steepest(params)
    assert {k for k, g in rebuilt.items() if g == 0} == {"aligned"}
    assert {k for k, g in aligned.items() if g == 0} == {"expand"}
    assert set(jax.tree.leaves(system.param_labels(params)["pool"])) == {"pool"}


def test_evaluation_reads_it_as_training_did(system, params, batch):
    terms = system.loss_terms({"params": params}, system.frozen, batch, {}, False)[0]
    assert 0 < float(terms["anchor"].value) < 2
    wire = system.wire({"params": params}, system.frozen)
    found, _ = evaluate_ae(
        wire.backbone, wire.latents, np.asarray(batch["context"]), arms=("latent", "shuffled"),
        batch_size=3, segment=8, sink=wire.sink,
    )  # fmt: skip
    np.testing.assert_allclose(found["ae.nll"], terms["reconstruct"].value, rtol=1e-4)
    assert abs(found["ae.nll.shuffled"] - found["ae.nll"]) > 1e-4


@pytest.mark.parametrize(
    "change,told",
    [
        ({"model": {**RUN["model"], "encoder": {"slots": "anchor"}}}, "makes vectors"),
        ({"model": {**RUN["model"], "encoder": {**RUN["model"]["encoder"], "anchor_width": 15}}},
         "use an even number"),
        ({"model": {**RUN["model"], "encoder": {"slots": "states", "output": "hidden"}}},
         "losses.anchor is of encoder.slots=anchor"),
        ({"model": {**RUN["model"], "encoder": {**RUN["model"]["encoder"], "pooler": "queries"}}},
         "encoder.pooler=queries"),
    ],
)  # fmt: skip
def test_what_an_anchor_cannot_have(change, told):
    with pytest.raises(ConfigError, match=told):
        parse(LatentWireRun, RUN | change)
