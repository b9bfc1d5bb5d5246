"""Phases that end early, are left out, begin their schedules anew and prepare their data."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest

from latent_jax.core.errors import ConfigError
from latent_jax.train import fit
from latent_jax.train.phases import Patience, phase_at, phase_rate, span
from latent_jax.train.testing import ToyData, ToySystem, toy_config

TWO = [
    {"name": "a", "steps": 6, "train": ["body"]},
    {"name": "b", "steps": 4, "train": ["head"], "data": "other"},
]


def trained_steps(out):
    """(step, phase) of every update."""
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["phase"]) for row in rows if "phase" in row]


@pytest.mark.parametrize(
    "step, expected", [(0, (0, 6)), (5, (0, 6)), (6, (6, 10)), (13, (10, 16)), (16, (16, 18))]
)
def test_a_phase_has_a_beginning_and_an_end(step, expected):
    assert span(toy_config(steps=18, phases=TWO).train, step) == expected


def test_a_last_phase_without_steps_lasts_until_the_end():
    phases = [{"name": "a", "steps": 6}, {"name": "b"}]
    cfg = toy_config(steps=18, phases=phases).train
    assert span(cfg, 7) == (6, 18)
    assert span(toy_config(steps=18).train, 7) == (0, 18)


def test_the_schedule_of_a_phase_begins_anew_in_every_cycle():
    given = {"lr": 1.0, "warmup_steps": 1, "final_scale": 0.0, "per_phase": True}
    cfg = toy_config(steps=20, phases=TWO, optimizer=given).train
    first, second = phase_rate(cfg, 0), phase_rate(cfg, 1)
    np.testing.assert_allclose([first(10 + i) for i in range(6)], [first(i) for i in range(6)])
    np.testing.assert_allclose([first(0), second(6), second(16)], 0.5)  # half way up
    assert first(1) == second(7) == 1 and first(5) < 0.2
    assert phase_at(cfg, 16)[0] == 1


class Plateau(ToySystem):
    """Its evaluation gets better three times and then never again."""

    seen = 0

    def quick_eval(self, variables, frozen):
        self.seen += 1
        return {"mse": 1.0 / min(self.seen, 3)}


def test_a_phase_ends_when_it_is_no_better_and_the_next_one_starts_where_it_would(tmp_path):
    phases = [{**TWO[0], "steps": 40, "patience": 2, "metric": "eval.mse"}, TWO[1]]
    config = toy_config(steps=44, phases=phases, eval_every=2, log_every=1)
    state = fit(Plateau(), config, tmp_path)
    steps = trained_steps(tmp_path)
    a = [step for step, name in steps if name == "a"]
    assert a == list(range(1, 11))  # best at the third of the evaluations, at 6; misses at 8, 10
    assert [step for step, name in steps if name == "b"] == [41, 42, 43, 44]
    assert int(state.step) == 44


def test_a_phase_that_is_left_out_moves_nothing_and_keeps_the_others_in_their_places(tmp_path):
    phases = [TWO[0], {**TWO[1], "skip": True}]
    state = fit(ToySystem(), toy_config(steps=20, phases=phases, log_every=1), tmp_path / "a")
    found = [step for step, _ in trained_steps(tmp_path / "a")]
    assert found == [*range(1, 7), *range(11, 17)] and int(state.step) == 20
    fresh = fit(ToySystem(), toy_config(steps=0, phases=phases), tmp_path / "fresh")

    def same(name):
        return np.array_equal(state.params[name]["kernel"], fresh.params[name]["kernel"])

    assert same("out") and not same("hidden")


def test_checkpoints_at_the_ends_of_phases_stay(tmp_path):
    config = toy_config(
        steps=20, phases=TWO, checkpoint={"phases": True, "keep_last": 1, "keep_best": 0}
    )
    fit(ToySystem(), config, tmp_path)
    there = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    assert there == [6, 10, 16, 20]


class Prepared(ToySystem):
    """Makes data of its parameters, as a lens's labels are."""

    def __init__(self):
        super().__init__()
        self.asked, self.mean = [], 0.0

    def begin_phase(self, phase, start, variables, frozen, out):
        self.asked.append((phase.name, start))
        self.mean = float(np.mean(jax.device_get(variables["params"]["hidden"]["kernel"])))
        return phase.data == "other"

    def train_data(self, phase, start_state):
        data = ToyData(self.batch_size, self.width, shift=self.mean if phase == "other" else 0.0)
        if start_state is not None:
            data.set_state(start_state)
        return data


def test_data_of_parameters_is_made_where_a_phase_begins_and_the_same_after_a_stop(tmp_path):
    # Saved in the middle of the second phase's second turn.
    common = {"phases": TWO, "checkpoint": {"every": 18, "asynchronous": False}}
    config, whole, rest = toy_config(steps=20, **common), Prepared(), Prepared()
    state = fit(whole, config, tmp_path / "whole")
    assert whole.asked == [("a", 0), ("b", 6), ("a", 10), ("b", 16)]
    kept = tmp_path / "whole" / "checkpoints" / "18"
    shutil.copytree(kept, tmp_path / "rest" / "checkpoints" / "18")
    again = fit(rest, config, tmp_path / "rest")
    assert rest.asked == [("b", 16)]
    assert rest.mean == whole.mean  # the phase does not train what its data depend on
    for a, b in zip(*map(jax.tree.leaves, (state.params, again.params)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_patience_begins_afresh_with_every_phase_and_survives_a_stop():
    phases = [{"name": "a", "steps": 10, "patience": 2, "metric": "eval.x", "mode": "max"}]
    cfg = toy_config(steps=20, eval_every=1, phases=phases).train
    phase, seen = cfg.phases[0], Patience(cfg.checkpoint)
    assert [seen.spent(0, phase, {"eval.x": x}) for x in (1.0, 0.5)] == [False, False]
    other = Patience(cfg.checkpoint)
    other.set_state(seen.get_state())
    assert not seen.spent(10, phase, {"eval.x": 0.1})  # its best there
    assert not other.spent(0, phase, {"eval.y": 0.1})  # not measured
    assert other.spent(0, phase, {"eval.x": 0.9})


@pytest.mark.parametrize(
    "given, said",
    [
        ({"phases": [{"name": "a", "patience": 1}]}, "set train.eval_every"),
        ({"phases": [{"name": "a", "skip": True}]}, "every phase is skipped"),
        ({"optimizer": {"lr": {"kind": "linear", "value": 1.0, "steps": 4}, "per_phase": True}},
         "give the peak"),
    ],
)  # fmt: skip
def test_refused(given, said):
    with pytest.raises(ConfigError, match=said):
        toy_config(**given)
