"""Level and row model trained at once, through the shared trainer."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

import latent_jax
from latent_jax import run as runs
from latent_jax import sharding
from latent_jax.train.checkpoints import load_variables


def test_the_packaged_configuration_trains_all_at_once():
    config = runs.resolve("abstractinator/tiny_joint")
    (phase,) = config.train.phases
    assert phase.data == "joint" and set(phase.train) == {"compressor", "expander", "top"}


@pytest.mark.slow
def test_all_parts_move_and_learn_together(tiny, tmp_path):
    tree = tiny()
    del tree["byte_lm"]
    # The expander meets rows as the row model would have them, once there is one.
    tree["level"]["corrupt"] = {"share": {"value": 0.2, "start": 0.0, "begin": 100}, "by": "model"}
    tree["train"] |= {
        "steps": 200, "checkpoint": {"every": 50, "keep_last": 9},
        "phases": [
            {"name": "joint", "steps": 0, "data": "joint",
             "train": ["compressor", "expander", "top"]}
        ],
    }  # fmt: skip
    one = sharding.make_mesh(sharding.MeshConfig(data=1), jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda config: one)
        done = latent_jax.run(tree, out=str(tmp_path / "run"))
    before, after = (load_variables(done.out, step)[0] for step in ("50", "last"))
    parts = [("params", "compressor"), ("params", "expander"), ("params", "top")]
    for kind, name in [*parts, ("codebook", "quantiser")]:
        same = jax.tree.map(np.array_equal, before[kind][name], after[kind][name])
        assert not all(jax.tree.leaves(same)), name
    rows = [json.loads(line) for line in (done.out / "metrics.jsonl").read_text().splitlines()]
    terms = {k[5:] for row in rows if "loss" in row for k in row if k.startswith("term.")}
    assert terms == {"reconstruct", "commit", "top"}
    # As in phases of their own: see `test_system.test_every_part_learns`.
    assert done["reconstruction.byte_accuracy"] > 0.28
    assert done["top.bits_per_row"] < done["top.unigram_bits_per_row"]
    assert done["top.effective_positions"] > 200 * 32
