"""Through the shared trainer: two stages, freezing, evaluation, and what is refused."""

from __future__ import annotations

import gzip
import json
import math

import jax
import numpy as np
import pytest

import latent_jax
from latent_jax import run as runs
from latent_jax import sharding
from latent_jax.core.errors import ConfigError, DataError, RunError
from latent_jax.systems.abstractinator import held, recipe
from latent_jax.systems.abstractinator.evaluate import compressed_bits_per_byte
from latent_jax.train.checkpoints import load_variables


@pytest.fixture(scope="module")
def done(tiny, tmp_path_factory):
    """A run of all phases, with a checkpoint where the level is frozen."""
    tree = tiny()
    tree["train"]["checkpoint"] = {"every": 140}
    out = tmp_path_factory.mktemp("abstractinator") / "run"
    # On one device: eight virtual ones only share these cores, and compile for longer.
    one = sharding.make_mesh(sharding.MeshConfig(data=1), jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda config: one)
        return latent_jax.run(tree, out=str(out))


def test_frozen_means_nothing_moves(done):
    before, _ = load_variables(done.out, "140")
    after, _ = load_variables(done.out, "last")
    # Weights, codes, cluster sizes, sums, staleness, counters: every bit.
    same = lambda a, b: jax.tree.leaves(jax.tree.map(np.array_equal, a, b))  # noqa: E731
    for part in ("compressor", "expander"):
        assert all(same(before["params"][part], after["params"][part])), part
    assert all(same(before["codebook"], after["codebook"]))
    assert int(after["codebook"]["quantiser"]["step"]) == 140, "and the codebooks had moved before"
    assert not any(same(before["params"]["top"], after["params"]["top"]))


def test_the_log_shows_what_each_phase_trained(done):
    rows = [json.loads(line) for line in (done.out / "metrics.jsonl").read_text().splitlines()]
    wanted = {"level0": {"reconstruct", "commit"}, "top": {"top"}, "peer": {"byte_lm"}}
    for phase, terms in wanted.items():
        mine = [row for row in rows if row.get("phase") == phase and "loss" in row]
        seen = [{k[5:] for k in row if k.startswith("term.")} for row in mine]
        assert seen and all(found == terms for found in seen), phase


def test_every_part_learns(done):
    # Untrained, each byte is a guess among 256. Always saying the commonest gets a fifth right;
    # knowing how common each is, and how often a segment ends, leaves 5 bits.
    assert done["reconstruction.byte_accuracy"] > 0.28
    assert done["bpb.bytes_given_codes"] < 3.3
    assert done["bpb.byte_lm"] < 6
    # Later stages refine: without them less is right.
    assert done["reconstruction.byte_accuracy"] > done["rate_distortion.stages1.byte_accuracy"]
    assert done["top.bits_per_row"] < done["top.unigram_bits_per_row"]


def test_the_parts_of_the_evaluation_add_up(done):
    results = done
    assert results["bpb.total"] == pytest.approx(
        results["bpb.codes"] + results["bpb.bytes_given_codes"]
    )
    per_row = results["bytes_per_row"]
    covered = 1 - results["segments.overflow"]
    assert results["bpb.codes"] == pytest.approx(
        results["top.bits_per_row"] / per_row * covered, rel=1e-5
    )
    # Three digits of sixteen codes, and eight rows of at most six bytes in a window.
    nominal = results["rate_distortion.stages3.code_bits_per_byte"]
    assert nominal == pytest.approx(3 * math.log2(16) / per_row)
    assert 1 < per_row <= 6
    last = results["rate_distortion.stages3.byte_accuracy"]
    assert results["reconstruction.byte_accuracy"] == last
    for i in range(3):
        assert 0 < results[f"rvq.level0.stage{i}.live"] <= 1
        assert results[f"rvq.level0.stage{i}.perplexity"] <= 16.001
    assert results["top.accuracy"] <= results["top.top5"] <= results["top.top10"] <= 1
    assert (results.out / "report.html").is_file()


def test_costs_are_counted(done):
    # The peer by hand: one block of width 16 and hidden width 32 on windows of 24 bytes.
    block = 2 * (4 * 16 * 16 + 2 * 16 * 32) + 4 * 24 * 16
    forward = block + 2 * 16 * 256
    assert done["flops.code_per_byte.byte_lm"] == forward
    # The backward pass takes two products for each; 50 steps of 32 windows.
    assert done["flops.train.byte_lm"] == 3 * forward * 50 * 32 * 24
    phases = {"level0": 140, "top": 50}
    each = {name: done[f"flops.train_per_byte.{name}"] for name in phases}
    total = sum(steps * each[name] for name, steps in phases.items()) * 32 * 24
    assert done["flops.train.model"] == pytest.approx(total)
    # With the level frozen the row model's step is far cheaper, and coding is less than training.
    assert each["top"] < 0.5 * each["level0"]
    assert 0 < done["flops.encode_per_byte"] < done["flops.code_per_byte.model"] < each["level0"]
    assert done["throughput.encode_bytes_per_second"] > 0
    assert done["parameters.byte_lm"] == 10_704 < done["parameters.model"]


def test_figures_per_stage(done):
    rows = [json.loads(line) for line in (done.out / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row.get("phase") == "level0" and "loss" in row][-1]
    for i in range(3):
        stage = f"rvq.level0.stage{i}"
        for name in ("perplexity", "entropy_ratio", "dead", "stale", "resets"):
            assert math.isfinite(last[f"{stage}.{name}"]), name
        usage = done[f"{stage}.usage"]
        assert sum(usage) == pytest.approx(1) and usage == sorted(usage, reverse=True)
        entropy = -sum(p * math.log2(p) for p in usage if p)
        assert math.log2(done[f"{stage}.perplexity"]) == pytest.approx(entropy, rel=1e-4)
        # From the counters of training; nothing resets them.
        assert done[f"{stage}.resets"] == last[f"{stage}.resets"]
        top = f"top.stage{i}"
        assert done[f"{top}.accuracy"] <= done[f"{top}.top5"] <= done[f"{top}.top10"] <= 1
    bits = sum(done[f"top.stage{i}.bits"] for i in range(3))
    assert bits == pytest.approx(done["top.bits_per_row"], rel=1e-5)
    assert 0 < done["top.expected_bits_per_row"] <= 3 * math.log2(16)


def test_a_held_level_that_would_move_is_told(tiny):
    system = runs.system_class("abstractinator")(runs.resolve(tiny()))
    whole = system.loss_terms
    # A mistake: batches of the row model that also train the level.
    system.loss_terms = lambda v, f, batch, *rest: whole(
        v, f, {**batch, "level0": batch["top"]}, *rest
    )
    with pytest.raises(RunError, match="level 0 would not hold still.*changes codebook/quantiser"):
        held.prove(system, "top")


def test_compressors_are_measured_in_bits():
    raw = b"abcdefgh" * 64
    found = compressed_bits_per_byte(raw)
    assert found["bpb.gzip"] == 8 * len(gzip.compress(raw, 9, mtime=0)) / 512
    assert 0 < found["bpb.xz"] < 8
    with pytest.raises(DataError, match="no bytes"):
        compressed_bits_per_byte(b"")


def test_windows_cover_the_held_out_text_once(tiny):
    config = runs.resolve(tiny())
    held = recipe.load(config.data, "validation")
    assert (held.stop - held.start).sum() == len(held.text)
    first = held.get(0)
    size = int(first["there"].sum())
    assert bytes(first["ids"][:size].astype(np.uint8)) == held.text[:size].tobytes()


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"segments": {"rule": "words"}}, "no such rule"),
        ({"level": {"heads": 3}}, "heads=3 must divide"),
        ({"level": {"vq": {"learn": "gradient"}}}, "learn=ema"),
        ({"level": {"vq": {"soft": {"value": 0.5}}}}, "quantised rows"),
        ({"losses": {"entropy": 0.1}}, "needs level.vq.entropy"),
    ],
)
def test_bad_sections(tiny, sections, message):
    with pytest.raises(ConfigError, match=message):
        runs.resolve(tiny(**sections))


@pytest.mark.parametrize(
    "phase, message",
    [
        ({"data": "level1", "train": ["top"]}, "no such data"),
        ({"data": "top"}, "name what it trains"),
        ({"data": "top", "train": ["top", "expander"]}, "gives expander no gradient"),
        ({"data": "level0", "train": ["expander"]}, "moves the codebooks"),
    ],
)
def test_bad_phases(tiny, phase, message):
    tree = tiny()
    tree["train"]["phases"][0] = {"name": "p", "steps": 1, **phase}
    with pytest.raises(ConfigError, match=message):
        runs.resolve(tree)


def test_sections_that_belong_together(tiny):
    tree = tiny()
    tree["train"]["phases"] = tree["train"]["phases"][:2]
    with pytest.raises(ConfigError, match="no phase of train.phases has data=byte_lm"):
        runs.resolve(tree)
    tree = tiny()
    del tree["byte_lm"]
    with pytest.raises(ConfigError, match="needs the section byte_lm"):
        runs.resolve(tree)


def test_bad_data(tiny, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    config = runs.resolve(tiny(data={"text": str(empty)}))
    with pytest.raises(DataError, match="empty"):
        runs.system_class("abstractinator")(config).train_data("level0", None)
