"""Configurations side by side: what stands in which row, and how far from the one without slots."""

from __future__ import annotations

import pytest

from latent_jax.systems.spacing.comparison import compare

BARE = {
    "nll.last": -1.0, "nll.last.std": 0.03, "crps": 0.05, "floor.gue.k8": 0.4366,
    "floor.gue.k16": 0.4301, "baseline.ar8.nll": 0.4, "baseline.ar8.crps": 0.2,
    "baseline.position_averaged.nll": 0.1, "baseline.position_averaged.nll.ci95": [0.0, 0.2],
}  # fmt: skip
SLOTS = {
    "nll.last": -0.9, "nll.last.std": 0.04, "slots.joint_delta": 2.0, "slots.joint_delta.std": 0.5,
    "attention.claims.centre_std": 7.0, "slots.content_only_delta": 0.0,
}  # fmt: skip


def test_scores_of_runs_stand_beside_those_of_baselines():
    scores = next(iter(compare({"bare": BARE, "slots": SLOTS}).values()))
    assert list(scores)[:2] == ["bare", "slots"]
    assert scores["bare"]["last position"] == (-1.0, 0.03)
    assert scores["baseline: ar8"] == {"last position": (0.4, None), "CRPS": (0.2, None)}
    averaged = scores["baseline: linear, from each position's past"]
    assert averaged == {"position-averaged": (0.1, None)}
    assert scores["floor of random matrices, 16 gaps"]["last position"] == (0.4301, None)
    assert "position-averaged" not in scores["slots"]


def test_slots_are_compared_with_the_one_configuration_without():
    tables = compare({"bare": BARE, "slots": SLOTS})
    necessary = tables["Are slots necessary? Change of the last position's NLL (nats)"]
    assert list(necessary) == ["slots"]
    assert necessary["slots"]["above no slots"] == pytest.approx((0.1, 0.05))
    assert necessary["slots"]["all overwritten"] == (2.0, 0.5)
    differ = tables["Do slots differ?"]["slots"]
    assert differ == {"centres' std, gaps (goal 10)": (7.0, None)}
    # Two without slots: no telling which is meant.
    two = compare({"bare": BARE, "again": BARE, "slots": SLOTS})
    assert "above no slots" not in two[list(tables)[1]]["slots"]


def test_without_slots_there_are_scores_only():
    assert len(compare({"bare": BARE})) == 1
