"""Jobs of several processes that cannot start together, or lose one of them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from latent_jax.core.config import dump_yaml
from latent_jax.core.errors import MeshError
from latent_jax.sharding.distributed import (
    _await_coordinator,
    _disagreement,
    initialize_distributed,
)
from latent_jax.train import load_variables
from tests.toy_cli import TOY

ROOT = Path(__file__).parents[2]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(arguments, port, index, count=2, root=ROOT, **env):
    """``latent-jax ARGUMENTS`` as one process of a job, one device each."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COORD", "SLURM"))}
    return subprocess.Popen(
        [sys.executable, "-m", "latent_jax.cli", *map(str, arguments)],
        env=keep | {
            "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu", "LATENT_JAX_DISTRIBUTED": "flags",
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(index), "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
            **env,
        },
        # `-m` looks in the working directory first.
        cwd=root, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(children, timeout=300):
    try:
        texts = [child.communicate(timeout=timeout)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    return [child.returncode for child in children], texts


def our_lines(text):
    return [line for line in text.splitlines() if line.startswith("latent-jax: ")]


@pytest.fixture
def toy(tmp_path):
    path = tmp_path / "toy.yaml"
    path.write_text(dump_yaml(TOY))
    return path


def test_the_first_difference_is_named():
    same = {"configuration": "a", "source": "s"}
    assert _disagreement([same, dict(same), dict(same)]) == ""
    text = _disagreement([same, same, {"configuration": "b", "source": "s"}])
    assert text.startswith("processes 0 and 2 differ in configuration (a and b): start all")


@pytest.mark.slow
def test_other_settings_or_other_code_are_refused_by_all(toy, tmp_path):
    port = free_port()
    out = ("--out", tmp_path / "run")
    codes, texts = finish(
        [start(["train", toy, *out, "--seed", seed], port, seed) for seed in (0, 1)]
    )
    assert codes == [2, 2], texts
    for text in texts:
        (line,) = our_lines(text)
        assert "processes 0 and 1 differ in configuration" in line and "same" in line
    other = tmp_path / "other"
    subprocess.run(["cp", "-r", ROOT / "latent_jax", ROOT / "tests", f"{other.mkdir() or other}/"],
                   check=True)  # fmt: skip
    with (other / "latent_jax" / "ops" / "spectrum.py").open("a") as file:
        file.write("\n# another version\n")
    port = free_port()
    codes, texts = finish(
        [start(["train", toy, *out], port, i, root=r) for i, r in enumerate((ROOT, other))]
    )
    assert codes == [2, 2], texts
    assert all("differ in source (" in our_lines(text)[0] for text in texts)
    assert not (tmp_path / "run").exists()


def test_a_coordinator_that_is_not_there_is_named_in_time():
    began, address = time.monotonic(), f"127.0.0.1:{free_port()}"
    with pytest.raises(MeshError, match=f"cannot join {address} in 1 s: .*is process 0 running"):
        initialize_distributed(address, 2, 1, mode="flags", timeout=1)
    assert 1 <= time.monotonic() - began < 60


def test_a_coordinator_may_come_later():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        later, began = threading.Timer(0.7, server.listen), time.monotonic()
        later.start()
        _await_coordinator(f"127.0.0.1:{server.getsockname()[1]}", 60)
        assert time.monotonic() - began >= 0.7, "it came back before anybody listened"
        later.join()


@pytest.mark.slow
def test_the_command_line_says_so_in_one_line(toy):
    port = free_port()
    codes, texts = finish([start(["train", toy], port, 1, LATENT_JAX_TIMEOUT="3")], 120)
    assert codes == [2], texts
    (line,) = our_lines(texts[0])
    assert f"cannot join 127.0.0.1:{port}" in line


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_one_killed_ends_the_other_and_the_job_resumes(toy, tmp_path, victim):
    out = tmp_path / "run"
    more = ("--out", out, "--set", "train.log_every=1", "--set", "train.checkpoint.every=50")
    command = ["train", toy, *more, "--set", "train.steps=100000"]
    port = free_port()
    children = [start(command, port, i) for i in range(2)]
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if any(path.name.isdigit() for path in out.glob("checkpoints/*")):
            break
        time.sleep(0.2)
    children[victim].kill()
    codes, texts = finish(children)
    text, code = texts[1 - victim], codes[1 - victim]
    # JAX's own watch may be faster than the collective that fails; it aborts and says so.
    ours = code == 75 and "another process of this job has ended" in our_lines(text)[0]
    assert ours or (code == -6 and "another task died" in text), (code, text[-2000:])
    saved = load_variables(out)[1]["step"]
    port = free_port()
    again = [*command, "--set", "train.max_minutes=0.02"]
    codes, texts = finish([start(again, port, i) for i in range(2)])
    assert codes == [75, 75], texts
    assert f"resumed from step {saved}" in texts[0]
    assert load_variables(out)[1]["step"] > saved
