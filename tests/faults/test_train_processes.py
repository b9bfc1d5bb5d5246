"""Two processes that train one run: equal to one process, and preempted together."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from latent_jax.train import load_variables

CHILD = """
import sys, time, jax
port, index, out, steps = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
count = int(sys.argv[5])
if count > 1:
    jax.distributed.initialize(f"localhost:{port}", count, index)
from latent_jax.core.errors import UserError
from latent_jax.sharding import MeshConfig, make_mesh
from latent_jax.train import fit
from latent_jax.train.testing import ToyData, ToySystem, toy_config

late = float(sys.argv[6]) if index else 0.0

class Part(ToyData):
    def __next__(self):
        global late
        time.sleep(late or 0.02)
        late = 0.0
        batch = super().__next__()
        rows = len(batch["x"]) // count
        return {k: v[index * rows : (index + 1) * rows] for k, v in batch.items()}

class System(ToySystem):
    def train_data(self, phase, start_state):
        data = Part(self.batch_size, self.width)
        if start_state is not None:
            data.set_state(start_state)
        return data

try:
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1) if sys.argv[7] == "fsdp" else None)
    fit(System(), toy_config(steps=steps, checkpoint={"every": 5}), out, mesh,
        progress=lambda e: print(e.step, flush=True))
except UserError as e:
    print(e, flush=True)
    sys.exit(e.exit_code)
"""


def spawn(out, steps, count=2, devices=1, late=0.0, split="data"):
    """Children of one run: ``devices`` in each, all but the first one ``late`` by some seconds;
    ``split`` is the mesh axis that they form.
    """
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    root = Path(__file__).parents[2]
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    return [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(port), str(i), str(out), str(steps), str(count),
             str(late), split],
            env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for i in range(count)
    ]


def finish(children):
    texts = [child.communicate(timeout=200)[0] for child in children]
    return [child.returncode for child in children], "\n".join(texts)


@pytest.mark.slow
def test_two_processes_equal_one_and_are_preempted_together(tmp_path):
    codes, text = finish(spawn(tmp_path / "one", 300, count=1))
    assert codes == [0], text
    children = spawn(tmp_path / "two", 300)
    for line in children[0].stdout:
        if line.strip().isdigit() and int(line) >= 10:
            break
    children[1].send_signal(signal.SIGTERM)  # one host is told, both save the same step
    codes, text = finish(children)
    assert codes == [75, 75], text
    step = load_variables(tmp_path / "two")[1]["step"]
    assert 10 <= step < 300
    codes, text = finish(spawn(tmp_path / "two", 300))
    assert codes == [0, 0] and f"\n{step}\n" in text, text
    one, _ = load_variables(tmp_path / "one")
    two, _ = load_variables(tmp_path / "two")
    np.testing.assert_allclose(
        one["params"]["hidden"]["kernel"], two["params"]["hidden"]["kernel"], rtol=1e-3, atol=1e-4
    )
    rows = (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(r)["step"] for r in rows] == list(range(1, 301))


@pytest.mark.slow
def test_four_devices_each_equal_eight_of_one_process_though_one_starts_late(tmp_path):
    codes, text = finish(spawn(tmp_path / "one", 40, count=1, devices=8))
    assert codes == [0], text
    # gloo gives up after 30 s: a slow compile (or data) in one process must not end the others.
    codes, text = finish(spawn(tmp_path / "two", 40, devices=4, late=35.0))
    assert codes == [0, 0], text
    logs = [(tmp_path / d / "metrics.jsonl").read_text().splitlines() for d in ("one", "two")]
    losses = [[json.loads(row)["loss"] for row in log] for log in logs]
    assert len(losses[0]) == 40
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


@pytest.mark.slow
def test_what_two_processes_saved_is_continued_on_one_device_and_on_eight(tmp_path):
    children = spawn(tmp_path / "two", 300, devices=4, split="fsdp")
    for line in children[0].stdout:
        if line.strip().isdigit() and int(line) >= 10:
            break
    children[0].send_signal(signal.SIGTERM)
    codes, text = finish(children)
    assert codes == [75, 75], text
    step = load_variables(tmp_path / "two")[1]["step"]
    ends = []
    for devices in (1, 8):
        out = tmp_path / str(devices)
        shutil.copytree(tmp_path / "two", out)
        codes, text = finish(spawn(out, 300, count=1, devices=devices, split="fsdp"))
        told = [int(line) for line in text.splitlines() if line.isdigit()]
        assert codes == [0] and told[0] == step, text
        ends.append(load_variables(out)[0]["params"]["hidden"]["kernel"])
    np.testing.assert_allclose(ends[0], ends[1], rtol=1e-3, atol=1e-4)
