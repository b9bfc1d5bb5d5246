"""The shared trainer: one jitted step, the loop, optimizers, curricula, checkpoints, writers."""

from __future__ import annotations

from latent_jax.train.checkpoints import load_variables, resume_hash
from latent_jax.train.config import (
    CheckpointConfig,
    GuardConfig,
    LogConfig,
    OptimizerConfig,
    PhaseConfig,
    RunBase,
    TrainConfig,
)
from latent_jax.train.curriculum import (
    AutoScaleConfig,
    GateConfig,
    Schedule,
    ScheduleConfig,
    StageConfig,
    make_schedule,
)
from latent_jax.train.guards import read_warnings
from latent_jax.train.init_from import save_weights
from latent_jax.train.loop import fit
from latent_jax.train.preemption import Preempted
from latent_jax.train.progress import ProgressEvent, make_progress
from latent_jax.train.protocol import DataIterator, System
from latent_jax.train.state import TrainState
from latent_jax.train.step import make_train_step

__all__ = [
    "AutoScaleConfig",
    "CheckpointConfig",
    "DataIterator",
    "GateConfig",
    "GuardConfig",
    "LogConfig",
    "OptimizerConfig",
    "PhaseConfig",
    "Preempted",
    "ProgressEvent",
    "RunBase",
    "Schedule",
    "ScheduleConfig",
    "StageConfig",
    "System",
    "TrainConfig",
    "TrainState",
    "fit",
    "load_variables",
    "make_progress",
    "make_schedule",
    "make_train_step",
    "read_warnings",
    "resume_hash",
    "save_weights",
]
