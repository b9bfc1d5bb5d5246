"""Statistics against constructed cases, and findings that name what is wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest

from latent_jax.backbones import ByteTokenizer
from latent_jax.systems.latentwire import diagnose

RNG = np.random.default_rng(0)


def test_repetition():
    assert diagnose.repeats("the the the the the") and diagnose.repeats("a b a b a b")
    assert not diagnose.repeats("") and not diagnose.repeats("the the")
    assert not diagnose.repeats("the mill at Dunmore burned in the year of the flood")


def test_prediction_histogram():
    p = diagnose.predictions(["The cat", "cat", "", "dog"])
    assert p["distinct"] == 3 and p["empty"] == 0.25 and p["distinct_words"] == 2
    assert p["commonest"][0] == ("cat", 2) and p["commonest_share"] == 0.5


def test_cosines_of_equal_and_of_random_latents():
    mask = np.ones((20, 3), bool)
    same = np.tile(RNG.normal(size=(1, 3, 64)), (20, 1, 1))
    assert diagnose.cosines(same, mask)["cosine"] == pytest.approx(1.0, abs=1e-5)
    free = diagnose.cosines(RNG.normal(size=(20, 3, 64)), mask)
    assert abs(free["cosine"]) < 0.1 and abs(free["slot_cosine"]) < 0.1
    two = np.array([[[1.0, 0.0]], [[0.0, 1.0]]])
    assert diagnose.cosines(two, mask[:2, :1])["cosine"] == pytest.approx(0.0, abs=1e-6)


def test_effective_rank():
    flat = np.eye(4).repeat(50, 0) - 0.25
    assert diagnose.spectrum(flat)["effective_rank"] == pytest.approx(3.0, rel=1e-3)
    line = np.outer(RNG.normal(size=100), np.ones(8))
    assert diagnose.spectrum(line)["effective_rank"] == pytest.approx(1.0, rel=1e-3)


def test_nearest_token_and_magnitudes():
    table = RNG.normal(size=(259, 16))
    (best,) = diagnose.nearest_tokens(3 * table[[97]], table, ByteTokenizer(), k=1)
    assert best == [("a", pytest.approx(1.0))]
    assert diagnose.norm_ratio(2 * table, table) == pytest.approx(2.0)
    s = diagnose.embedding_statistics(table, table)
    assert s["centre_shift"] == 0 and s["spread_ratio"] == pytest.approx(1.0)


def test_findings_name_the_symptoms(tmp_path):
    rows = [
        {"step": i, "latent_cosine": 0.1 * i, "share.answer": 0.9, "share.reconstruct": 0.1}
        for i in range(1, 11)
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 11, "late')
    log = diagnose.read_log(path)
    assert len(log) == 10 and diagnose.first_step(log, "latent_cosine", 0.85) == 9
    statistics = {"cosine": 0.97, "norm_ratio": 30.0}
    results = {
        "ae.token_accuracy": 0.4, "ae.forced_accuracy": 0.8, "ae.token_accuracy.shuffled": 0.4,
        "squad.f1.latent": 0.1, "squad.f1.shuffled": 0.1,
        "squad.f1_gain.shuffled.ci95": [-0.1, 0.1],
    }  # fmt: skip
    samples = [{"kind": "answer", "predictions": {"latent": "the the the the"}}] * 10
    text = "\n".join(diagnose.findings(statistics, results, samples, log))
    for symptom in ("collapsed", "since step 9", "30.00 times the norm", "term answer is 90%",
                    "repeat one word", "ignores them", "derails", "not surely better"):  # fmt: skip
        assert symptom in text
    healthy = {"cosine": 0.1, "norm_ratio": 1.0}
    assert diagnose.findings(healthy, {"ae.token_accuracy": 0.9, "ae.forced_accuracy": 0.95}) == []


def test_latent_statistics_are_flat_numbers():
    z, mask = RNG.normal(size=(10, 4, 16)), np.arange(4)[None] < np.array([[4]] * 5 + [[2]] * 5)
    out = diagnose.latent_statistics(z, mask, RNG.normal(size=(50, 16)))
    assert all(isinstance(v, float) for v in out.values())
    assert out["norm_ratio"] == pytest.approx(1.0, abs=0.2) and out["effective_rank"] > 8
