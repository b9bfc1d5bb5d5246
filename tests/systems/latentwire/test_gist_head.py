"""The head that fills in masked tokens: what it sees, what it is judged by, whom it teaches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax.backbones.testing import byte_reader
from latent_jax.core.config import parse
from latent_jax.core.errors import ConfigError
from latent_jax.systems.latentwire.config import LatentWireRun
from latent_jax.systems.latentwire.gist_head import GistHead, gist_term
from latent_jax.systems.latentwire.system import LatentWireSystem

RUN = {
    "system": "latentwire",
    "model": {"segment": 8, "ratio": 4, "encoder": {"slots": "pooled"}, "wire": {"d_z": 6},
              "gist_layers": 1},
    "data": {"text": "pydoc", "qa": "lookup", "length": 16, "max_context": 128, "max_prompt": 64,
             "segments": 20, "questions": 20, "mix": {"reconstruct": 1.0}},
    "losses": {"gist": 1.0, "gist_mask": 0.5},
    "eval": {"segments": 4, "quick_segments": 2},
    "train": {"steps": 6, "batch_size": 2},
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


@pytest.fixture(scope="module")
def head():
    """A head, with two rows of four latents and of eight tokens, the second of five."""
    keys = jax.random.split(jax.random.key(0), 3)
    z, x = jax.random.normal(keys[0], (2, 2, 6)), jax.random.normal(keys[1], (2, 8, 16))
    real = jnp.arange(8) < jnp.array([8, 5])[:, None]
    there, where = jnp.ones((2, 2), bool), jnp.array([[1, 5], [1, 5]])
    module = GistHead(16, 2, 8)
    masked = real & (jnp.arange(8) % 2 == 0)
    params = module.init(keys[2], z, there, where, x, real, masked)
    return lambda *a: jax.jit(module.apply)(params, *a), (z, there, where, x, real, masked)


def test_a_masked_token_is_not_looked_at_and_a_shown_one_is(head):
    run, (z, there, where, x, real, masked) = head
    base = run(z, there, where, x, real, masked)
    assert base.shape == x.shape
    hidden = run(z, there, where, x.at[0, 2].multiply(-2.0), real, masked)
    np.testing.assert_array_equal(hidden, base)
    shown = run(z, there, where, x.at[0, 3].multiply(-2.0), real, masked)
    assert float(jnp.abs(shown - base)[0, 2].max()) > 1e-3
    np.testing.assert_array_equal(shown[1], base[1])


def test_latents_are_read_and_padding_is_not(head):
    run, (z, there, where, x, real, masked) = head
    base = run(z, there, where, x, real, masked)
    other = run(z.at[0, 1].multiply(-1.0), there, where, x, real, masked)
    assert float(jnp.abs(other - base)[0, :8].max()) > 1e-3
    gone = run(z.at[0, 1].multiply(-1.0), there.at[0, 1].set(False), where, x, real, masked)
    without = run(z, there.at[0, 1].set(False), where, x, real, masked)
    np.testing.assert_array_equal(gone, without)
    padded = run(z, there, where, x.at[1, 6].multiply(-2.0), real, masked)
    np.testing.assert_allclose(padded[1, :5], base[1, :5], atol=1e-5)
    # Latents know where they stand: swapped, they say something else.
    swapped = run(z, there, where[:, ::-1], x, real, masked)
    assert float(jnp.abs(swapped - base).max()) > 1e-4


def test_it_is_judged_on_masked_tokens_by_cosine_and_distance(system, params, batch):
    reader, args = system.frozen["reader"], (batch["context"], batch["context_mask"])
    wire = system.model.apply({"params": params}, reader, *args, method="compress")
    text = reader["embed"][args[0]]

    def told(share, key=3):
        return gist_term(
            system.model, params, wire, text, args[1], reader["embed"], share, jax.random.key(key)
        )

    lost, cosine = told(1.0)
    assert float(lost.count) == float(cosine.count) == int(args[1].sum())
    half = told(0.5)[0]
    assert 0 < float(half.count) < float(lost.count)
    # By hand: two segments of eight, four latents, none of the tokens shown.
    y = system.model.apply(
        {"params": params},
        wire._replace(
            z=wire.z.reshape(4, 2, -1), mask=wire.mask.reshape(4, 2),
            positions=jnp.array([[1, 5]] * 4), length=jnp.full(4, 8),
        ),
        text.reshape(4, 8, -1), jnp.ones((4, 8), bool), jnp.ones((4, 8), bool), method="filled_in",
    )  # fmt: skip
    x = np.asarray(text).reshape(y.shape)
    unit = lambda v: v / np.linalg.norm(v, axis=-1, keepdims=True)  # noqa: E731
    wanted = (unit(np.asarray(y)) * unit(x)).sum(-1)
    np.testing.assert_allclose(cosine.value, wanted.mean(), rtol=1e-4)
    power = np.square(np.asarray(reader["embed"])).mean()
    error = 0.1 * np.square(np.asarray(y) - x).mean(-1) / power
    np.testing.assert_allclose(lost.value, (1 - wanted + error).mean(), rtol=1e-4)


def test_it_teaches_the_encoder_and_itself_and_nobody_else(system, params, batch):
    def loss(params):
        rngs = {"corrupt": jax.random.key(0)}
        found = system.loss_terms({"params": params}, system.frozen, batch, rngs, True)
        return found[0]["gist"].value, found[2]["gist_cosine"].value

    (_, cosine), flat = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    reached = {k for k, g in flat.items() if any(jnp.abs(x).max() > 0 for x in jax.tree.leaves(g))}
    # What the input statistics would get is thrown away: they are of the frozen group.
    assert reached - {"in_mean", "in_scale"} == {"gist", "pool", "down"}
    assert -1 <= float(cosine) <= 1
    labels = system.param_labels(params)
    assert set(jax.tree.leaves(labels["gist"])) == {"gist"} and labels["in_mean"] == "frozen"


def test_it_is_no_part_of_who_writes_a_wire(system, params):
    wire = system.wire({"params": params}, system.frozen)
    without = {k: v for k, v in params.items() if k != "gist"}
    config = parse(LatentWireRun, {**RUN, "model": {**RUN["model"], "gist_layers": 0},
                                   "losses": {}}).model  # fmt: skip
    plain = type(wire)(wire.backbone, config, without, wire.builder, wire.tasks, wire.name)
    assert plain.origin == wire.origin


@pytest.mark.parametrize("changes", [{"losses": {}}, {"model": {"segment": 8}}])
def test_the_head_and_its_loss_go_together(changes):
    with pytest.raises(ConfigError, match="losses.gist and model.gist_layers go together"):
        parse(LatentWireRun, {**RUN, **changes})
