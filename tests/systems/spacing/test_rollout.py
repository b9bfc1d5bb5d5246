"""Continuations that run away are counted, and the others judged."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from latent_jax.systems.spacing import rollout


def statistics(monkeypatch, sampled, mean):
    monkeypatch.setattr(rollout, "continuations", lambda *_: (sampled, mean))
    config = SimpleNamespace(seed=0, data=SimpleNamespace(window=4))
    gaps = np.ones((len(mean), 3 + mean.shape[1]))
    return rollout.statistics(
        None, config, {}, {"gaps": gaps, "log_height": np.full(len(mean), 12.0)}
    )


def test_what_runs_away_is_counted(monkeypatch):
    near = np.full((4, 60), 1.1)
    away = near.copy()
    away[1, 20:] = np.nan
    away[2, 50:] = 1e30
    found = statistics(monkeypatch, away, away)
    assert found["rollout.diverged.mean"] == found["rollout.diverged.sampled"] == 0.5
    assert found["rollout.error.h10"] == pytest.approx(1.0)
    assert found["rollout.slope"] == pytest.approx(1.0)
    assert np.isfinite(found["rollout.number_variance.l5.sampled"])
    assert statistics(monkeypatch, near, near)["rollout.diverged.mean"] == 0


def test_all_may_run_away(monkeypatch):
    away = np.full((2, 60), np.inf)
    found = statistics(monkeypatch, away, away)
    assert found == {"rollout.diverged.mean": 1.0, "rollout.diverged.sampled": 1.0}
