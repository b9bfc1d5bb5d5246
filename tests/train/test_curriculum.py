from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import pytest

from latent_jax.core.config import parse
from latent_jax.core.errors import ConfigError
from latent_jax.core.types import Mean
from latent_jax.train.config import OptimizerConfig
from latent_jax.train.curriculum import (
    ScheduleConfig,
    StageConfig,
    ever_on,
    init_gates,
    make_schedule,
    update_gates,
    watched,
    weight_at,
)
from latent_jax.train.optimizers import learning_rate


def at(tree, step):
    return float(jax.jit(make_schedule(parse(ScheduleConfig, tree)))(step))


def test_kinds_against_closed_form():
    ramp = {"kind": "linear", "start": 0.2, "value": 1.0, "begin": 10, "steps": 40}
    assert at(ramp, 0) == pytest.approx(0.2)
    assert at(ramp, 20) == pytest.approx(0.4)
    assert at(ramp, 500) == pytest.approx(1.0)
    cosine = {"kind": "cosine", "value": 2.0, "steps": 100}
    for step in (0, 25, 50, 99, 100, 300):
        want = 2.0 * 0.5 * (1 - math.cos(math.pi * min(step / 100, 1)))
        assert at(cosine, step) == pytest.approx(want, abs=1e-5)
    delay = {"kind": "delay", "value": 0.7, "begin": 5}
    assert [at(delay, s) for s in (4, 5)] == pytest.approx([0.0, 0.7])
    taper = {"kind": "taper", "value": 0.5, "end": 0.1, "begin": 10, "steps": 10}
    assert [at(taper, s) for s in (0, 10, 15, 20)] == pytest.approx([0.5, 0.5, 0.3, 0.1])
    staged = {"kind": "staged", "stages": [{"begin": 0, "value": 1.0},
                                           {"begin": 10, "value": 0.5, "ramp": 10},
                                           {"begin": 30, "value": 0.0}]}
    assert [at(staged, s) for s in (0, 9, 10, 15, 20, 29, 30)] == pytest.approx(
        [1.0, 1.0, 1.0, 0.75, 0.5, 0.5, 0.0]
    )
    assert float(make_schedule(0.25)(3)) == 0.25


def test_impossible_schedules_are_refused():
    for tree in ({"kind": "linear"}, {"kind": "staged"}, {"kind": "wobble"},
                 {"gate": {"metric": "a", "open": 0.5, "floor": 0.9}},
                 {"kind": "staged", "stages": [{"begin": 5}, {"begin": 5}]}):
        with pytest.raises(ConfigError):
            parse(ScheduleConfig, tree)


def test_learning_rate_counts_state_step():
    cfg = OptimizerConfig(lr=1.0, warmup_steps=4, decay="linear", final_scale=0.0)
    lr = learning_rate(cfg, 104)
    assert float(lr(0)) == pytest.approx(0.2)
    assert float(lr(4)) == pytest.approx(1.0)
    assert float(lr(54)) == pytest.approx(0.5)
    assert float(lr(104)) == pytest.approx(0.0)


def run_gate(tree, values):
    weights = {"w": parse(ScheduleConfig, tree)}
    gates = init_gates(weights)
    step = jax.jit(lambda g, v: update_gates(weights, g, v))
    out = []
    for value in values:
        out.append(float(weight_at(weights["w"], gates["w"], jnp.asarray(0))))
        gates = step(gates, {"m": value} if not isinstance(value, dict) else value)
    out.append(float(weight_at(weights["w"], gates["w"], jnp.asarray(0))))
    return out, gates


def test_gate_opens_cuts_and_heals():
    gate = {"metric": "m", "open": 0.75, "floor": 0.7, "decay": 0.0, "patience": 3}
    values = [0.5, 0.74, 0.8, 0.72, 0.6, 0.6, 0.6, 0.6, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9]
    seen, _ = run_gate({"value": 2.0, "gate": gate}, values)
    # Opens after 0.8; between floor and open it holds; a cut, the next one `patience` steps later;
    # back at open it heals, one doubling at a time, never past the schedule's own value.
    assert seen == [0, 0, 0, 2, 2, 1, 1, 1, 0.5, 0.5, 0.5, 1, 1, 1, 2, 2]


def test_gate_ignores_an_empty_mean():
    gate = {"metric": "m", "decay": 0.0}
    empty = {"m": Mean(jnp.zeros(()), jnp.zeros(()))}
    full = {"m": Mean(jnp.asarray(9.0), jnp.asarray(10.0))}
    seen, gates = run_gate({"gate": gate}, [full, empty, empty])
    assert seen == [0.0, 1.0, 1.0, 1.0]
    assert int(gates["w"]["seen"]) == 1


def test_auto_scale_is_clipped():
    tree = {"value": 0.5, "auto_scale": {"reference": "r", "max": 4.0, "decay": 0.0}}
    seen, _ = run_gate(tree, [{"w": 1.0, "r": 2.0}, {"w": 6.0, "r": 2.0}, {"w": 100.0, "r": 2.0}])
    assert seen == pytest.approx([0.5, 0.5, 1.5, 2.0])


def test_batches_without_the_value_leave_a_gate_as_it_was():
    """As in alternating training, where every other batch has other terms."""
    seen, gates = run_gate({"gate": {"metric": "m", "decay": 0.0}}, [0.9, {"other": 0.0}, 0.1])
    assert seen == [0.0, 1.0, 1.0, 0.5] and int(gates["w"]["seen"]) == 2
    tree = {"value": 0.5, "auto_scale": {"reference": "r", "decay": 0.0}}
    seen, gates = run_gate(tree, [{"w": 6.0, "r": 2.0}, {"w": 1.0}, {"r": 1.0}])
    assert seen == [0.5, 1.5, 1.5, 1.5] and int(gates["w"]["count"]) == 1


def test_what_adaptive_weights_look_at():
    one = {"w": parse(ScheduleConfig, {"gate": {"metric": "m"}}), "v": 1.0}
    other = {"w": parse(ScheduleConfig, {"auto_scale": {"reference": "r"}})}
    assert watched(one, other) == [
        ("weights.w.gate", "m"), ("weights.w.auto_scale", "w"), ("weights.w.auto_scale", "r")
    ]


@pytest.mark.parametrize(
    "schedule",
    [
        ScheduleConfig(value=0.0), ScheduleConfig(kind="delay", begin=5),
        ScheduleConfig(kind="delay", begin=5, start=1.0, value=0.0),
        ScheduleConfig(kind="linear", begin=5, steps=3), ScheduleConfig(kind="cosine", steps=2),
        ScheduleConfig(kind="linear", begin=2, steps=3, value=0.0),
        ScheduleConfig(kind="taper", begin=4, steps=4, value=0.0, end=0.5),
        ScheduleConfig(kind="taper", begin=4, steps=4),
        ScheduleConfig(kind="staged", stages=(StageConfig(3, 0.0), StageConfig(6, 1.0, ramp=2))),
        ScheduleConfig(kind="staged", stages=(StageConfig(0, 0.0), StageConfig(4, 1.0))),
        ScheduleConfig(kind="staged", start=1.0, stages=(StageConfig(0, 0.0),)),
    ],
)  # fmt: skip
def test_whether_a_schedule_is_ever_on_against_its_values(schedule):
    values = [float(make_schedule(schedule)(step)) for step in range(9)]
    for steps in range(1, 10):
        assert ever_on(schedule, steps) == any(values[:steps]), steps
