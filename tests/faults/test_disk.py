"""Full and read-only disks: one line, exit code 2, nothing lost, and it goes on when there is room.

A real small file system where mounting is allowed (root), a limit on the size of a file elsewhere.
"""

from __future__ import annotations

import json
import resource
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from latent_jax import cli
from latent_jax.train import load_variables
from tests.toy_cli import TOY

# In KiB: what fails is the config, the log, an event file, the first and second checkpoint, and the
# report. The toy needs less than 500.
SIZES = (4, 8, 12, 16, 20, 24, 32, 48, 64, 80, 96, 112, 128, 160, 200, 256, 300)
FEW = (12, 16, 48, 160, 256)


def mount(*args: str) -> bool:
    try:
        return subprocess.run(["mount", *args], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.fixture
def disk(tmp_path):
    """A file system of its own; the function changes its size (KiB) or makes it read-only."""
    at = tmp_path / "disk"
    at.mkdir()
    if not mount("-t", "tmpfs", "-o", "size=8m", "tmpfs", str(at)):
        pytest.skip("mounting is not allowed here")

    def set_(option: str) -> Path:
        assert mount("-o", f"remount,{option}", str(at)), option
        return at

    yield set_
    # A file that an error has left open would keep it busy.
    subprocess.run(["umount", str(at)], check=True)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A function that runs the toy there and returns its exit code; no files but on the disk."""
    monkeypatch.chdir(tmp_path)
    tree = {**TOY, "train": {**TOY["train"], "log": {"tensorboard": True}}}
    config = tmp_path / "toy.yaml"
    config.write_text(yaml.safe_dump(tree))

    def run(out: Path, asynchronous: bool = False, *more: str) -> int:
        setting = f"train.checkpoint.asynchronous={str(asynchronous).lower()}"
        return cli.main(["run", str(config), "--out", str(out), "-q", "--set", setting, *more])

    return run


def one_line(err: str) -> str:
    assert err.startswith("latent-jax: ") and err.count("\n") == 1, err
    return err


def check_full(size, asynchronous, disk, toy, whole, capsys):
    """The toy on a disk of ``size`` KiB, and again with room."""
    out = disk(f"size={size}k") / "runs" / "toy"
    capsys.readouterr()
    assert toy(out, asynchronous) == 2
    text = one_line(capsys.readouterr().err)
    assert "No space left on device" in text
    assert "make room" in text or "run again to resume" in text
    for step in (out / "checkpoints").glob("[0-9]*"):  # what is there is whole
        if step.name.isdigit():
            assert load_variables(out, step.name)[1]["step"] == int(step.name)
    assert toy(disk("size=8m") / "runs" / "toy", asynchronous) == 0
    assert not capsys.readouterr().err
    same(load_variables(out)[0], whole)
    rows = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(1, 7))
    assert (out / "report.html").stat().st_size > 10_000
    assert not list(out.rglob("*.tmp")) and not list(out.rglob("*checkpoint-tmp"))


def same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y), a, b)


@pytest.fixture
def whole(toy, tmp_path):
    assert toy(tmp_path / "whole") == 0
    return load_variables(tmp_path / "whole")[0]


@pytest.mark.parametrize("size", FEW)
def test_a_full_disk_is_one_line_and_the_run_goes_on_with_room(size, disk, toy, whole, capsys):
    check_full(size, False, disk, toy, whole, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_a_disk_of_every_size(size, asynchronous, disk, toy, whole, capsys):
    check_full(size, asynchronous, disk, toy, whole, capsys)


def test_a_limit_on_the_size_of_a_file_is_one_line(toy, whole, tmp_path, capsys):
    out = tmp_path / "runs" / "toy"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    codes = []
    try:
        for limit in (256, 512, 1024):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            capsys.readouterr()
            codes.append(toy(out))
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert "File too large" in one_line(capsys.readouterr().err)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert codes == [2, 2, 2] and toy(out) == 0
    same(load_variables(out)[0], whole)


def test_a_read_only_disk_is_one_line(disk, toy, capsys):
    new, old = (disk("rw") / "runs" / name for name in ("new", "old"))
    assert toy(old) == 0
    before = {p: p.read_bytes() for p in old.rglob("*") if p.is_file()}
    disk("ro")
    commands = {
        "new": lambda: toy(new),
        "continued": lambda: toy(old, False, "--set", "train.log_every=3"),
        "evaluated": lambda: cli.main(["eval", str(old), "-q"]),
        "reported": lambda: cli.main(["report", str(old)]),
    }
    for name, command in commands.items():
        capsys.readouterr()
        assert command() == 2, name
        assert "Read-only file system" in one_line(capsys.readouterr().err), name
    assert before == {p: p.read_bytes() for p in old.rglob("*") if p.is_file()}
    disk("rw")
    assert toy(old) == 0 and toy(new) == 0
