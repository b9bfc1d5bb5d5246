from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from latent_jax.sharding import MeshConfig, make_mesh
from latent_jax.train import fit
from latent_jax.train.testing import ToySystem, toy_config


def train(tmp_path, mesh, **kw):
    return fit(ToySystem(), toy_config(steps=6, **kw), tmp_path, mesh=mesh)


@pytest.mark.parametrize("shape", [{"data": 8}, {"data": 2, "fsdp": 4},
                                   {"data": 2, "fsdp": 2, "tensor": 2}])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_one_device_equals_eight(tmp_path, devices, shape, accumulate):
    if accumulate == 2 and shape != {"data": 2, "fsdp": 4}:
        pytest.skip("one mesh is enough")
    one = train(tmp_path / "one", make_mesh(MeshConfig(data=1), devices[:1]), accumulate=accumulate)
    many = train(tmp_path / "many", make_mesh(MeshConfig(**shape), devices), accumulate=accumulate)
    close = lambda a, b: np.testing.assert_allclose(  # noqa: E731
        np.asarray(a), np.asarray(b), rtol=2e-4, atol=1e-5
    )
    jax.tree.map(close, one.params, many.params)
    jax.tree.map(close, one.collections, many.collections)
    assert int(many.step) == 6


def test_moments_are_sharded_like_their_parameter(tmp_path, devices):
    state = train(tmp_path, make_mesh(MeshConfig(data=2, fsdp=4), devices))
    kernel = state.params["hidden"]["kernel"]
    assert kernel.sharding.spec[0] == "fsdp"
    adam = next(s for s in jax.tree.leaves(state.opt_state["body"],
                                           is_leaf=lambda x: hasattr(x, "mu")) if hasattr(s, "mu"))
    for moment in (adam.mu, adam.nu):
        assert moment["hidden"]["kernel"].sharding == kernel.sharding
        assert len(moment["hidden"]["kernel"].sharding.device_set) == 8
    assert state.step.sharding.spec == P()
