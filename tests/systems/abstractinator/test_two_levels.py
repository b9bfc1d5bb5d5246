"""Two levels through the shared trainer, on entropy segments: all phases, freezing, evaluation."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

import latent_jax
from latent_jax import sharding
from latent_jax.train.checkpoints import load_variables

pytestmark = pytest.mark.slow

ABOVE = {
    "children": 2, "width": 24, "heads": 2, "ff": 48, "queries": 2, "row_width": 24,
    "compressor_layers": 1, "expander_layers": 1, "lookback": 1, "codes": 16, "stages": 4,
}  # fmt: skip
PHASES = [
    ("entropy", 40, ["entropy"]), ("level0", 160, ["compressor", "expander"]),
    ("level1", 120, ["compressor1", "expander1"]), ("top", 0, ["top"]),
]  # fmt: skip


@pytest.fixture(scope="module")
def done(tiny, tmp_path_factory):
    """A run of all phases, with a checkpoint at the end of each."""
    come = {"start": 1.0, "begin": 30, "steps": 30}  # rows come through whole until bytes are told
    tree = tiny(
        above=[ABOVE],
        level={"vq": {"reset": {"stale": 5}, "bypass": come}},
        segments={"rule": "entropy", "delta": 0.3, "budget": 12},
        entropy={"layers": 1, "width": 16, "heads": 2, "ff": 32, "reach": 8},
        top={"layers": 1, "width": 16, "heads": 2, "ff": 32, "head": "mixed"},
        eval={"samples": 2, "continuation": 12},
    )
    del tree["byte_lm"]
    tree["train"] |= {
        "steps": 400, "checkpoint": {"every": 40, "keep_last": 20},
        "phases": [
            {"name": data, "steps": steps, "data": data, "train": train}
            for data, steps, train in PHASES
        ],
    }  # fmt: skip
    out = tmp_path_factory.mktemp("two") / "run"
    one = sharding.make_mesh(sharding.MeshConfig(data=1), jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda config: one)
        return latent_jax.run(tree, out=str(out))


def moved(done, first, second):
    """Parts that differ between two checkpoints, in any bit."""
    before, after = (load_variables(done.out, step)[0] for step in (first, second))
    parts = {}
    for kind in ("params", "codebook"):
        for name, tree in before[kind].items():
            same = jax.tree.leaves(jax.tree.map(np.array_equal, tree, after[kind][name]))
            parts[name] = parts.get(name, False) or not all(same)
    return {name for name, changed in parts.items() if changed}


def test_each_phase_moves_its_own_parts_and_no_bit_of_others(done):
    assert moved(done, "40", "200") == {"compressor", "expander", "quantiser"}
    assert moved(done, "200", "320") == {"compressor1", "expander1", "quantiser1"}
    assert moved(done, "320", "last") == {"top"}


def test_the_log_shows_what_each_phase_trained(done):
    rows = [json.loads(line) for line in (done.out / "metrics.jsonl").read_text().splitlines()]
    wanted = {
        "entropy": {"entropy_model"}, "level0": {"reconstruct", "commit"},
        "level1": {"digits1", "commit1"}, "top": {"top", "top_mse", "top_vq"},
    }  # fmt: skip
    for phase, terms in wanted.items():
        mine = [row for row in rows if row.get("phase") == phase and "loss" in row]
        assert {k[5:] for row in mine for k in row if k.startswith("term.")} == terms, phase


def test_the_parts_of_the_evaluation_add_up(done):
    parts = ("bpb.codes", "bpb.level0_given_level1", "bpb.bytes_given_codes")
    assert done["bpb.total"] == pytest.approx(sum(done[name] for name in parts))
    assert done["bytes_per_top_row"] > 1.5 * done["bytes_per_row"] > 2
    nominal = done["reconstruction.level1.code_bits_per_byte"]
    assert nominal == pytest.approx(4 * 4 / done["bytes_per_top_row"])
    # 40 steps of 32 windows; every row of the upper level that they held.
    assert done["top.effective_positions"] > 40 * 32
    assert 0 < done["top.positions_per_byte"] < 0.5
    assert done["bpb.entropy_model"] < 6.5


def test_both_levels_learn(done):
    # Untrained, a digit is one of 16 and a byte one of 256.
    assert done["expander.level1.stage0.accuracy"] > 0.3
    assert done["reconstruction.level1.digit_accuracy"] > 0.15
    assert done["reconstruction.byte_accuracy"] > 0.28
    assert done["reconstruction.level1.byte_accuracy"] > 0.12
    # The row head starts at zero, and from there is soon as good as the rows' mean.
    assert done["top.mse_pre"] < 1.1 * done["top.mse_mean"]


def test_stages_are_dropped_on_both_levels(done):
    for name, stages in (("rate_distortion", 3), ("rate_distortion.level1", 4)):
        curve = [f"{name}.stages{i}" for i in range(1, stages + 1)]
        bits = [done[f"{at}.code_bits_per_byte"] for at in curve]
        assert bits == pytest.approx([bits[0] * i for i in range(1, stages + 1)])
        assert done[f"{curve[0]}.byte_accuracy"] <= done[f"{curve[-1]}.byte_accuracy"]
    whole = done["rate_distortion.level1.stages4.byte_accuracy"]
    assert done["reconstruction.level1.byte_accuracy"] == whole


def test_texts_are_continued_and_timed(done):
    rows = [json.loads(line) for line in (done.out / "samples.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["kind"] == "continuation"]
    assert len(rows) == 2 and all(len(row["prompt"]) <= 12 for row in rows)
    assert all(len(row["continuation"]) > 0 for row in rows)
    assert done["throughput.generate_bytes_per_second"] > 0
