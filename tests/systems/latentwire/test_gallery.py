"""The failures of ``configs/latentwire/failures``: each shows its symptom and is named."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import latent_jax
from latent_jax import run as runs
from latent_jax.commands import inspect
from latent_jax.systems.latentwire import causes, symptoms
from latent_jax.systems.latentwire.diagnose import read_log

FAILURES = Path(runs.find_config("latentwire/failures/repaired")).parent
KNOWN = {
    *causes.CAUSES, *causes.OF_ANSWERS, *symptoms.SYMPTOMS, *symptoms.OF_ANSWERS,
    *symptoms.OF_EVALUATION,
}  # fmt: skip


def _expected(name: str) -> tuple[set[str], set[str]]:
    """What a config says that its diagnosis is: surely, and as a consequence."""
    comment = " ".join(
        line.removeprefix("#").strip()
        for line in (FAILURES / f"{name}.yaml").read_text().splitlines()
        if line.startswith("#")
    )
    found = re.search(r"Diagnosis: ([a-z, -]+?)(?: \(([a-z, -]+)\))?$", comment)
    assert found, f"{name}.yaml: no line `# Diagnosis: name, name (consequence)`"
    sure, also = ({n for n in (part or "").split(", ") if n} for part in found.groups())
    return sure, also


def _low(r, log=()):
    return r["squad.f1.latent"] <= 0.2 and r["squad.f1.full_text"] >= 0.9


# What is seen in results and log without any diagnosis; `repaired` shows none of it.
SYMPTOMS = {
    "attended_padding": lambda r, log: r["squad.padding.full_text"] > 0.01,
    "bytes_alone": _low,
    "cut_off": lambda r, log: r["squad.empty.full_text"] == 1,
    "part_not_loaded": lambda r, log: r["squad.f1.latent"] < 0.5 and log[-1]["term.answer"] < 0.5,
    "answers_alone": lambda r, log: _low(r) and r["latent.cosine"] > 0.9,
    "closed_gate": lambda r, log: all(row.get("grad_norm.lora_b") == 0 for row in log),
    "dominant_term": lambda r, log: (
        np.mean([row.get("share.distil_states", 0) for row in log]) > 0.9
    ),
    "few_questions": _low,
    "fixed_pca": _low,
    "foreign_prompt": lambda r, log: r["squad.f1.full_text"] < 0.1,
    "high_rate": lambda r, log: _low(r) and r["latent.value_ratio"] > 10,
    "left_padded_answers": lambda r, log: _low(r) and r["squad.empty.latent"] > 0.9,
    "low_rate": lambda r, log: _low(r) and log[-1]["loss"] > 0.9 * log[0]["loss"],
    "mean_pooled": lambda r, log: _low(r) and r["latent.span_mean_cosine"] > 0.95,
    "reconstruction_only": _low,
    "shut_gate": lambda r, log: _low(r) and not any(row["weight.answer"] for row in log),
    "starved_task": lambda r, log: r["squad.f1.latent"] < 0.5,
    "uncalibrated_soft": lambda r, log: r.get("latent.norm_ratio", 1) > 2,
}
NAMES = sorted(p.stem for p in FAILURES.glob("*.yaml") if p.stem != "repaired")


def test_every_failure_states_a_known_diagnosis():
    assert set(NAMES) == set(SYMPTOMS)
    for name in NAMES:
        sure, also = _expected(name)
        assert sure and not sure & also and sure | also <= KNOWN, name
        assert runs.resolve(f"latentwire/failures/{name}").name == name


def _run(name: str, out: Path):
    results = latent_jax.run(f"latentwire/failures/{name}", out=str(out), mesh__data=1)
    log = [row for row in read_log(out / "metrics.jsonl") if "loss" in row]
    found = inspect.call("diagnose", str(out), {})["findings"]
    return results, log, [found] if isinstance(found, str) else found


@pytest.mark.slow
def test_what_is_repaired_works_and_has_no_findings(tmp_path):
    results, log, found = _run("repaired", tmp_path / "repaired")
    assert results["squad.f1.latent"] > 0.9 and results["squad.f1.shuffled"] < 0.2
    assert found == ["nothing known is wrong"]
    assert not [name for name, shows in SYMPTOMS.items() if shows(results, log)]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_failure_shows_its_symptom_and_is_named(name, tmp_path):
    results, log, found = _run(name, tmp_path / name)
    assert SYMPTOMS[name](results, log), {k: v for k, v in results.items() if "ci95" not in k}
    sure, also = _expected(name)
    named = {line.split(":")[0] for line in found}
    assert sure <= named <= sure | also, found
    assert all(re.search(r"\d", line) for line in found)  # every line with its figures
