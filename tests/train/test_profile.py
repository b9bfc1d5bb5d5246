"""`--profile`: a trace of steady steps with its summary, and how busy the host is."""

from __future__ import annotations

import gzip
import json
import time

import jax
import pytest

from latent_jax import cli
from latent_jax.core.config import dump_yaml
from latent_jax.sharding import MeshConfig, make_mesh
from latent_jax.train import fit
from latent_jax.train.meter import Meter
from latent_jax.train.profile import StepProfile, _slowest
from latent_jax.train.testing import ToySystem, toy_config
from tests.toy_cli import TOY


def test_a_run_leaves_a_trace_and_says_what_is_in_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.yaml").write_text(dump_yaml(TOY))
    code = cli.main(["train", "toy.yaml", "--profile", "--set", "train.steps=12"])
    _, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if line.startswith("profile of 5 steps:")]
    assert code == 0 and "ms each, host busy" in line and "runs/toy/profile" in line
    folder = tmp_path / "runs" / "toy" / "profile"
    found = json.loads((folder / "summary.json").read_text())
    assert found["step_seconds"] > 0 and 0 < found["host_share"] <= 1
    assert list(folder.glob("plugins/profile/*/*.xplane.pb"))  # what TensorBoard reads
    share = json.loads((tmp_path / "runs/toy/throughput.json").read_text())
    assert 0 < share["throughput.host_share"] <= 1
    # A finished run has nothing to trace, and says so.
    assert cli.main(["train", "toy.yaml", "--profile", "--set", "train.steps=12"]) == 0
    assert "no step is left to profile: 12 of 12" in capsys.readouterr().err


def test_a_trace_does_not_change_the_run_and_ends_with_it(tmp_path):
    def run(out, **kw):
        mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
        return fit(ToySystem(), toy_config(steps=3), tmp_path / out, mesh=mesh, **kw)

    a, b = run("a"), run("b", profile=True)
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a.params, b.params))
    assert (tmp_path / "b/profile/summary.json").exists()
    jax.profiler.start_trace(str(tmp_path / "free"))  # raises if one is still open
    jax.profiler.stop_trace()


@pytest.mark.parametrize(
    ("start", "total", "first", "steps"),
    [(0, 100, 3, 5), (40, 100, 43, 5), (0, 7, 1, 5), (0, 3, 1, 2), (0, 2, 1, 1)],
)
def test_steady_steps_are_traced_and_at_least_one(start, total, first, steps, tmp_path):
    found = StepProfile.of(tmp_path, start, total)
    assert (found.first, found.steps) == (first, steps)
    assert found.first + found.steps <= total


def test_too_short_a_run_is_not_traced(tmp_path):
    assert StepProfile.of(tmp_path, 5, 5) is None and StepProfile.of(tmp_path, 0, 1) is None


def test_operations_are_summed_by_kind(tmp_path):
    folder = tmp_path / "plugins" / "profile" / "now"
    folder.mkdir(parents=True)
    events = [
        {"name": "dot.3", "dur": 5, "args": {"hlo_op": "dot.3"}},
        {"name": "dot.4", "dur": 2.5, "args": {"hlo_op": "dot.4"}},
        {"name": "fusion", "dur": 1, "args": {"hlo_op": "fusion"}},
        {"name": "python", "dur": 100},
    ]
    with gzip.open(folder / "x.trace.json.gz", "wt") as file:
        json.dump({"traceEvents": events}, file)
    assert _slowest(tmp_path) == {"dot": 7.5, "fusion": 1.0}


def test_waiting_for_the_device_is_not_the_host(monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    meter = Meter()
    meter.start(0)
    for step in range(1, 4):
        meter.count({})
        now += 10.0
        if step > 1:
            meter.wait(9.0)
        meter.seen(step)
    now += 50.0
    meter.pause(50.0)  # an evaluation
    meter.count({})
    now += 10.0
    meter.wait(9.0)
    meter.seen(4)
    assert meter.host == pytest.approx(0.1)
    assert meter.rates()["steps"] == pytest.approx(0.1)
