"""Configuration of training, shared by every system."""

from __future__ import annotations

import dataclasses
from typing import Literal

from latent_jax.core.config import field
from latent_jax.core.errors import ConfigError
from latent_jax.sharding import MeshConfig
from latent_jax.train.curriculum import ScheduleConfig


@dataclasses.dataclass(frozen=True)
class GroupConfig:
    """What one parameter group (label) does differently from the rest."""

    lr_scale: float = field(default=1.0, ge=0.0, help="factor on the learning rate; 0 holds it")
    weight_decay: float | None = field(default=None, ge=0.0, help="None: as the optimizer's")
    kind: str | None = field(default=None, help="another optimizer for this group")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer. Every schedule counts ``state.step``."""

    kind: Literal["adamw", "lion", "sgd", "adafactor"] = field(
        default="adamw", help="update rule"
    )
    lr: float | ScheduleConfig = field(
        default=1e-3, help="peak learning rate, or a full schedule (then warmup/decay are unused)"
    )
    warmup_steps: int = field(default=0, ge=0, help="linear warm-up from 0")
    decay: Literal["constant", "linear", "cosine"] = field(
        default="cosine", help="shape from the end of warm-up to the last step"
    )
    final_scale: float = field(default=0.1, ge=0.0, help="last learning rate ÷ peak")
    per_phase: bool = field(
        default=False, help="warm-up and decay begin anew with every phase, over its steps"
    )
    b1: float = field(default=0.9, ge=0.0, lt=1.0, help="first-moment decay (momentum of sgd)")
    b2: float = field(default=0.95, ge=0.0, lt=1.0, help="second-moment decay")
    eps: float = field(default=1e-8, gt=0.0, help="added to the root of the second moment")
    weight_decay: float = field(default=0.0, ge=0.0, help="decoupled weight decay")
    no_decay: str = field(
        default=r"(^|/)(bias|scale|[a-z_]*norm[a-z_0-9]*)(/|$)",
        help="regex of parameter paths without weight decay",
    )
    clip_norm: float | None = field(
        default=1.0, gt=0.0, help="clip the global norm over the trained parameters; null = off"
    )
    groups: dict[str, GroupConfig] = field(default_factory=dict, help="label -> differences")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """What is saved, when, and what is kept."""

    every: int = field(default=0, ge=0, help="steps between saves; 0 = only at the end")
    minutes: float = field(
        default=5.0, ge=0.0, help="also save after so many minutes (one process); 0 = never"
    )
    keep_last: int = field(default=2, ge=1, help="newest checkpoints kept")
    keep_best: int = field(default=1, ge=0, help="best checkpoints by metric kept")
    metric: str = field(
        default="loss", help="what best and peak are judged by: 'eval.NAME' or a name in the log"
    )
    mode: Literal["min", "max"] = field(default="min", help="is a small or a large metric good")
    smoothing: float = field(
        default=0.5, ge=0.0, lt=1.0, help="EMA over evaluations that selects the peak (0 = raw)"
    )
    phases: bool = field(
        default=False, help="also save where a phase ends, and keep those checkpoints"
    )
    asynchronous: bool = field(default=True, help="write in the background")


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """Watches one metric and warns, or stops, when it stays on the wrong side."""

    metric: str = field(default="", help="name in the log, e.g. latent_cosine or eval.ae_accuracy")
    above: float | None = field(default=None, help="warn while the metric is above this")
    below: float | None = field(default=None, help="warn while the metric is below this")
    after: int = field(default=0, ge=0, help="steps before the guard starts to look")
    patience: int = field(default=1, ge=1, help="observations in a row before it acts")
    message: str = field(default="", help="what it means, in the report")
    stop: bool = field(default=False, help="end the training there (the state is kept)")

    def validate(self) -> None:
        if not self.metric or (self.above is None) == (self.below is None):
            raise ConfigError("a guard needs 'metric' and exactly one of 'above' and 'below'")


@dataclasses.dataclass(frozen=True)
class PhaseConfig:
    """One phase of training; phases follow one another and repeat until ``train.steps``."""

    name: str = field(default="main", help="shown in the log")
    steps: int = field(default=0, ge=0, help="length; 0 = until the end of training")
    train: tuple[str, ...] = field(default=(), help="labels that are updated; empty = all")
    freeze: tuple[str, ...] = field(default=(), help="labels that are held")
    data: str = field(default="main", help="passed to system.train_data(...)")
    weights: dict[str, float | ScheduleConfig] = field(
        default_factory=dict, help="weights that replace the system's during the phase"
    )
    patience: int = field(
        default=0, ge=0,
        help="end the phase after so many evaluations (train.eval_every) that are no better than "
        "its best; the step counter goes to where it would have ended; 0 = never",
    )  # fmt: skip
    metric: str | None = field(
        default=None, help="what patience looks at, e.g. eval.NAME; none: train.checkpoint.metric"
    )
    mode: Literal["min", "max"] | None = field(
        default=None, help="is a small or a large one good; none: train.checkpoint.mode"
    )
    skip: bool = field(
        default=False,
        help="leave the phase out: the step counter passes over it (what does it contribute?)",
    )


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Where metrics go. ``metrics.jsonl`` is always written."""

    tensorboard: bool = field(default=True, help="write tensorboard/ event files")
    wandb: str | None = field(default=None, help="Weights & Biases project (needs wandb)")
    mlflow: str | None = field(default=None, help="MLflow experiment (needs mlflow)")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The shared trainer."""

    steps: int = field(default=1000, ge=0, help="optimizer steps")
    batch_size: int = field(default=32, ge=1, help="examples per step, over all devices")
    accumulate: int = field(default=1, ge=1, help="micro-batches per step (divides batch_size)")
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig, help="optimizer")
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig, help="checkpoints")
    log: LogConfig = field(default_factory=LogConfig, help="metric writers")
    log_every: int = field(default=10, ge=1, help="steps between fetches of the metrics")
    eval_every: int = field(default=0, ge=0, help="steps between quick evaluations; 0 = never")
    max_minutes: float | None = field(
        default=None, gt=0.0,
        help="save and stop (exit code 75) after so many minutes; run again to continue",
    )
    init_from: str | None = field(
        default=None, help="RUN[@last|best|peak|STEP] or .safetensors: start from its weights"
    )
    init_partial: bool = field(
        default=False, help="allow init_from to lack some parameters (they start fresh)"
    )
    max_nonfinite: int = field(
        default=10, ge=1, help="skipped (non-finite) steps in a row before the run stops"
    )
    guards: tuple[GuardConfig, ...] = field(default=(), help="collapse and floor guards")
    phases: tuple[PhaseConfig, ...] = field(default=(), help="phases; empty = a single one")

    def validate(self) -> None:
        if self.batch_size % self.accumulate:
            raise ConfigError(
                f"train.accumulate={self.accumulate} does not divide "
                f"train.batch_size={self.batch_size}"
            )
        for phase in self.phases[:-1]:
            if phase.steps == 0:
                raise ConfigError(
                    f"train.phases: phase {phase.name!r} has steps=0, only the last may"
                )
        if self.phases and all(phase.skip for phase in self.phases):
            raise ConfigError("train.phases: every phase is skipped: nothing is trained")
        waiting = [phase.name for phase in self.phases if phase.patience]
        if waiting and not self.eval_every:
            raise ConfigError(
                f"train.phases {waiting[0]!r}: patience counts evaluations: set train.eval_every"
            )
        if self.optimizer.per_phase and not isinstance(self.optimizer.lr, float | int):
            raise ConfigError(
                "train.optimizer.per_phase: lr is a schedule of its own; give the peak as a number"
            )


@dataclasses.dataclass(frozen=True)
class RunBase:
    """Fields every run has; a system's run config subclasses this and adds its own sections."""

    system: str = field(default="", help="which system")
    name: str = field(default="run", help="name of the run")
    seed: int = field(default=0, ge=0, help="root of every random stream")
    out: str | None = field(default=None, help="output directory; default runs/NAME")
    mesh: MeshConfig = field(default_factory=MeshConfig, help="device mesh")
    train: TrainConfig = field(default_factory=TrainConfig, help="training")
