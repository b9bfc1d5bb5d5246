"""`bench all`: what is run, what is skipped, one table and one file."""

from __future__ import annotations

import json
import types

import pytest

from latent_jax import bench
from latent_jax.bench import everything, timing
from latent_jax.core.errors import BackboneError, ConfigError

PAIR = timing.Pair(ours=(1.0, 2.0), peer=(2.0, 6.0)).summary(10)
TINY = ["--matmul", "8", "--copy-megabytes", "1"]


@pytest.fixture
def fakes(monkeypatch):
    """Benchmarks that answer at once: one has a peer, one lacks something."""
    seen = {}

    def main(name):
        def run(options):
            seen[name] = options
            if name == "mega":
                raise BackboneError("no model\nis here")
            return {"machine": {}, **{f"throughput.step.{k}": v for k, v in PAIR.items()},
                    "memory.step.ratio": 0.5}  # fmt: skip

        return run

    real = bench.importlib.import_module

    def load(module):
        found = real(module)
        package, _, name = module.rpartition(".")
        if package != "latent_jax.bench" or name == "everything":
            return found
        return types.SimpleNamespace(Options=found.Options, main=main(name))

    monkeypatch.setattr(bench.importlib, "import_module", load)
    return seen


def test_all_are_run_and_what_cannot_is_named(fakes, tmp_path, capsys):
    results = bench.run("all", ["--quick", "--only", "rvq, mega", *TINY], out=tmp_path)
    assert results["mega.skipped"] == "no model is here"
    assert results["rvq.throughput.step.ratio"] == 2.5 and fakes["rvq"].rows == 1024
    written = json.loads((tmp_path / "bench_all.json").read_text())
    assert written["environment"]["versions"]["jax"] and "commit" in written["environment"]
    assert all(written[f"peak.{when}.copy_bytes"] > 0 for when in ("before", "after"))
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "rvq step" in line]
    assert "2.50x" in row and "2.00 … 3.00" in row and "0.50x" in row


def test_the_peak_counts_operations_and_bytes(monkeypatch):
    monkeypatch.setattr(everything.timing, "once", lambda fn: fn() is None or 0.5)
    found = everything.measured_peak(4, 1)
    assert found == {"matmul_flops": 2 * 4**3 / 0.5, "copy_bytes": 2 * 10**6 / 0.5}


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="bench all --only: no 'nope'; choose from backbone, md"):
        bench.run("all", ["--only", "nope"])
    with pytest.raises(ConfigError, match="--matmul: use at least 1"):
        bench.run("all", ["--matmul", "0"])
