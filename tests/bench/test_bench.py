"""The benchmark harness: options, alternation, paired ratios, and the peer is the same model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from latent_jax import bench
from latent_jax.backbones.backbone import Backbone
from latent_jax.backbones.decoder import Decoder
from latent_jax.backbones.testing import random_params, tiny_config
from latent_jax.backbones.tokenizer import ByteTokenizer
from latent_jax.bench import backbone as backbone_bench
from latent_jax.bench import timing
from latent_jax.core.errors import ConfigError


def test_unknown_names_and_options_are_named():
    with pytest.raises(ConfigError, match="no benchmark named 'nope': choose from .*backbone"):
        bench.run("nope")
    with pytest.raises(ConfigError, match="--prompt-token"):
        bench.run("backbone", ["--prompt-token", "3"])
    with pytest.raises(ConfigError, match="invalid int value: 'many'"):
        bench.run("backbone", ["--batch", "many"])
    with pytest.raises(ConfigError, match="--new-tokens: use at least 2"):
        bench.run("backbone", ["--new-tokens", "1"])


def test_options_parse():
    options = bench.parse_options(backbone_bench.Options, ["--batch", "2", "--no-peer"])
    assert (options.batch, options.peer, options.prompt_tokens) == (2, False, 256)


def test_runs_alternate_swap_order_and_follow_one_of_their_own():
    calls = []
    pair = timing.alternate(lambda: calls.append("a"), lambda: calls.append("b"), pairs=3, warmup=1)
    assert "".join(calls) == "ab" + "aabb" + "bbaa" + "aabb"
    assert len(pair.ours) == len(pair.peer) == 3


def test_ratios_are_paired():
    pair = timing.Pair(ours=(1.0, 2.0, 4.0), peer=(2.0, 6.0, 4.0))
    assert pair.ratios == (2.0, 3.0, 1.0) and pair.ratio == 2.0
    assert pair.summary(10)["ours_per_second"] == 5.0


def test_results_are_written_whole(tmp_path, monkeypatch):
    module = types.SimpleNamespace(Options=backbone_bench.Options, main=lambda options: {"x": 1.0})
    monkeypatch.setattr(bench.importlib, "import_module", lambda name: module)
    assert bench.run("backbone", [], out=tmp_path / "deep") == {"x": 1.0}
    assert json.loads((tmp_path / "deep" / "bench_backbone.json").read_text()) == {"x": 1.0}
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["bench_backbone.json"]


def test_a_whole_run_on_a_tiny_model(monkeypatch, capsys):
    pytest.importorskip("torch")
    config = tiny_config("llama", vocab_size=259, num_layers=2)
    params = random_params(config, jax.random.key(0))
    tiny = Backbone("tiny", config, params, ByteTokenizer(), "", Decoder(config))
    monkeypatch.setattr("latent_jax.backbones.load", lambda name, dtype: tiny)
    results = bench.run(
        "backbone", ["--prompt-tokens", "8", "--batch", "2", "--new-tokens", "3", "--pairs", "1"]
    )
    assert results["parity.max_abs_difference"] < 1e-3
    assert results["parity.greedy_token_agreement"] == 1.0
    for part in ("prefill", "decode"):
        assert np.isfinite(results[f"throughput.{part}.ratio"])
    shown = capsys.readouterr().out
    assert shown.index("largest difference") < shown.index("median ratio")


_KEPT = """
import numpy as np
from latent_jax.bench import timing
del_me = [np.ones(4_000_000) for _ in range(5)]  # 160 MB
del del_me
print(timing.peak_of(lambda: np.ones(8_000_000)))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_memory_is_seen_where_freed_memory_is_kept():
    # As the launch scripts set it.
    keep = "glibc.malloc.trim_threshold=8000000000:glibc.malloc.mmap_threshold=8000000000"
    done = subprocess.run(
        [sys.executable, "-c", _KEPT], env=os.environ | {"GLIBC_TUNABLES": keep},
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert 55e6 < float(done.stdout) < 90e6


def test_what_was_not_measured_has_no_ratio(monkeypatch):
    monkeypatch.setattr(timing, "peak_of", lambda run: run())
    assert timing.memory("x", lambda: 5.0, lambda: 10.0)["memory.x.ratio"] == 0.5
    assert np.isnan(timing.memory("x", lambda: 5.0, lambda: 0.0)["memory.x.ratio"])
