"""`latent-jax sweep` on the toy system: a grid of runs, resumed, with one table and one plot."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from latent_jax import cli
from latent_jax.commands import sweep as sweeps
from latent_jax.core.config import dump_yaml
from latent_jax.core.errors import ConfigError
from latent_jax.report import sweep as pages
from latent_jax.report.sweep import Cell
from tests.toy_cli import TOY

GRID = ["--grid", "model.width=2,3", "--grid", "seed=0,1"]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "toy.yaml").write_text(dump_yaml(TOY))
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert cli.main(["sweep", "toy.yaml", *GRID, "--out", "s", "--quiet"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def at_work(work, monkeypatch):
    monkeypatch.chdir(work)
    return work


def call(capsys, *args: str) -> tuple[int, str, str]:
    capsys.readouterr()
    return (cli.main(["sweep", "toy.yaml", *args]), *capsys.readouterr())


def test_every_point_is_a_run_and_one_page_shows_all(at_work):
    names = [f"width={w}_seed={s}" for w in (2, 3) for s in (0, 1)]
    assert sorted(p.name for p in Path("s").iterdir() if p.is_dir()) == names
    kept = json.loads(Path("s/sweep.json").read_text())
    assert kept["grid"] == {"model.width": [2, 3], "seed": [0, 1]}
    for cell in kept["cells"]:
        own = json.loads((Path("s") / cell["run"] / "results.json").read_text())
        assert cell["results"] == own and own["toy.mse"] > 0
    page = Path("s/sweep.html").read_text()
    assert page.count(">report</a>") == 4 and "<svg" in page and "toy.mse" in page


def test_what_is_done_is_not_done_again(at_work, capsys):
    before = {p: p.stat().st_mtime_ns for p in Path("s").glob("*/results.json")}
    Path("s/width=3_seed=1/results.json").unlink()
    code, out, _ = call(capsys, *GRID, "--out", "s", "--metric", "toy.mse")
    assert code == 0 and out.count("finished before") == 3 and "width=3_seed=1: done" in out
    after = {p: p.stat().st_mtime_ns for p in Path("s").glob("*/results.json")}
    assert sum(after[p] == before[p] for p in before) == 3
    # Another setting is another sweep: nothing of it counts as done.
    code, out, _ = call(capsys, *GRID, "--out", "s", "--dry-run", "--set", "train.steps=7")
    assert code == 0 and "finished" not in out and out.count("\n") == 4


def test_one_cell_of_an_array(at_work, capsys):
    code, out, _ = call(capsys, *GRID, "--out", "a", "--cell", "2", "-q")
    assert code == 0 and [p.name for p in Path("a").iterdir()] == ["width=3_seed=0"]


def test_a_failed_run_does_not_stop_the_others(at_work, capsys):
    grid = ["--grid", "train.steps=6,8"]
    Path("f/steps=6").mkdir(parents=True)
    Path("f/steps=6/config.yaml").write_text("somebody: else\n")
    code, out, err = call(capsys, *grid, "--out", "f", "-q")
    assert code == 2 and "1 of 2 runs failed, the first (steps=6): " in err and err.count("\n") == 1
    page = Path("f/sweep.html").read_text()
    assert "that no run wrote" in page and page.count(">report</a>") == 1


BAD = {
    "no equals": (["--grid", "model.width"], "write setting=value,value"),
    "no values": (["--grid", "model.width="], "no values"),
    "unknown setting": (["--grid", "model.widht=1,2"], "model.widht"),
    "wrong value": (["--grid", "model.width=2,0"], "width=0: "),
    "twice": (["--grid", "seed=1", "--grid", "seed=2"], "given twice"),
    "same value": (["--grid", "seed=1,1"], "a value is given twice"),
    "out": (["--grid", "out=a,b"], "every run of a sweep has its own"),
    "yaml": (["--grid", "seed=1,["], "not valid YAML"),
    "no such cell": (["--grid", "seed=1,2", "--cell", "2"], "cells 0 to 1"),
    "no grid": ([], "--grid"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_grid_is_refused_before_anything_runs(at_work, capsys, case):
    args, line = BAD[case]
    code, _, err = call(capsys, *args, "--out", "bad")
    assert code == 2 and line in err and err.count("\n") == 1
    assert not Path("bad").exists()


def test_an_unknown_metric_is_said_and_the_runs_stay(at_work, capsys):
    code, _, err = call(capsys, *GRID, "--out", "s", "--metric", "toy.mes", "-q")
    assert code == 2 and "no run of this sweep has it" in err and "toy.mse" in err
    assert Path("s/width=2_seed=0/results.json").is_file()


def test_values_are_yaml():
    grid = sweeps.parse_grid(["eval.arms=[a],[a, b]", "lr=1e-3,true,x"])
    assert grid == {"eval.arms": [["a"], ["a", "b"]], "lr": [1e-3, True, "x"]}
    with pytest.raises(ConfigError, match="given twice"):
        sweeps.parse_grid(["a=1,1"])


def test_seeds_are_one_point_and_other_axes_are_lines():
    axes = {"a.x": [1, 2, 3], "k": ["p", "q"], "seed": [0, 1]}
    done = [
        Cell({"a.x": x, "k": k, "seed": s}, "", {"m": x + (k == "q") * 10 + s})
        for x in (1, 2, 3) for k in "pq" for s in (0, 1)
    ]  # fmt: skip
    across, lines = pages.lines(done, axes, "m")
    assert across == "a.x" and list(lines) == ["k=p", "k=q"]
    assert lines["k=q"]["2"] == (12.5, (12.0, 13.0))
    single = [Cell({"a.x": 1}, "", {"m": 1.0, "m.ci95": [0.5, 1.5]})]
    assert pages.lines(single, {"a.x": [1]}, "m")[1] == {"m": {"1": (1.0, (0.5, 1.5))}}
