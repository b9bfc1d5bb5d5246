"""Plans equal what is really there: bytes of arrays on eight devices, operations by formula."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax import run as runs
from latent_jax.backbones import ARCHITECTURES, Decoder, skeleton
from latent_jax.backbones.architectures import param_shapes
from latent_jax.backbones.config import BackboneConfig
from latent_jax.backbones.testing import tiny_config
from latent_jax.core import trees
from latent_jax.core.errors import BackboneError, ConfigError, MeshError
from latent_jax.core.flops import matmul_flops
from latent_jax.sharding import MeshConfig, abstract_mesh, make_mesh, tree_shardings
from latent_jax.train.footprint import footprint, variable_shapes
from latent_jax.train.setup import plan_state
from latent_jax.train.testing import ToySystem, toy_config

MESH = MeshConfig(data=2, fsdp=2, tensor=2)


def on_device(tree, device):
    """Bytes of a tree's arrays that really lie on one device."""
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.device == device
    )


@pytest.mark.parametrize("shape", [MESH, MeshConfig(data=1, fsdp=8)])
def test_bytes_are_those_of_the_real_arrays(devices, shape):
    system, config = ToySystem(), toy_config()
    mesh = make_mesh(shape, devices)
    found = footprint(config, system, abstract_mesh(shape, 8)).parts
    state = plan_state(system, config, mesh, next(system.train_data("main", None))).create()
    frozen = jax.device_put(
        system.frozen, tree_shardings(system.frozen, system.logical_rules, mesh)
    )
    held = state.params.pop("fixed")
    real = {
        "frozen": frozen, "trained parameters": state.params, "held parameters": held,
        "collections": state.collections, "optimizer state": state.opt_state,
        "gradients": state.params,
    }  # fmt: skip
    for name, tree in real.items():
        count, whole, each = found[name]
        assert count == trees.count_params(tree) and whole == trees.bytes_of(tree), name
        assert each == on_device(tree, devices[3]), name


SYSTEMS = ("latentwire/tiny", "megacontext/tiny", "abstractinator/tiny", "spacing/tiny")


@pytest.mark.slow
@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_by_shape_is_the_system_itself(devices, name):
    config = runs.resolve(name, {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2})
    system = runs.system_class(config.system)(config)
    phases = [p.data for p in config.train.phases] or ["main"]
    for phase in phases:
        specs = [
            {k: (s.shape, np.dtype(s.dtype)) for k, s in spec.arrays.items()}
            for spec in system.batch_specs(phase)
        ]
        stream = system.train_data(phase, None)
        for _ in range(3):
            batch = {k: (np.shape(v), np.asarray(v).dtype) for k, v in next(stream).items()}
            assert batch in specs
    batch = next(system.train_data(phases[0], None))
    mesh = make_mesh(config.mesh, devices)
    state = plan_state(system, config, mesh, batch).create()
    shapes = variable_shapes(system, 0, batch)
    real = {"params": state.params, **state.collections}
    assert jax.tree.structure(shapes) == jax.tree.structure(real)
    assert all(
        a.shape == b.shape and a.dtype == b.dtype
        for a, b in zip(jax.tree.leaves(shapes), jax.tree.leaves(real), strict=True)
    )
    found = footprint(config, system, abstract_mesh(config.mesh, 8)).parts
    assert found["optimizer state"][2] == on_device(state.opt_state, devices[5])
    assert found["trained parameters"][2] == on_device(state.params, devices[5])


@pytest.mark.parametrize("remat", [False, True])
def test_operations_of_a_decoder_are_two_n_per_token_and_pass(remat):
    c = tiny_config("llama")
    decoder, t, b = Decoder(c, remat=remat), 16, 3
    params = param_shapes(c)
    x = jax.ShapeDtypeStruct((b, t, c.hidden_size), jnp.float32)

    def loss(params, x):
        hidden = decoder.apply({"params": params}, x).hidden
        return decoder.apply({"params": params}, hidden, method="unembed").sum()

    def count(fn):
        return matmul_flops(lambda p, x: (fn(p, x), None), params, x)[0]

    maps = c.num_layers * sum(i * o for i, o in c.projection_shapes.values())
    table = 2 * c.vocab_size * c.hidden_size * t * b
    scores = 4 * c.num_layers * c.num_heads * c.head_dim * t**2 * b
    layers = 2 * maps * t * b + scores
    assert count(loss) == layers + table
    # The gradient of a sum does not need the logits, and recomputing a layer not its last product.
    again = layers - 2 * c.num_layers * c.intermediate_size * c.hidden_size * t * b
    frozen = layers + (layers + scores + table) + again * remat  # 4 N
    assert count(jax.grad(loss, 1)) == frozen
    assert count(jax.grad(loss)) == frozen + layers - scores + table  # 6 N


def test_micro_batches_keep_less_and_compute_the_same():
    one = footprint(toy_config(), ToySystem(), abstract_mesh(MeshConfig(), 1)).steps[0]
    four = footprint(toy_config(accumulate=4), ToySystem(), abstract_mesh(MeshConfig(), 1)).steps[0]
    assert four.flops == one.flops == 16 * (2 * 8 * 8 + 2 * 8 * 16 * 2 + 2 * 16 * 3)
    assert four.kept < one.kept / 2


def test_refusals():
    for wrong, match in (
        (MeshConfig(fsdp=3), "take 3 devices, which does not divide 8"),
        (MeshConfig(data=16), "needs 16 devices and there are 8"),
    ):
        with pytest.raises(MeshError, match=match):
            abstract_mesh(wrong, 8)
    with pytest.raises(MeshError, match="train.batch_size = 16: does not divide"):
        footprint(toy_config(), ToySystem(), abstract_mesh(MeshConfig(), 32))
    with pytest.raises(ConfigError, match="none of the loss terms .* has a weight"):
        footprint(toy_config(), ToySystem(weights={}), abstract_mesh(MeshConfig(), 1))


def test_skeletons_are_found_without_a_download():
    known = skeleton(BackboneConfig("meta-llama/Llama-3.1-8B", "bfloat16"))
    assert known.config is ARCHITECTURES["meta-llama/Llama-3.1-8B"]
    assert trees.bytes_of(known.params) == 2 * 8_030_261_248
    packaged = skeleton(BackboneConfig("tiny"))
    assert packaged.tokenizer.vocab_size <= packaged.config.vocab_size
    with pytest.raises(BackboneError, match="someone/Model-9.9B: its architecture is not known"):
        skeleton(BackboneConfig("someone/Model-9.9B"))
