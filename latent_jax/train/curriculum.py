"""Curriculum: loss weights (and learning rates) as pure functions of ``state.step``.

A schedule is written in YAML as a number or a mapping::

    weights:
      autoencode: 1.0
      answer: {kind: linear, begin: 200, steps: 300, value: 1.0}
      first_token: {kind: taper, value: 0.5, begin: 500, steps: 500, end: 0.05}
      generate: {value: 0.2, gate: {metric: ae_accuracy, open: 0.75, floor: 0.70}}

The two adaptive parts, ``gate`` and ``auto_scale``, need memory. It is held as arrays in
``TrainState.gates`` and changed inside the jitted step, so it survives a resume.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from latent_jax.core.config import field
from latent_jax.core.errors import ConfigError
from latent_jax.core.types import Mean

ScheduleFn = Callable[[Int[Array, ""]], Float[Array, ""]]
GateStates = dict[str, dict[str, Array]]


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One piece of a ``staged`` schedule."""

    begin: int = field(default=0, ge=0, help="first step of the stage")
    value: float = field(default=1.0, help="value during the stage")
    ramp: int = field(default=0, ge=0, help="steps to move linearly from the stage before")


@dataclasses.dataclass(frozen=True)
class GateConfig:
    """Keeps a weight at 0 until a monitored metric is good, and backs off when it falls.

    The metric is smoothed. The gate opens (for good) at ``open``. After that the weight is
    multiplied by ``backoff`` each time the metric is found below ``floor``, and by ``1/backoff``
    (up to 1) when it is back at ``open``; at most one change per ``patience`` steps.
    """

    metric: str = field(default="", help="loss term or aux value that is monitored")
    open: float = field(default=0.75, help="the weight stays off until the metric reaches this")
    floor: float = field(default=0.70, help="below this the weight is cut")
    backoff: float = field(default=0.5, gt=0.0, lt=1.0, help="factor of one cut")
    patience: int = field(default=50, ge=1, help="steps between two changes of the factor")
    decay: float = field(default=0.9, ge=0.0, lt=1.0, help="smoothing of the metric (0 = raw)")
    lower_is_better: bool = field(default=False, help="monitor a loss instead of an accuracy")

    def validate(self) -> None:
        if not self.metric:
            raise ConfigError("gate.metric is empty: name the loss term or aux value to monitor")
        if (self.floor > self.open) != self.lower_is_better and self.floor != self.open:
            raise ConfigError(
                f"gate on {self.metric!r}: floor {self.floor} must be on the worse side of open "
                f"{self.open}"
            )


@dataclasses.dataclass(frozen=True)
class AutoScaleConfig:
    """Raises a term's weight while it lags behind another term: clip(term/reference, 1, max)."""

    reference: str = field(default="", help="loss term to keep up with")
    max: float = field(default=4.0, ge=1.0, help="largest factor")
    decay: float = field(default=0.9, ge=0.0, lt=1.0, help="smoothing of both terms")

    def validate(self) -> None:
        if not self.reference:
            raise ConfigError("auto_scale.reference is empty: name the loss term to keep up with")


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """A value over training steps.

    With ``t = clip((step - begin) / steps, 0, 1)``:

    * ``constant``: ``value``
    * ``linear``: from ``start`` to ``value``, ``start + (value - start) t``
    * ``cosine``: the same ends, ``start + (value - start) (1 - cos(pi t)) / 2``
    * ``delay``: ``start`` before step ``begin``, ``value`` from it on
    * ``taper``: ``value`` until ``begin``, then a half cosine down to ``end`` over ``steps``
    * ``staged``: the value of the last stage that has begun, reached over its ``ramp``
    """

    kind: Literal["constant", "linear", "cosine", "delay", "taper", "staged"] = field(
        default="constant", help="shape of the curve"
    )
    value: float = field(default=1.0, help="the constant, or the value a ramp arrives at")
    start: float = field(default=0.0, help="value before and at the start of a ramp or delay")
    end: float = field(default=0.0, help="value a taper ends at")
    begin: int = field(default=0, ge=0, help="step at which the ramp, delay or taper begins")
    steps: int = field(default=0, ge=0, help="length of the ramp or taper")
    stages: tuple[StageConfig, ...] = field(default=(), help="pieces of a staged schedule")
    gate: GateConfig | None = field(default=None, help="adaptive gate on a monitored metric")
    auto_scale: AutoScaleConfig | None = field(default=None, help="adaptive factor, at most max")

    def validate(self) -> None:
        if self.kind in ("linear", "cosine", "taper") and self.steps == 0:
            raise ConfigError(f"schedule kind={self.kind} needs steps > 0")
        if (self.kind == "staged") != bool(self.stages):
            raise ConfigError("schedule: 'stages' and kind=staged go together")
        begins = [s.begin for s in self.stages]
        if begins != sorted(set(begins)):
            raise ConfigError(f"schedule: stages must begin at increasing steps, got {begins}")


Schedule = float | ScheduleConfig
"""What a config field that is a schedule is typed as: a number or a mapping."""


def as_config(schedule: Schedule | ScheduleFn) -> ScheduleConfig | ScheduleFn:
    """Turns a number into a constant schedule; configs, callables and ``None`` pass."""
    if isinstance(schedule, int | float):
        return ScheduleConfig(value=float(schedule))
    return schedule


def values_at(schedules: Mapping[str, Any], step: Any) -> dict[str, Float[Array, ""]]:
    """What several schedules are at a step."""
    return {name: make_schedule(schedule)(step) for name, schedule in schedules.items()}


def make_schedule(schedule: Schedule | ScheduleFn) -> ScheduleFn:
    """Returns ``fn(step) -> float32 scalar`` (jit-able) for a schedule in any of its forms.

    Example:
      >>> fn = make_schedule(ScheduleConfig(kind="linear", begin=10, steps=10, value=2.0))
      >>> [float(fn(s)) for s in (0, 10, 15, 20, 99)]
      [0.0, 0.0, 1.0, 2.0, 2.0]
    """
    cfg = as_config(schedule)
    if not isinstance(cfg, ScheduleConfig):
        return cfg

    def fn(step: Int[Array, ""]) -> Float[Array, ""]:
        s = jnp.asarray(step, jnp.float32)
        t = jnp.clip((s - cfg.begin) / max(cfg.steps, 1), 0.0, 1.0)
        if cfg.kind == "linear":
            return cfg.start + (cfg.value - cfg.start) * t
        if cfg.kind == "cosine":
            return cfg.start + (cfg.value - cfg.start) * 0.5 * (1.0 - jnp.cos(jnp.pi * t))
        if cfg.kind == "delay":
            return jnp.where(s < cfg.begin, cfg.start, cfg.value).astype(jnp.float32)
        if cfg.kind == "taper":
            return cfg.end + (cfg.value - cfg.end) * 0.5 * (1.0 + jnp.cos(jnp.pi * t))
        if cfg.kind == "staged":
            out = jnp.asarray(cfg.start, jnp.float32)
            for stage in cfg.stages:
                u = jnp.clip((s - stage.begin) / max(stage.ramp, 1), 0.0, 1.0)
                moved = stage.value if stage.ramp == 0 else out + (stage.value - out) * u
                out = jnp.where(s < stage.begin, out, moved)
            return out
        return jnp.asarray(cfg.value, jnp.float32)

    return fn


def extremes(schedule: Schedule) -> tuple[float, float]:
    """Least and largest value that a schedule ever has, apart from gates and factors.

    Example:
      >>> extremes(ScheduleConfig(kind="taper", value=1.0, end=0.85, steps=10)), extremes(0.5)
      ((0.85, 1.0), (0.5, 0.5))
    """
    cfg = as_config(schedule)
    ends = {"constant": (cfg.value,), "taper": (cfg.value, cfg.end)}
    found = ends.get(cfg.kind, (cfg.start, cfg.value))
    if cfg.kind == "staged":
        found = tuple(stage.value for stage in cfg.stages)
        first = cfg.stages[0]
        # What comes before the first stage counts only if there are steps before it, or a ramp.
        found += (cfg.start,) if first.begin > 0 or first.ramp > 0 else ()
    return min(found), max(found)


def ever_on(schedule: Schedule, steps: int) -> bool:
    """Whether a schedule leaves 0 within the first ``steps`` steps, apart from gates and factors.

    Example:
      >>> late = ScheduleConfig(kind="delay", begin=100)
      >>> ever_on(late, 100), ever_on(late, 101), ever_on(0.0, 10)
      (False, True, False)
    """
    cfg, last = as_config(schedule), steps - 1
    if cfg.kind == "constant":
        return cfg.value != 0
    if cfg.kind == "taper":
        return cfg.value != 0 or (cfg.end != 0 and last > cfg.begin)
    if cfg.kind == "staged":
        # A ramp is where the stage before it was until its second step.
        begun = [s for s in cfg.stages if s.begin + (s.ramp > 0) <= last]
        first = cfg.stages[0]
        before = cfg.start != 0 and (first.begin > 0 or first.ramp > 0)
        return before or any(stage.value != 0 for stage in begun)
    ramp = cfg.kind != "delay"
    return cfg.start != 0 or (cfg.value != 0 and cfg.begin + ramp <= last)


def init_gates(*tables: Mapping[str, Any]) -> GateStates:
    """Returns the adaptive state of every weight with a gate or an auto-scale in any table.

    Several tables (the system's weights and each phase's) share one state per term.
    """
    gates: GateStates = {}
    for name, schedule in (item for table in tables for item in table.items()):
        cfg = as_config(schedule)
        if not isinstance(cfg, ScheduleConfig):
            continue
        state: dict[str, Array] = {}
        if cfg.gate is not None:
            state |= {
                "opened": jnp.asarray(False),
                "factor": jnp.asarray(0.0, jnp.float32),
                "metric": jnp.asarray(0.0, jnp.float32),
                "seen": jnp.asarray(0, jnp.int32),
                "wait": jnp.asarray(0, jnp.int32),
            }
        if cfg.auto_scale is not None:
            state |= {
                "term": jnp.asarray(0.0, jnp.float32),
                "reference": jnp.asarray(0.0, jnp.float32),
                "count": jnp.asarray(0, jnp.int32),
            }
        if state:
            gates[name] = {**gates.get(name, {}), **state}
    return gates


def weight_at(
    schedule: Any, gate: Mapping[str, Array] | None, step: Int[Array, ""]
) -> Float[Array, ""]:
    """The weight at ``step``: schedule × gate factor × auto-scale factor (from *past* steps)."""
    cfg = as_config(schedule)
    weight = make_schedule(schedule)(step)
    if not isinstance(cfg, ScheduleConfig) or gate is None:
        return weight
    if cfg.gate is not None:
        weight = weight * gate["factor"]
    if cfg.auto_scale is not None:
        ratio = gate["term"] / jnp.maximum(gate["reference"], 1e-8)
        scale = jnp.clip(ratio, 1.0, cfg.auto_scale.max)
        weight = weight * jnp.where(gate["count"] > 0, scale, 1.0)
    return weight


def update_gates(
    weights: Mapping[str, Any], gates: GateStates, values: Mapping[str, Any]
) -> GateStates:
    """Advances the adaptive state by one step's values (loss terms and aux; scalars or `Mean`).

    An empty `Mean` is no observation, and neither is a value that this kind of batch does not have:
    what depends on it stays as it was. (`watched` and `latent_jax.train.setup.check_gates` find
    values that no batch has.)
    """
    new: GateStates = {}
    for name, state in gates.items():
        cfg = as_config(weights[name])
        state = dict(state)
        if cfg.gate is not None:
            value, seen = _lookup(values, cfg.gate.metric)
            moved = _step_gate(cfg.gate, state, value)
            state |= {k: jnp.where(seen, v, state[k]) for k, v in moved.items()}
        if cfg.auto_scale is not None:
            auto = cfg.auto_scale
            term, seen_term = _lookup(values, name)
            reference, seen_ref = _lookup(values, auto.reference)
            seen, first = seen_term & seen_ref, state["count"] == 0
            for key, value in (("term", term), ("reference", reference)):
                ema = jnp.where(first, value, auto.decay * state[key] + (1.0 - auto.decay) * value)
                state[key] = jnp.where(seen, ema, state[key])
            state["count"] = state["count"] + seen.astype(jnp.int32)
        new[name] = state
    return new


def _step_gate(
    cfg: GateConfig, state: Mapping[str, Array], value: Float[Array, ""]
) -> dict[str, Array]:
    ema = cfg.decay * state["metric"] + (1.0 - cfg.decay) * value
    metric = jnp.where(state["seen"] == 0, value, ema)
    sign = -1.0 if cfg.lower_is_better else 1.0
    good = sign * metric >= sign * cfg.open
    bad = sign * metric < sign * cfg.floor
    opened, factor, wait = state["opened"], state["factor"], state["wait"]
    opens = ~opened & good
    cuts = opened & bad & (wait <= 0)
    heals = opened & good & (wait <= 0) & (factor < 1.0)
    factor = jnp.where(opens, 1.0, factor)
    factor = jnp.where(cuts, factor * cfg.backoff, factor)
    factor = jnp.where(heals, jnp.minimum(factor / cfg.backoff, 1.0), factor)
    wait = jnp.where(cuts | heals, cfg.patience - 1, jnp.maximum(wait - 1, 0))
    return {
        "opened": opened | opens,
        "factor": factor.astype(jnp.float32),
        "metric": metric,
        "seen": state["seen"] + 1,
        "wait": wait.astype(jnp.int32),
    }


def watched(*tables: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What adaptive weights look at: (name of the setting, loss term or aux value)."""
    found: dict[tuple[str, str], None] = {}
    for name, schedule in (item for table in tables for item in table.items()):
        cfg = as_config(schedule)
        if not isinstance(cfg, ScheduleConfig):
            continue
        if cfg.gate is not None:
            found[f"weights.{name}.gate", cfg.gate.metric] = None
        if cfg.auto_scale is not None:
            found[f"weights.{name}.auto_scale", name] = None
            found[f"weights.{name}.auto_scale", cfg.auto_scale.reference] = None
    return list(found)


def _lookup(
    values: Mapping[str, Any], key: str
) -> tuple[Float[Array, ""], Bool[Array, ""]]:
    """Returns the value, and whether there was anything of it in the batch."""
    value = values.get(key)
    if value is None:
        return jnp.zeros(()), jnp.asarray(False)
    if isinstance(value, Mean):
        return value.value, jnp.asarray(value.count) > 0
    return jnp.asarray(value, jnp.float32), jnp.asarray(True)
