"""Meshes, rules and placement on eight virtual devices, asserting the specs themselves."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from latent_jax.core import trees
from latent_jax.core.config import parse
from latent_jax.core.errors import ConfigError, MeshError
from latent_jax.sharding import (
    MeshConfig,
    Rules,
    batch_sharding,
    check_batch,
    constrain,
    follow_params,
    make_mesh,
    replicated,
    shard_batch,
    sharding_table,
    spec_for,
    tree_shardings,
)
from latent_jax.sharding.distributed import initialize_distributed, resolve

RULES: Rules = (
    (r"embed$", ("vocab", "embed")),
    (r"(q|gate)/kernel$", ("layers", "embed", "heads")),
    (r"down/kernel$", ("layers", "mlp", "embed")),
)


@pytest.fixture(scope="module")
def mesh(devices: list[jax.Device]) -> Mesh:
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), devices)


def make_params() -> dict[str, Any]:
    return {
        "embed": jnp.ones((6, 4)),
        "layers": {
            "norm": jnp.ones((3, 4)),
            "q": {"kernel": jnp.ones((3, 4, 8))},
            "gate": {"kernel": jnp.ones((3, 4, 5))},  # 5 does not divide
            "down": {"kernel": jnp.ones((3, 8, 4))},
        },
    }


SPECS = {
    "embed": P("tensor", "fsdp"),
    "layers/norm": P(),
    "layers/q/kernel": P(None, "fsdp", "tensor"),
    "layers/gate/kernel": P(None, "fsdp"),
    "layers/down/kernel": P(None, "tensor", "fsdp"),
}


def specs(tree: Any) -> dict[str, P]:
    return {path: leaf.spec for path, leaf in trees.flatten(tree).items()}


def test_mesh_is_auto_and_fills_the_devices(devices: list[jax.Device]) -> None:
    for config, shape in (
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(fsdp=2), (4, 2, 1)),
        (MeshConfig(data=1, fsdp=-1, tensor=2), (1, 4, 2)),
        (MeshConfig(data=2, fsdp=2, tensor=2), (2, 2, 2)),
    ):
        mesh = make_mesh(config, devices)
        assert mesh.devices.shape == shape and mesh.axis_names == ("data", "fsdp", "tensor")
        assert mesh.axis_types == (AxisType.Auto,) * 3


def test_smaller_mesh_uses_the_first_devices(
    devices: list[jax.Device], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        mesh = make_mesh(MeshConfig(data=1), devices)
    assert mesh.size == 1 and mesh.devices.flat[0] == devices[0]
    assert "uses 1 of 8" in caplog.text


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (MeshConfig(data=3), "3x1x1 needs 3 devices and there are 8; what fits: data = 8"),
        (MeshConfig(data=4, tensor=4), "needs 16 devices and there are 8; what fits: data = 2"),
        (MeshConfig(fsdp=3), "take 3 devices, which does not divide 8; .* product in 1, 2, 4, 8"),
        (MeshConfig(require="gpu"), r"mesh.require = gpu: JAX sees 8 cpu .* mesh.require=null"),
        (MeshConfig(require="tpu"), r"no tpu; pip install 'latent-jax\[tpu\]'"),
    ],
)
def test_a_mesh_that_does_not_fit(
    devices: list[jax.Device], config: MeshConfig, match: str
) -> None:
    with pytest.raises(MeshError, match=match) as caught:
        make_mesh(config, devices)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_require_what_is_there(devices: list[jax.Device]) -> None:
    assert make_mesh(MeshConfig(require="cpu"), devices).size == 8


def test_mesh_config_is_checked_when_parsed() -> None:
    assert parse(MeshConfig, {"fsdp": 2}) == MeshConfig(fsdp=2)
    for tree, match in (
        ({"data": 0}, "mesh: data = 0: allowed"),
        ({"fsdp": -1}, "only one axis can be -1"),
        ({"data": -2}, "mesh.data = -2: out of range"),
        ({"require": "cuda"}, "allowed: cpu | gpu | tpu"),
    ):
        with pytest.raises(ConfigError, match=match.replace("|", r"\|")):
            parse(MeshConfig, tree, where="mesh")


def test_rules_give_the_specs(mesh: Mesh) -> None:
    params = make_params()
    assert specs(tree_shardings(params, RULES, mesh)) == SPECS
    abstract = jax.eval_shape(make_params)
    assert specs(tree_shardings(abstract, RULES, mesh)) == SPECS


def test_arrays_and_moments_land_where_the_rules_say(mesh: Mesh) -> None:
    places = tree_shardings(jax.eval_shape(make_params), RULES, mesh)
    params = jax.jit(make_params, out_shardings=places)()
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    state_shape = jax.eval_shape(tx.init, params)
    opt_places = tree_shardings(state_shape, RULES, mesh)
    assert specs(opt_places) == specs(follow_params(state_shape, params, places, mesh))
    state = jax.jit(tx.init, out_shardings=opt_places)(params)

    def step(params: Any, state: Any) -> tuple[Any, Any]:
        grads = jax.grad(lambda p: sum((x**3).sum() for x in jax.tree.leaves(p)))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    run = jax.jit(step, donate_argnums=(0, 1), out_shardings=(places, opt_places))
    params, state = run(params, state)
    found = {path: leaf.sharding.spec for path, leaf in trees.flatten(params).items()}
    assert found == SPECS
    for path, leaf in trees.flatten(state).items():
        wanted = next((s for p, s in SPECS.items() if path.endswith("/" + p)), P())
        assert leaf.sharding.spec == wanted, path
    # Each device really holds a piece only.
    kernel = params["layers"]["q"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (3, 2, 4)


def test_follow_params_needs_path_and_shape(mesh: Mesh) -> None:
    params = {"q": {"kernel": jnp.ones((4, 8))}}
    places = {"q": {"kernel": NamedSharding(mesh, P("fsdp", "tensor"))}}
    state = {
        "mu": params,
        "row": {"q": {"kernel": jnp.ones(4)}},
        "other": jnp.ones((4, 8)),
        "count": jnp.zeros(()),
    }
    assert specs(follow_params(state, params, places, mesh)) == {
        "mu/q/kernel": P("fsdp", "tensor"), "row/q/kernel": P(), "other": P(), "count": P()
    }  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "axes", "spec"),
    [
        ((4, 4), ("embed", "heads"), P("fsdp", "tensor")),
        ((3, 4, 4), ("embed", "heads"), P(None, "fsdp", "tensor")),  # for the last dimensions
        ((4,), ("embed", "heads"), P()),  # too few: a counter, a factored moment
        ((), ("embed",), P()),
        ((3, 4), ("embed", "heads"), P(None, "tensor")),
        ((4, 3), ("embed", "heads"), P("fsdp")),
        ((8, 2), ("batch", "length"), P(("data", "fsdp"))),
        ((2, 2), ("batch", None), P("data")),  # a prefix of the axes still splits
        ((4, 4), ("embed", "embed"), P("fsdp")),  # an axis only once
        ((4, 4), (("data", "tensor"), "fsdp"), P(("data", "tensor"), "fsdp")),
    ],
)
def test_spec_for(mesh: Mesh, shape: tuple[int, ...], axes: Any, spec: P) -> None:
    assert spec_for(shape, axes, mesh) == spec


def test_unknown_axis_names_the_known(mesh: Mesh) -> None:
    with pytest.raises(ValueError, match="unknown axis 'headz'; allowed: data, fsdp, tensor"):
        spec_for((4,), ("headz",), mesh)


@given(
    st.lists(st.integers(1, 9), max_size=4),
    st.lists(st.sampled_from(["batch", "embed", "heads", "data", None]), max_size=4),
)
def test_any_shape_can_be_placed(shape: list[int], axes: list[str | None]) -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])
    spec = spec_for(shape, axes, mesh)
    local = NamedSharding(mesh, spec).shard_shape(tuple(shape))  # raises if it does not divide
    assert all(0 < small <= big for small, big in zip(local, shape, strict=True))


def test_batches(mesh: Mesh) -> None:
    batch = {"ids": np.arange(8).reshape(4, 2), "ragged": np.ones((3, 2)), "scale": np.float32(2)}
    placed = shard_batch(batch, mesh)
    assert placed["ids"].sharding.spec == batch_sharding(mesh).spec == P(("data", "fsdp"))
    assert placed["ids"].addressable_shards[0].data.shape == (1, 2)
    assert placed["ragged"].sharding == replicated(mesh) == placed["scale"].sharding
    np.testing.assert_array_equal(placed["ids"], batch["ids"])
    check_batch(8, mesh)
    with pytest.raises(MeshError, match=r"train.batch_size = 6: .* multiples of 4, e.g. 8"):
        check_batch(6, mesh)


def test_constrain_follows_the_current_mesh(mesh: Mesh) -> None:
    x = jnp.ones((4, 6, 4))
    assert constrain(x, "batch", None, "heads") is x  # no mesh: nothing to do
    with jax.set_mesh(mesh):
        y = jax.jit(lambda v: constrain(v * 2, "batch", None, "heads"))(x)
    assert y.sharding.spec == P(("data", "fsdp"), None, "tensor")


def test_eight_devices_compute_what_one_computes(devices: list[jax.Device]) -> None:
    params = make_params()
    x = np.linspace(-1, 1, 8 * 4, dtype=np.float32).reshape(8, 4)

    def loss(p: Any, x: Any) -> Any:
        h = jnp.tanh(x @ p["layers"]["q"]["kernel"][0])
        return ((h @ p["layers"]["down"]["kernel"][1]) ** 2).mean()

    results = []
    for config in (MeshConfig(data=1), MeshConfig(), MeshConfig(data=2, fsdp=2, tensor=2)):
        mesh = make_mesh(config, devices)
        places = tree_shardings(params, RULES, mesh)
        placed = jax.device_put(params, places)
        grads = jax.jit(jax.grad(loss), out_shardings=places)(
            placed, shard_batch({"x": x}, mesh)["x"]
        )
        results.append(jax.device_get(grads))
    for other in results[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), results[0], other
        )


def test_table_tells_bytes_per_device(mesh: Mesh) -> None:
    params = make_params()
    rows = sharding_table(params, tree_shardings(params, RULES, mesh))
    table = {path: row for path, *row in rows}
    assert table["layers/q/kernel"] == [(3, 4, 8), "-, fsdp, tensor", 3 * 2 * 4 * 4]
    assert table["layers/norm"] == [(3, 4), "replicated", 48]


def test_single_process_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENT_JAX_DISTRIBUTED", "off")
    assert initialize_distributed() is False
    assert not jax.distributed.is_initialized()


@pytest.mark.parametrize(
    ("env", "settings"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, {}),
        ({"LATENT_JAX_DISTRIBUTED": "off", "SLURM_NTASKS": "4"}, None),
        ({"LATENT_JAX_DISTRIBUTED": "tpu"}, {}),
        ({"JAX_NUM_PROCESSES": "1"}, None),
        (
            {"SLURM_NTASKS": "8", "SLURM_NNODES": "2", "SLURM_LOCALID": "3"},
            {"local_device_ids": [3]},
        ),
        (
            {"SLURM_NTASKS": "2", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4"},
            {"local_device_ids": [0, 1, 2, 3]},
        ),
        ({"SLURM_NTASKS": "2", "SLURM_NNODES": "2"}, {}),
        (
            {
                "JAX_COORDINATOR_ADDRESS": "h:1",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": "0",
            },
            {"coordinator_address": "h:1", "num_processes": 2, "process_id": 0},
        ),
    ],
)
def test_distributed_detection(env: dict[str, str], settings: dict[str, Any] | None) -> None:
    assert resolve(env) == settings


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("h:1", 2, None), "process_id missing"),
        (("h", 2, 0), "write it as host:port"),
        (("h:1", 2, 2), "process_id = 2: allowed: 0 to 1"),
    ],
)
def test_contradictory_flags(arguments: tuple[Any, ...], match: str) -> None:
    with pytest.raises(MeshError, match=match):
        resolve({}, *arguments)
    with pytest.raises(MeshError, match="allowed: auto, off"):
        resolve({"LATENT_JAX_DISTRIBUTED": "maybe"})
    with pytest.raises(MeshError, match="SLURM_NTASKS = 'x'"):
        resolve({"SLURM_NTASKS": "x"})


# Two processes of two devices each: the batch is the two parts, the weights are shared out.
TWO_PROCESSES = """
import sys
import jax, numpy as np
from latent_jax.sharding import MeshConfig, initialize_distributed, make_mesh, shard_batch
from latent_jax.sharding import tree_shardings
assert initialize_distributed(sys.argv[1], 2, int(sys.argv[2]), timeout=60)
mesh = make_mesh(MeshConfig(fsdp=2))
part = np.arange(4.0).reshape(2, 2) + 4 * jax.process_index()
x = shard_batch({"x": part}, mesh)["x"]
places = tree_shardings({"w": np.ones((2, 2))}, (("w", ("embed",)),), mesh)
w = jax.jit(lambda: {"w": jax.numpy.eye(2)}, out_shardings=places)()
total = jax.jit(lambda x, w: (x @ w["w"]).sum())(x, w)
print("RESULT", mesh.size, x.shape, float(total), flush=True)
"""


@pytest.mark.slow
def test_two_processes_make_one_batch() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    env = dict(os.environ, XLA_FLAGS="--xla_force_host_platform_device_count=2")
    env["PYTHONPATH"] = str(Path(__file__).parents[2])
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, address, str(i)],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    try:
        for worker in workers:
            out, err = worker.communicate(timeout=120)
            assert "RESULT 4 (4, 2) 28.0" in out, err[-2000:]
    finally:
        for worker in workers:
            worker.kill()
