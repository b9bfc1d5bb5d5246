"""Launch scripts: what they would start, and what they refuse. Nothing is started."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parent.parent / "launch"


def start(script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess:
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "JAX_", "TPU"))}
    return subprocess.run(
        ["bash", str(LAUNCH / script), *arguments],
        env=keep | env, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_processes_share_a_coordinator_and_differ_in_their_number():
    found = start("cpu_processes.sh", "--dry-run", "3", "train", "CONFIG", PORT="4321")
    lines = found.stdout.splitlines()
    assert found.returncode == 0 and len(lines) == 3
    for index, line in enumerate(lines):
        assert "JAX_COORDINATOR_ADDRESS=127.0.0.1:4321" in line and "JAX_NUM_PROCESSES=3" in line
        assert f"JAX_PROCESS_ID={index} latent-jax train CONFIG" in line


def test_one_machine_is_one_process(tmp_path):
    found = start("local.sh", "--dry-run", "run", "CONFIG", "--out", "a b")
    assert found.stdout.split(" ", 1) == [
        "LATENT_JAX_DISTRIBUTED=off", "latent-jax run CONFIG --out a\\ b\n"
    ]  # fmt: skip
    # With RETRY a command that asks to be continued is, and any other end is the script's.
    command = tmp_path / "bin" / "latent-jax"
    command.parent.mkdir()
    command.write_text('#!/bin/sh\necho x >>"$1"\n[ "$(wc -l <"$1")" -ge 3 ] && exit 2\nexit 75\n')
    command.chmod(0o755)
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "setup.sh").write_text("latent_jax_setup() { echo \"setup $1\"; }\n")
    (tmp_path / "launch" / "local.sh").write_text((LAUNCH / "local.sh").read_text())
    path = f"{command.parent}:{os.environ['PATH']}"
    for retry, code, times in (("", 75, 1), ("1", 2, 3)):
        log = tmp_path / f"log{retry}"
        done = subprocess.run(
            ["bash", str(tmp_path / "launch" / "local.sh"), str(log)],
            env=os.environ | {"PATH": path, "RETRY": retry, "EXTRAS": "cuda"},
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == code and done.stdout == "setup cuda\n"
        assert log.read_text().count("x") == times


def test_slurm_has_a_process_per_gpu_or_per_node_and_an_array_of_seeds():
    arguments = ("--dry-run", "train", "CONFIG", "--out", "runs/x")
    gpu = start("slurm.sbatch", *arguments, SLURM_SUBMIT_DIR=str(LAUNCH.parent))
    assert gpu.stdout.split() == [
        "LATENT_JAX_DISTRIBUTED=slurm", "srun", "--kill-on-bad-exit=1", "--gpu-bind=none",
        "latent-jax", "train", "CONFIG", "--out", "runs/x",
    ]  # fmt: skip
    node = start("slurm.sbatch", *arguments, LAYOUT="node")
    assert "--gpu-bind" not in node.stdout
    third = start("slurm.sbatch", *arguments, SLURM_ARRAY_TASK_ID="3")
    assert third.stdout.rstrip().endswith("--out runs/x_seed3 --seed 3")
    grid = ("--dry-run", "sweep", "CONFIG", "--grid", "seed=0,1")
    cell = start("slurm.sbatch", *grid, SLURM_ARRAY_TASK_ID="1")
    assert cell.stdout.rstrip().endswith("sweep CONFIG --grid seed=0\\,1 --cell 1")
    text = (LAUNCH / "slurm.sbatch").read_text()
    assert "#SBATCH --requeue" in text and "-eq 75" in text


def test_a_pod_runs_one_commit_on_all_workers():
    found = start("tpu_pod.sh", "--dry-run", "train", "a b", TPU="pod", ZONE="z",
                  REPO="https://example.org/x.git", REF="abc")  # fmt: skip
    assert found.returncode == 0
    for part in ("--worker=all", "checkout -q --detach abc", "LATENT_JAX_DISTRIBUTED=tpu"):
        assert part in found.stdout


@pytest.mark.parametrize(
    "script, arguments, env",
    [
        ("cpu_processes.sh", ("two", "train"), {}),
        ("cpu_processes.sh", ("2",), {}),
        ("slurm.sbatch", (), {}),
        ("slurm.sbatch", ("train", "CONFIG"), {"SLURM_ARRAY_TASK_ID": "1"}),
        ("tpu_pod.sh", ("train",), {}),
        ("local.sh", (), {}),
    ],
)
def test_a_wrong_call_is_refused(script, arguments, env):
    found = start(script, *arguments, **env)
    assert found.returncode == 2
    assert len(found.stderr.strip().splitlines()) == 1


def test_a_mistake_in_the_input_ends_the_job_set():
    text = (LAUNCH / "gke_jobset.yaml").read_text()
    spec = yaml.safe_load(text.replace("${ARGS}", '["train", "CONFIG"]'))["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2]
    assert job["template"]["spec"]["containers"][0]["args"] == ["train", "CONFIG"]
