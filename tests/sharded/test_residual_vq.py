"""A batch on eight devices moves the codebooks exactly as on one: the statistics are global."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from latent_jax import ResidualVQ
from latent_jax.nn.vq_config import ResetConfig, VQConfig
from latent_jax.sharding import MeshConfig, batch_sharding, make_mesh, replicated


@pytest.mark.parametrize("beam", [1, 2])
def test_one_device_equals_eight(devices, beam):
    reset = ResetConfig(fraction=0.9, stale=1, share=0.5)
    module = ResidualVQ(4, 16, 2, VQConfig(kmeans_iters=3, chunk=8, beam=beam, reset=reset))
    x = jax.random.normal(jax.random.key(0), (4, 64, 4)) * jnp.linspace(0.5, 2.0, 64)[:, None]
    mask = jnp.arange(64) % 8 < 5

    def step(variables, x, mask):
        def loss(x):
            out, new = module.apply(variables, x, mask, train=True, mutable=["codebook"])
            return out.loss, (out.indices, new, out.metrics["usage"])

        grad, rest = jax.grad(loss, has_aux=True)(x)
        return grad, *rest

    start = jax.jit(module.init)(jax.random.key(1), x[0])
    results = {}
    for name, mesh in (
        ("one", make_mesh(MeshConfig(data=1), devices[:1])),
        ("eight", make_mesh(MeshConfig(data=4, fsdp=2), devices)),
    ):
        rows, whole = batch_sharding(mesh), replicated(mesh)
        with jax.set_mesh(mesh):
            run = jax.jit(
                step, in_shardings=(whole, rows, rows), out_shardings=(rows, rows, whole, whole)
            )
            variables = jax.device_put(start, whole)
            for part in x:
                grad, indices, variables, usage = run(
                    variables, jax.device_put(part, rows), jax.device_put(mask, rows)
                )
        if name == "eight":
            assert grad.sharding.spec == P(("data", "fsdp")) and len(grad.devices()) == 8
        results[name] = jax.tree.map(np.asarray, (grad, indices, variables, usage))
    np.testing.assert_array_equal(results["one"][1], results["eight"][1])
    chex.assert_trees_all_close(results["one"], results["eight"], rtol=1e-4, atol=1e-5)
    assert results["one"][2]["codebook"]["resets"].sum() > 0
