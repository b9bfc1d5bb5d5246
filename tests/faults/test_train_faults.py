"""The trainer under kill -9, SIGTERM, damaged and unwritable checkpoints."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from latent_jax.core.errors import CheckpointError
from latent_jax.sharding import MeshConfig, make_mesh
from latent_jax.train import fit, load_variables, read_warnings
from latent_jax.train.testing import ToySystem, toy_config

STEPS = {"steps": 60, "checkpoint": {"every": 7}, "log_every": 3}
CHILD = """
import sys, time
from latent_jax.train import fit
from latent_jax.train.testing import ToySystem, toy_config
from latent_jax.core.errors import UserError

class Slow(ToySystem):
    def unit_counts(self, batch):
        time.sleep(0.03)
        return {}

try:
    fit(Slow(), toy_config(**%r), sys.argv[1], progress=lambda e: print(e.step, flush=True))
except UserError as e:
    print(e, flush=True)
    sys.exit(e.exit_code)
"""


def mesh():
    return make_mesh(MeshConfig(data=1), jax.devices()[:1])


def spawn(out):
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    return subprocess.Popen([sys.executable, "-c", CHILD % STEPS, str(out)], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_for_step(child, step):
    for line in child.stdout:
        if line.strip().isdigit() and int(line) >= step:
            return
    raise AssertionError(f"child ended with {child.wait()} before step {step}")


def same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.mark.slow
def test_kill_9_at_three_points_then_resume_equals_uninterrupted(tmp_path):
    whole = spawn(tmp_path / "whole")
    text, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, text
    for low, high in ((4, 10), (11, 30), (31, 55)):
        child = spawn(tmp_path / "killed")
        wait_for_step(child, random.randint(low, high))
        time.sleep(random.uniform(0.0, 0.1))
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    assert spawn_and_finish(tmp_path / "killed") == 0
    a, _ = load_variables(tmp_path / "whole")
    b, meta = load_variables(tmp_path / "killed")
    assert meta["step"] == 60
    same(a, b)
    for name in ("metrics.jsonl",):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "killed" / name).read_text()


def spawn_and_finish(out):
    child = spawn(out)
    child.communicate(timeout=300)
    return child.returncode


def test_sigterm_saves_and_exits_75(tmp_path):
    child = spawn(tmp_path)
    wait_for_step(child, 9)
    child.send_signal(signal.SIGTERM)
    text, _ = child.communicate(timeout=120)
    assert child.returncode == 75, text
    assert "resume" in text
    _, meta = load_variables(tmp_path)
    assert 9 <= meta["step"] < 60
    assert meta["data"][0]["main"]["json"]["at"] == meta["step"]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == meta["step"]


def damage(directory: Path, how: str) -> None:
    files = sorted((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = [p for p in files if "/d/" in str(p)] or files[-3:]
    if how == "truncate":
        for path in data:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "garbage":
        for path in data:
            raw = bytearray(path.read_bytes())
            raw[len(raw) // 3 : len(raw) // 3 + 64] = b"\xff" * 64
            path.write_bytes(bytes(raw))
    elif how == "meta":
        (directory / "meta" / "metadata").write_text('{"version": 1, ')
    elif how == "missing":
        for path in data:
            path.unlink()


@pytest.mark.parametrize("how", ["truncate", "garbage", "meta", "missing"])
def test_a_damaged_newest_checkpoint_falls_back(tmp_path, how):
    kw = {"steps": 10, "checkpoint": {"every": 5, "keep_last": 2}}
    whole = fit(ToySystem(), toy_config(**kw), tmp_path, mesh=mesh())
    damage(tmp_path / "checkpoints" / "10", how)
    again = fit(ToySystem(), toy_config(**kw), tmp_path, mesh=mesh())
    same(whole, again)
    (warning,) = read_warnings(tmp_path)
    assert "checkpoint 10 is damaged" in warning["message"] and warning["step"] == 5
    assert (tmp_path / "checkpoints_damaged" / "10").exists()
    assert load_variables(tmp_path)[1]["step"] == 10


def test_all_damaged_is_one_clear_error(tmp_path):
    kw = {"steps": 4, "checkpoint": {"every": 2}}
    fit(ToySystem(), toy_config(**kw), tmp_path, mesh=mesh())
    for step in ("2", "4"):
        damage(tmp_path / "checkpoints" / step, "truncate")
    with pytest.raises(CheckpointError, match="none of the checkpoints"):
        fit(ToySystem(), toy_config(**kw), tmp_path, mesh=mesh())


def test_a_half_written_checkpoint_and_log_line_are_ignored(tmp_path):
    kw = {"steps": 6, "checkpoint": {"every": 3}}
    whole = fit(ToySystem(), toy_config(**kw), tmp_path, mesh=mesh())
    (tmp_path / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir()
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 7, "lo')
    same(whole, fit(ToySystem(), toy_config(**kw), tmp_path, mesh=mesh()))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_no_permission_is_one_clear_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError):
        fit(ToySystem(), toy_config(steps=2), tmp_path, mesh=mesh())
