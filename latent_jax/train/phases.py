"""Phases: which labels, data and weights apply at a step. Alternating training is a schedule."""

from __future__ import annotations

from latent_jax.core.errors import ConfigError
from latent_jax.train.config import PhaseConfig, TrainConfig
from latent_jax.train.optimizers import FROZEN


def phase_at(cfg: TrainConfig, step: int) -> tuple[int, PhaseConfig]:
    """Returns (index, phase) for the step that comes after ``step`` finished ones.

    Phases follow one another; after the last they begin again, unless the last has ``steps=0``,
    which lasts until the end of training.
    """
    if not cfg.phases:
        return 0, PhaseConfig()
    cycle = sum(p.steps for p in cfg.phases)
    rest = step if cfg.phases[-1].steps == 0 else step % cycle
    for index, phase in enumerate(cfg.phases):
        if phase.steps == 0 or rest < phase.steps:
            return index, phase
        rest -= phase.steps
    raise AssertionError("unreachable: phases cover every step")


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
        raise ConfigError(f"train.phases {phase.name!r} trains no label")
    return chosen
