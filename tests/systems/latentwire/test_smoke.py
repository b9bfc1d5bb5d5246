"""The configurations of ``configs/latentwire/smoke``, one per part: each resolves, trains and is
evaluated."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

import latent_jax
from latent_jax import run as runs
from latent_jax.systems.latentwire.diagnose import read_log
from latent_jax.systems.latentwire.labels import LABELS

SMOKE = Path(runs.find_config("latentwire/smoke/base")).parent
NAMES = sorted(p.stem for p in SMOKE.glob("*.yaml") if p.stem != "base")


def _trains(name: str) -> list[str]:
    """Groups of parameters that a config says that it trains."""
    found = re.search(r"^# Trains: (.+)$", (SMOKE / f"{name}.yaml").read_text(), re.MULTILINE)
    return found.group(1).split(", ") if found else []


@pytest.mark.parametrize("name", NAMES)
def test_a_smoke_config_resolves_and_says_what_it_trains(name):
    config = runs.resolve(f"latentwire/smoke/{name}")
    assert config.name == f"smoke_{name}" and config.train.steps <= 4
    text = (SMOKE / f"{name}.yaml").read_text()
    assert text.startswith("# ") and len(text.splitlines()) <= 12
    known = {label for _, label in LABELS} | {f"reader_{r}" for r in config.model.readers}
    assert set(_trains(name)) <= known and bool(_trains(name)) == bool(config.train.steps)


def test_smoke_configs_are_all_different():
    shown = [runs.resolve(f"latentwire/smoke/{n}", {"name": "x"}) for n in ("base", *NAMES)]
    same = [
        (a, b) for i, a in enumerate(NAMES) for j, b in enumerate(NAMES[:i])
        if shown[i + 1] == shown[j + 1]
    ]  # fmt: skip
    assert not same
    # The base is one of them: keys and values pooled.
    assert [n for n, c in zip(NAMES, shown[1:], strict=True) if c == shown[0]] == ["pooled"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_smoke_config_trains_and_is_evaluated(name, tmp_path):
    steps, out = min(2, runs.resolve(f"latentwire/smoke/{name}").train.steps), tmp_path / name
    small = {"out": str(out), "train__steps": steps, "mesh__data": 1}
    found = latent_jax.run(f"latentwire/smoke/{name}", **small)
    assert found["squad.questions"] == 8
    numbers = {k: v for k, v in found.items() if isinstance(v, float)}
    assert all(map(math.isfinite, numbers.values())), numbers
    if not steps:
        return
    log = [row for row in read_log(out / "metrics.jsonl") if "loss" in row]
    assert len(log) == steps and all(math.isfinite(row["loss"]) for row in log)
    assert not any(row["skipped"] for row in log)
    still = [
        part for part in _trains(name)
        # What is not finite is null in the log.
        if not max(row.get(f"grad_norm.{part}") or 0.0 for row in log) > 0
    ]  # fmt: skip
    assert not still, {k: v for row in log for k, v in row.items() if k.startswith("grad")}
