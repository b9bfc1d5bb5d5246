"""A joint step of two levels and the row model on eight devices is the step on one."""

from __future__ import annotations

import chex
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from latent_jax import run as runs
from latent_jax.sharding import MeshConfig, make_mesh
from latent_jax.train import fit

LEVEL = {
    "width": 16, "heads": 2, "ff": 32, "compressor_layers": 1, "queries": 2, "row_width": 8,
    "expander_layers": 1, "lookback": 1, "codes": 8, "stages": 2,
    "vq": {"init": "random", "reset": {"stale": 1, "fraction": 0.5}},
}  # fmt: skip
TREE = {
    "system": "abstractinator", "name": "sharded",
    "segments": {"rule": "space", "longest": 6, "budget": 8},
    "level": LEVEL, "above": [{**LEVEL, "children": 3}],
    "top": {"layers": 1, "width": 16, "heads": 2, "ff": 32, "head": "mixed"},
    "data": {"text": "pydoc", "window": 24},
    "train": {
        "steps": 3, "batch_size": 16, "log": {"tensorboard": False},
        "phases": [{
            "name": "joint", "data": "joint",
            "train": ["compressor", "expander", "compressor1", "expander1", "top"],
        }],
    },
}  # fmt: skip


@pytest.mark.slow
def test_one_device_equals_eight(devices, tmp_path):
    states = {}
    for name, shape, count in (("one", {"data": 1}, 1), ("eight", {"data": 4, "fsdp": 2}, 8)):
        config = runs.resolve(TREE)
        system = runs.system_class("abstractinator")(config)
        mesh = make_mesh(MeshConfig(**shape), devices[:count])
        states[name] = fit(system, config, tmp_path / name, mesh)
    kernel = states["eight"].params["compressor1"]["stack"]["block0"]["qkv"]["kernel"]
    assert kernel.sharding.spec != P() and len(kernel.devices()) == 8
    one, eight = ((s.params, s.collections) for s in (states["one"], states["eight"]))
    values = jax.tree.map(np.asarray, (one, eight))
    chex.assert_trees_all_close(*values, rtol=2e-3, atol=1e-4)
    resets = values[1][1]["codebook"]["quantiser1"]["resets"]
    assert resets.sum() > 0, "codes of the upper level were restarted, on both alike"
    assert int(values[0][1]["progress"]["positions"][0]) > 0
