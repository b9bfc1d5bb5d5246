"""Who sees what: causality, the bottleneck, slots without identity, ablations."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax.core.config import parse
from latent_jax.core.errors import ConfigError
from latent_jax.systems.spacing import ablation
from latent_jax.systems.spacing.config import SpacingModelConfig
from latent_jax.systems.spacing.embedding import GapEmbedding
from latent_jax.systems.spacing.model import SpacingModel

T, M = 24, 3


def made(**memory):
    tree = {
        "layers": 2, "heads": 2, "width": 16, "ff": 32,
        "embed": {"near": 4, "kernels": 4, "knots": 16}, "memory": {"slots": M, **memory},
    }  # fmt: skip
    config = parse(SpacingModelConfig, tree)
    model = SpacingModel(config, reach=16.0)
    key = jax.random.key(0)
    gaps = 1 + 0.3 * jax.random.normal(key, (2, T))
    height = jnp.asarray([10.0, 12.0])
    init = jax.jit(model.init)
    params = init({"params": key, "sample": key}, gaps, height)["params"]
    # Every matrix moves, also those that start small.
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    leaves = [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    params = jax.tree.unflatten(tree, leaves)

    @jax.jit
    def run(gaps, cuts=None, change=None, seed=0):
        rngs = {"sample": jax.random.key(seed)}
        return model.apply({"params": params}, gaps, height, cuts, change, rngs=rngs)

    return config, run, gaps


@pytest.fixture(scope="module", params=["attention", "claims"])
def postfix(request):
    pool = {"attention": "weighted", "claims": "sum"}[request.param]
    return made(kind="postfix", read=request.param, pool=pool)


@pytest.mark.parametrize("kind", ["none", "prefix"])
def test_a_prediction_never_sees_what_follows(kind):
    _, run, gaps = made(kind=kind)
    chex.assert_shape(run(gaps).raw, (2, T, 24))
    changed = gaps.at[:, 15:].add(0.5)
    before, after = run(gaps).raw, run(changed).raw
    chex.assert_trees_all_close(before[:, :15], after[:, :15], atol=1e-5)
    assert float(jnp.abs(before[:, 15:] - after[:, 15:]).min(0).max()) > 1e-3


def test_postfix_slots_see_the_past_of_their_cut_only(postfix):
    config, run, gaps = postfix
    cuts = jnp.asarray([9, 20])
    before = run(gaps, cuts)
    chex.assert_shape(before.slots, (2, 2, M, config.slot_width))
    after = run(gaps.at[:, 12].add(0.5), cuts)
    chex.assert_trees_all_close(before.raw[:, 0], after.raw[:, 0], atol=1e-5)
    assert float(jnp.abs(before.raw[:, 1] - after.raw[:, 1]).max()) > 1e-3


def test_a_group_of_slots_does_not_see_the_others(postfix):
    _, run, gaps = postfix
    alone = run(gaps, jnp.asarray([20])).raw[:, 0]
    together = run(gaps, jnp.asarray([5, 20])).raw[:, 1]
    chex.assert_trees_all_close(alone, together, atol=1e-5)


def test_nothing_passes_by_the_slots(postfix):
    config, run, gaps = postfix
    base = ablation.none(config)
    emptied = ablation.overwrite(base, list(range(M)), jnp.zeros((M, config.slot_width)))
    out = run(gaps, None, emptied).raw
    other = run(gaps + 0.3, None, emptied).raw
    chex.assert_trees_all_close(out, other, atol=1e-6)


def test_an_ablation_that_changes_nothing(postfix):
    config, run, gaps = postfix
    unchanged = run(gaps, None, ablation.none(config)).raw
    chex.assert_trees_all_close(run(gaps).raw, unchanged, atol=1e-6)


def test_hidden_slots_are_not_read(postfix):
    config, run, gaps = postfix
    out = run(gaps, None, ablation.hide(ablation.none(config), [1]))
    assert float(out.read_out[..., 1].max()) < 1e-6
    whole = M - 1 if config.memory.pool == "sum" else 1
    np.testing.assert_allclose(out.read_out.sum(-1), whole, rtol=1e-5)


@pytest.mark.parametrize(
    "how", [{}, {"read": "claims", "pool": "sum"}], ids=["attention", "claims"]
)
def test_slots_without_identity_can_change_places(how):
    config, run, gaps = made(kind="postfix", identity="anonymous", **how)
    base = ablation.none(config)
    moved = ablation.exchange(base, np.random.default_rng(0), "content")
    chex.assert_trees_all_close(
        run(gaps, None, base).raw, run(gaps, None, moved).raw, atol=2e-5
    )
    out = run(gaps).slots[:, 0]
    assert float(jnp.abs(out[:, 0] - out[:, 1]).max()) > 1e-2, "drawn contents break symmetry"


def test_what_slots_hold_adds_up_to_the_embedding():
    config = parse(SpacingModelConfig, {
        "width": 16, "heads": 2, "embed": {"near": 4, "kernels": 4, "knots": 16, "products": 2},
    })  # fmt: skip
    embedding = GapEmbedding(config, 16.0, (11.0, 1.0, 9.0, 13.0), T - 2)
    key = jax.random.key(0)
    gaps, height = 1 + 0.3 * jax.random.normal(key, (2, T)), jnp.asarray([10.0, 12.0])
    cuts = jnp.asarray([3, 23])
    claims = jax.nn.softmax(2 * jax.random.normal(key, (2, 2, M, T - 2)), axis=2)
    init = jax.jit(embedding.init)
    params = init(key, gaps, height)["params"]
    params |= {"offset": jnp.arange(4.0), "level": jnp.linspace(0.0, 1.0, T - 2),
               "spread": jnp.linspace(-2.0, -1.0, T - 2), "gate": params["gate"] + 0.3}  # fmt: skip
    params["embed"]["bias"] = jnp.arange(16.0)
    whole = jax.jit(embedding.apply)({"params": params}, gaps, height)
    # What was a bias goes by a slot's share.
    dense = params["embed"]
    shared = {"kernel": jnp.concatenate([dense["kernel"], dense["bias"][None]])}
    split = {"params": params | {"embed": shared}}
    held = jax.jit(embedding.apply)(split, gaps, height, cuts, claims)
    for all_of_it, parts in zip(whole, held, strict=True):
        np.testing.assert_allclose(parts.sum(2), all_of_it[:, cuts], rtol=1e-4, atol=1e-4)
        assert float(jnp.abs(parts[:, :, 0] - parts[:, :, 1]).max()) > 1e-3


def test_slots_with_identity_cannot(postfix):
    config, run, gaps = postfix
    moved = ablation.exchange(ablation.none(config), np.random.default_rng(0), "identity")
    assert float(jnp.abs(run(gaps).raw - run(gaps, None, moved).raw).max()) > 1e-3


def test_switches():
    config, run, gaps = made(kind="postfix", norm_cap=0.5, block_norm=True)
    assert float(jnp.linalg.norm(run(gaps).slots, axis=-1).max()) <= 0.5 + 1e-4
    with pytest.raises(ConfigError, match="anonymous needs"):
        parse(SpacingModelConfig, {"memory": {"kind": "prefix", "identity": "anonymous"}})
    with pytest.raises(ConfigError, match="slots=0"):
        parse(SpacingModelConfig, {"memory": {"kind": "postfix", "slots": 0}})
    for memory, says in (
        ({"kind": "prefix", "pool": "sum"}, "pool=sum needs .*postfix"),
        ({"kind": "postfix", "read": "claims"}, "read=claims needs .*pool=sum"),
    ):
        with pytest.raises(ConfigError, match=says):
            parse(SpacingModelConfig, {"memory": memory})
    with pytest.raises(ConfigError, match="all alike"):
        memory = {"kind": "postfix", "identity": "off", "content": "zeroed"}
        parse(SpacingModelConfig, {"memory": memory})
    with pytest.raises(ConfigError, match="must divide"):
        parse(SpacingModelConfig, {"width": 30, "heads": 4})


def test_a_longer_window_shows_no_longer_past():
    config = parse(SpacingModelConfig, {
        "layers": 1, "attention_layers": 0, "heads": 2, "width": 8, "ff": 8,
        "embed": {"near": 2, "kernels": 4, "knots": 16, "products": 2},
    })  # fmt: skip
    model = SpacingModel(config, reach=12.0, context=10)
    gaps = 1 + 0.3 * jax.random.normal(jax.random.key(0), (1, T))
    height = jnp.full(1, 2 * np.pi)
    params = model.init(jax.random.key(1), gaps, height)["params"]
    params["gaps"]["spread"] = jnp.linspace(-1.0, 0.0, 10)
    run = jax.jit(lambda gaps: model.apply({"params": params}, gaps, height).raw)
    own = run(gaps[:, 10:20])[:, -1]
    chex.assert_trees_all_close(run(gaps)[:, 19], own, atol=1e-5)
    chex.assert_trees_all_close(run(gaps.at[:, 9].add(1.0))[:, 19], own, atol=1e-5)
    assert float(jnp.abs(run(gaps.at[:, 10].add(1.0))[:, 19] - own).max()) > 1e-4


def test_only_the_last_blocks_attend():
    config = parse(SpacingModelConfig, {
        "layers": 3, "attention_layers": 1, "heads": 2, "width": 8, "ff": 8,
        "embed": {"near": 2, "kernels": 0},
    })  # fmt: skip
    shapes = jax.eval_shape(
        SpacingModel(config).init, jax.random.key(0), jnp.ones((1, 5)), jnp.ones(1)
    )["params"]
    assert [f"block_{i}" for i in range(3) if "qkv" in shapes[f"block_{i}"]] == ["block_2"]
    with pytest.raises(ConfigError, match="attention_layers=4"):
        parse(SpacingModelConfig, {"layers": 3, "attention_layers": 4})
    with pytest.raises(ConfigError, match="needs a block that attends"):
        parse(SpacingModelConfig, {"attention_layers": 0, "memory": {"kind": "prefix"}})
