"""Phases: which labels, data and weights apply at a step. Alternating training is a schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int

from latent_jax.core.errors import ConfigError
from latent_jax.train.config import CheckpointConfig, PhaseConfig, TrainConfig
from latent_jax.train.curriculum import ScheduleFn
from latent_jax.train.optimizers import FROZEN, learning_rate


def phase_at(cfg: TrainConfig, step: int) -> tuple[int, PhaseConfig]:
    """Returns (index, phase) for the step that comes after ``step`` finished ones.

    Phases follow one another; after the last they begin again, unless the last has ``steps=0``,
    which lasts until the end of training.
    """
    if not cfg.phases:
        return 0, PhaseConfig()
    rest = _in_cycle(cfg, step)
    for index, phase in enumerate(cfg.phases):
        if phase.steps == 0 or rest < phase.steps:
            return index, phase
        rest -= phase.steps
    raise AssertionError("unreachable: phases cover every step")


def first_phase(cfg: TrainConfig) -> PhaseConfig:
    """The first phase that is not left out: its batches tell the shapes of what is trained."""
    return next((phase for phase in cfg.phases if not phase.skip), PhaseConfig())


def _in_cycle(cfg: TrainConfig, step: Any) -> Any:
    """Steps since the first phase began, this time round."""
    return step if cfg.phases[-1].steps == 0 else step % sum(p.steps for p in cfg.phases)


def span(cfg: TrainConfig, step: int) -> tuple[int, int]:
    """First step of the phase that is on after ``step`` finished ones, and the step it ends at."""
    if not cfg.phases:
        return 0, cfg.steps
    index, phase = phase_at(cfg, step)
    inside = _in_cycle(cfg, step) - sum(p.steps for p in cfg.phases[:index])
    start = step - inside
    return start, min(start + phase.steps, cfg.steps) if phase.steps else cfg.steps


def phase_rate(cfg: TrainConfig, index: int) -> ScheduleFn:
    """Base learning rate of a phase as a function of ``state.step``: warm-up and decay begin anew
    with it (``train.optimizer.per_phase``).
    """
    before = sum(p.steps for p in cfg.phases[:index])
    length = cfg.phases[index].steps or max(cfg.steps - before, 1)
    rate = learning_rate(cfg.optimizer, length)

    def fn(step: Int[Array, ""]) -> Array:
        return rate(_in_cycle(cfg, jnp.asarray(step)) - before)

    return fn


def active_labels(phase: PhaseConfig, names: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the labels that a phase updates.

    Raises:
      ConfigError: an unknown label, or nothing left to train.
    """
    for field, labels in (("train", phase.train), ("freeze", phase.freeze)):
        for label in labels:
            if label not in names and label != FROZEN:
                raise ConfigError(
                    f"train.phases {phase.name!r}: {field} names the label {label!r}; there are: "
                    + ", ".join(names)
                )
    chosen = tuple(
        n for n in names if (not phase.train or n in phase.train) and n not in phase.freeze
    )
    if not chosen:
        raise ConfigError(
            f"train.phases {phase.name!r} trains no label; to leave it out, set its skip=true"
        )
    return chosen


class Patience:
    """Ends a phase whose metric has stopped getting better (``train.phases.N.patience``).

    What was seen belongs to one time that a phase is on; the next time begins afresh.
    """

    def __init__(self, cfg: CheckpointConfig) -> None:
        self._cfg = cfg
        self._state: dict[str, Any] = {"start": None, "best": None, "misses": 0}

    def spent(self, start: int, phase: PhaseConfig, values: Mapping[str, float]) -> bool:
        """Takes an evaluation; True if the phase that began at ``start`` is to end."""
        if not phase.patience:
            return False
        if self._state["start"] != start:
            self._state = {"start": start, "best": None, "misses": 0}
        value = values.get(phase.metric or self._cfg.metric)
        if not isinstance(value, int | float) or not math.isfinite(value):
            return False
        mode = phase.mode or self._cfg.mode
        signed = value if mode == "max" else -value
        better = self._state["best"] is None or signed > self._state["best"]
        best = signed if better else self._state["best"]
        misses = 0 if better else self._state["misses"] + 1
        self._state = {"start": start, "best": best, "misses": misses}
        return misses >= phase.patience

    def get_state(self) -> dict[str, Any]:
        return dict(self._state)

    def set_state(self, state: Mapping[str, Any]) -> None:
        self._state.update(state)
