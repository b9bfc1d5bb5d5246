"""Terms that gists may be trained on beside the divergence behind them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax import run
from latent_jax.core.errors import ConfigError
from latent_jax.systems.megacontext.stand_in import alikeness
from latent_jax.systems.megacontext.system import MegaContextSystem

SMALL = {
    "mesh.data": 1, "train.phases": [], "train.steps": 1, "losses.rebuild": 0.5,
    "losses.apart": 0.1, "losses.boundary": 3.0, "data.rows": 40,
}  # fmt: skip


@pytest.fixture(scope="module")
def system():
    return MegaContextSystem(run.resolve("megacontext/tiny", SMALL))


@pytest.fixture(scope="module")
def variables(system):
    return system.init({"params": jax.random.key(0)}, {})


@pytest.fixture(scope="module")
def ids(system):
    return jnp.asarray(system.eval_data()[:2, :64])


def test_gists_that_are_no_more_alike_than_their_texts_cost_nothing():
    raw = jax.random.normal(jax.random.key(0), (2, 6, 4, 1, 8))
    mean = raw.mean(2, keepdims=True)
    assert alikeness(mean, raw, 2).value < 1e-12
    same = jnp.broadcast_to(mean[:, :1], mean.shape)
    assert alikeness(same, raw, 2).value > 0.5
    # Rows are texts of their own: gists are compared within one.
    twice = jnp.concatenate([mean[:, :3]] * 2, 1)
    assert alikeness(twice, jnp.concatenate([raw[:, :3]] * 2, 1), 2).value < 1e-12


def test_a_step_down_moves_gists_apart():
    raw = jax.random.normal(jax.random.key(0), (2, 6, 4, 1, 8))
    shared = jax.random.normal(jax.random.key(1), (2, 1, 1, 1, 8))
    gists = raw.mean(2, keepdims=True) + 2 * shared
    cost, slope = jax.value_and_grad(lambda g: alikeness(g, raw, 2).value)(gists)
    assert alikeness(gists - 0.1 * slope, raw, 2).value < cost


def test_a_block_is_rebuilt_from_its_own_gist_alone(system, variables, ids):
    size, base = system.config.model.layout.block, system.frozen["base"]
    gist = variables["params"]["gist"]

    @jax.jit
    def rebuilt(gist, ids, scale):
        _, made = system._behind_all(gist, base, ids, None, 4)
        slots = made.placed.v.shape[2] * size // ids.shape[1]
        which = jnp.repeat(scale, slots)[:, None, None]
        placed = made.placed._replace(v=made.placed.v * which)
        return system._rebuilt(base, ids, placed, None)

    blocks = ids.shape[1] // size
    every = jnp.ones(blocks)
    whole = rebuilt(gist, ids, every)
    assert int(whole.count) == ids.size // size * (size - 1)
    # Each gist matters, to its own block: what changing several changes is the sum of that.
    changes = [float(rebuilt(gist, ids, every.at[i].set(0.0)).sum - whole.sum) for i in (0, 3)]
    both = float(rebuilt(gist, ids, every.at[jnp.array([0, 3])].set(0.0)).sum - whole.sum)
    assert min(map(abs, changes)) > 1e-2
    np.testing.assert_allclose(sum(changes), both, rtol=1e-3, atol=1e-2)


def test_terms_of_a_step(system, variables, ids):
    batch = {"ids": ids}
    found = jax.jit(
        lambda v: system.loss_terms(v, system.frozen, batch, {}, False)[0]
    )(variables)
    assert {"substitute", "next_token", "rebuild", "apart"} <= set(found)
    # The first predicted block of a chunk counts three times.
    c = system.config
    size, chunk = c.model.layout.block, c.data.chunk
    told = chunk * size - (c.model.layout.protected * size - 1) - 1
    chunks = ids.shape[1] // (chunk * size) - 1
    assert float(found["substitute"].count) == len(ids) * chunks * (3 * size + told - size)
    slope = jax.jit(jax.grad(
        lambda v: system.loss_terms(v, system.frozen, batch, {}, False)[0]["rebuild"].value
    ))(variables)  # fmt: skip
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(slope["params"]["gist"])) > 0


@pytest.mark.parametrize("where", ["losses", "phase"])
def test_only_trained_values_can_be_apart(where):
    given = {"losses.apart": 0.1} if where == "losses" else {
        "train.phases": [{"name": "one", "train": ["maps"], "weights": {"apart": 0.1}}]
    }  # fmt: skip
    with pytest.raises(ConfigError, match="losses.apart compares values that a GistNet makes"):
        run.resolve("megacontext/tiny", given | {"model.gist.kind": "embeddings"})
