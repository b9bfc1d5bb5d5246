"""A clock that jumps by hours changes no result, no order and no duration."""

from __future__ import annotations

import itertools
import json
import os
import time

import jax
import numpy as np
import pytest
import yaml

from latent_jax import cli
from latent_jax.core import files
from latent_jax.sharding import MeshConfig, make_mesh
from latent_jax.train import fit, load_variables
from latent_jax.train.testing import ToySystem, toy_config
from tests.toy_cli import TOY

# Hours off at each call, over and over.
HOURS = {
    "back": [-2.0 * n for n in range(1, 40)],
    "forward": [2.0 * n for n in range(1, 40)],
    "both": [5.0, -7.0, 0.0, 40.0, -40.0],
}


@pytest.fixture(params=HOURS)
def jumping(request, monkeypatch):
    """`time.time` moves at every call."""
    true, hours = time.time, itertools.cycle(HOURS[request.param])
    monkeypatch.setattr("time.time", lambda: true() + 3600 * next(hours))


def test_a_run_is_the_same_and_no_duration_is_negative(tmp_path, monkeypatch, jumping):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(TOY))
    for _ in range(2):  # the second continues the first, which is finished
        assert cli.main(["run", "toy.yaml", "--set", "train.max_minutes=60", "-q"]) == 0
    lines = (tmp_path / "runs" / "history.jsonl").read_text().splitlines()
    assert len(lines) == 4
    for line in map(json.loads, lines):
        assert 0.0 <= line["seconds"] < 600.0, line
        rates = [v for k, v in line["results"].items() if k.endswith("_per_second")]
        assert all(0.0 < rate < 1e6 for rate in rates)


def test_progress_and_checkpoints_keep_their_order(tmp_path, jumping):
    events = []
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    settings = {"steps": 12, "log_every": 1, "eval_every": 2,
                "checkpoint": {"every": 2, "keep_last": 3, "minutes": 60, "metric": "eval.mse"}}
    state = fit(ToySystem(), toy_config(**settings), tmp_path, mesh, events.append)
    steps = sorted(int(p.name) for p in (tmp_path / "checkpoints").glob("[0-9]*"))
    # Nothing was saved because an hour seemed to have gone by.
    assert steps[-3:] == [8, 10, 12] and all(step % 2 == 0 for step in steps)
    variables, meta = load_variables(tmp_path)
    assert meta["step"] == 12
    saved, last = variables["params"]["out"]["kernel"], state.params["out"]["kernel"]
    np.testing.assert_array_equal(saved, last)
    etas = [e.eta for e in events if e.eta is not None]
    assert etas and all(0.0 <= eta < 600.0 for eta in etas)
    assert all(rate > 0.0 for e in events for rate in e.rates.values())


def test_files_that_a_killed_writer_left_are_cleared_and_a_living_one_s_are_not(tmp_path):
    old, young = tmp_path / ".a.json.11.tmp", tmp_path / ".a.json.12.tmp"
    other = tmp_path / ".b.json.11.tmp"
    for path in (old, young, other):
        path.write_text("half")
    past = time.time() - 7200
    for path in (old, other):
        os.utime(path, (past, past))
    files.write_json(tmp_path / "a.json", {"a": 1})
    assert {p.name for p in tmp_path.iterdir()} == {".a.json.12.tmp", ".b.json.11.tmp", "a.json"}
