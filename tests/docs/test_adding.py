"""The page on adding things tells the truth: its files are written out and run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

import latent_jax
from latent_jax.backbones.testing import random_params, tiny_config
from latent_jax.core import trees
from latent_jax.core.errors import BackboneError

PAGE = Path(__file__).resolve().parents[2] / "launch" / "docs" / "pages" / "adding.md"
FILES = dict(
    re.findall(r'```\w+ title="([^"]+)"\n(.*?)```', PAGE.read_text(encoding="utf-8"), flags=re.S)
)


@pytest.fixture
def written(tmp_path, monkeypatch) -> Path:
    """The page's files in a folder that Python looks into."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_each_fits_in_thirty_lines():
    assert set(FILES) == {"line.py", "line.yaml", "scaled.py", "shy.py", "npz.py"}
    for name, text in FILES.items():
        lines = [line for line in text.splitlines() if line.strip()]
        assert len(lines) <= 30 and max(map(len, lines)) <= 100, name


def test_a_system_trains_from_its_file(written):
    results = latent_jax.run("line.yaml", **{"train.log.tensorboard": False})
    assert results["line.slope"] == pytest.approx(3.0, abs=0.05)
    assert "line.<wbr>slope" in results.report.read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_loss_is_weighed_and_logged(written):
    results = latent_jax.run(
        "spacing/tiny", system="shy:Shy", out="shy",
        **{
            "train.steps": 4, "train.batch_size": 8, "train.eval_every": 0, "train.log_every": 1,
            "train.log.tensorboard": False, "data.source": "cue:n=64,count=20000,seed=0",
            "eval.windows": 16, "eval.batch_size": 16, "eval.floors": False,
            "eval.baselines": False, "model.width": 16, "model.ff": 16,
        },
    )  # fmt: skip
    log = [json.loads(x) for x in (results.out / "metrics.jsonl").read_text().splitlines()]
    assert all(row["term.size"] > 0 for row in log)
    weights = [row["weight.size"] for row in log]
    assert weights == sorted(weights) and weights[-1] == pytest.approx(0.01 * 4 / 100, rel=0.5)


def test_a_reader_of_another_format_reads_for_the_rest(written):
    import npz

    config = tiny_config(vocab_size=259)
    arrays = trees.flatten(random_params(config, jax.random.key(0)))
    np.savez("model.npz", **arrays)
    reader = npz.load_npz("model.npz", config)
    wire = latent_jax.LatentWire.training_free(reader, "kv_stride", ratio=4, segment=16)
    sent = wire.compress("a mill by a lake")
    assert (sent.length.tolist(), sent.latents) == ([16], [4])
    assert len(wire.reconstruct(sent)) == 1
    np.savez("model.npz", **{**arrays, "embed": arrays["embed"][1:]})
    with pytest.raises(BackboneError, match=r"model.npz: embed of shape \(259"):
        npz.load_npz("model.npz", config)


@pytest.mark.slow
def test_an_encoder_is_trained_evaluated_and_asked(written):
    results = latent_jax.run(
        "latentwire/tiny", system="scaled:ScaledSystem", out="scaled",
        **{
            "train.steps": 3, "train.batch_size": 8, "train.eval_every": 0,
            "train.log.tensorboard": False, "data.segments": 64, "eval.segments": 4,
            "eval.questions": 4, "eval.batch_size": 4, "eval.arms": ["latent", "shuffled"],
        },
    )  # fmt: skip
    system, variables = latent_jax.run.load(results.out)
    assert float(variables["params"]["size"]) != 1.0  # it was trained
    wire = system.wire(variables, system.frozen)
    still = dict(variables["params"], size=0 * variables["params"]["size"])
    silent = system.wire({"params": still}, system.frozen)
    assert np.any(np.asarray(wire.encode("a mill").z)) and not np.any(silent.encode("a mill").z)
