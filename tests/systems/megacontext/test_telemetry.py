"""Telemetry of a run written by hand, and of a real one; saved and read again."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from latent_jax.core.errors import DataError
from latent_jax.systems.megacontext import telemetry
from latent_jax.systems.megacontext import tiling as tl
from latent_jax.systems.megacontext.allocator import FocusConfig, Trace, refocus
from latent_jax.systems.megacontext.layout import Layout
from latent_jax.systems.megacontext.tiling import Tiling

LAYOUT = Layout(block=4, branching=3, slots=(1, 2), protected=1)


def by_hand() -> telemetry.History:
    """Five blocks over four iterations: 1 opens, 1 closes again, nothing, three become one."""
    contexts = [
        [(1, 0), (0, 1), (1, 2), (0, 3), (0, 4)],
        [(1, 0), (1, 1), (1, 2), (0, 3), (0, 4)],
        [(1, 0), (1, 1), (1, 2), (0, 3), (0, 4)],
        [(2, 0), (0, 3), (0, 4)],
    ]
    ages = [[3, 0, 3, 1, 1], [4, 0, 4, 2, 2], [5, 1, 5, 3, 3], [0, 4, 4]]
    level, index, age = (np.full((4, 6), fill) for fill in (-1, 0, 0))
    for t, (nodes, old) in enumerate(zip(contexts, ages, strict=True)):
        level[t, : len(nodes)], index[t, : len(nodes)] = np.array(nodes).T
        age[t, : len(nodes)] = old
    kind = np.array([[1, 0], [-1, 0], [0, 0], [-1, 0]])
    gist = np.array([[1, 1], [1, 1], [0, 0], [2, 0]])
    trace = Trace(
        kind, gist[:, :1] * [1, 0], gist[:, 1:] * [1, 0], np.zeros((4, 2)),
        np.array([[3, 0], [-3, 0], [0, 0], [-1, 0]]), np.arange(8).reshape(4, 2) == 6,
        (kind != 0).sum(1),
    )  # fmt: skip
    count = np.array([5, 5, 5, 3])
    return telemetry.gather(trace, Tiling(level, index, age, 0 * age, count))


def test_summary_by_hand():
    found = telemetry.summary(LAYOUT, by_hand(), budget=20, within=2)
    assert found["swap_rate"] == 2 / 4 and found["forced_rate"] == 1 / 4
    assert found["flip_rate"] == 1 / 4
    # One node of 5, one of 5, none, three of 3.
    assert found["swap_share"] == pytest.approx((1 / 5 + 1 / 5 + 0 + 3 / 3) / 4)
    # 14, 11, 11 and 10 entries.
    assert found["token_budget_utilization"] == pytest.approx(46 / 80)
    # Raw block 1 stayed for 1 iteration; at the end gists of ages 5, 1 and 5 leave.
    assert found["mean_residency.lod0"] == 1 and found["mean_residency.lod1"] == 14 / 3
    assert found["mean_residency"] == 15 / 4
    assert found["residency_histogram"] == [0, 1, 1, 0, 0, 0, 2]
    assert found["expand_mass.lod1"] == 3 / 4 and found["collapse_mass.lod1"] == 3 / 4
    assert found["expand_mass.lod2"] == 0 and found["collapse_mass.lod2"] == 1 / 4


def test_a_flip_is_one_only_while_it_is_fresh():
    history = by_hand()
    assert telemetry.flips(history, 1) == 1 and telemetry.flips(history, 0) == 0
    order = [0, 2, 2, 1, 3]
    later = telemetry.History(*(column[order] for column in history))
    assert telemetry.flips(later, 2) == 0 and telemetry.flips(later, 3) == 1


def test_nothing_to_measure_is_said():
    none = telemetry.History(*(column[:0] for column in by_hand()))
    with pytest.raises(DataError, match="focus history is empty"):
        telemetry.summary(LAYOUT, none, 20)


def test_a_real_run_agrees_with_its_traces(tmp_path):
    config, budget = FocusConfig(residency=2, cooldown=3, max_actions=3), 24
    tiling = tl.start(LAYOUT, 6, budget)
    append = jax.jit(tl.append, static_argnums=0)
    traces, tilings, rng = [], [], np.random.default_rng(0)
    for t in range(40):
        tiling = append(LAYOUT, tiling) if t % 2 else tiling
        scores = rng.uniform(-1, 1, tiling.level.shape).astype(np.float32)
        tiling, trace = refocus(LAYOUT, config, budget, tiling, scores)
        traces.append(trace)
        tilings.append(tiling)
    history = telemetry.gather(traces, tilings)
    found = telemetry.summary(LAYOUT, history, budget)
    spent = telemetry.costs(LAYOUT, history)
    assert spent.tolist() == [int(tl.cost(LAYOUT, tiling)) for tiling in tilings]
    assert found["swap_rate"] > 0.3 and found["forced_rate"] > 0.2
    moved = sum(found[f"expand_mass.lod{i}"] - found[f"collapse_mass.lod{i}"] for i in (1, 2))
    # What came in is what is left: 20 new blocks of 4 entries and the actions' entries.
    first = int(tl.cost(LAYOUT, tl.start(LAYOUT, 6, budget)))
    assert first + 20 * 4 + round(moved * 40) == spent[-1]
    # Nothing but a forced collapse may end a residency before its time.
    early = [r for r in telemetry.residencies(history).values() for r in r[r < config.residency]]
    assert len(early) <= 3 * history.forced.sum()

    path = telemetry.save(tmp_path / "focus.npz", LAYOUT, history, budget)
    layout, again, limit = telemetry.load(path)
    assert (layout, limit) == (LAYOUT, budget)
    for ours, theirs in zip(history, again, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_files_that_are_no_history_are_refused(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        telemetry.load(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(DataError, match="text.npz: not a focus history"):
        telemetry.load(tmp_path / "text.npz")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(DataError, match="other.npz: not a focus history"):
        telemetry.load(tmp_path / "other.npz")
    whole = telemetry.save(tmp_path / "whole.npz", LAYOUT, by_hand(), 20).read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cut.npz: not a focus history"):
        telemetry.load(tmp_path / "cut.npz")
