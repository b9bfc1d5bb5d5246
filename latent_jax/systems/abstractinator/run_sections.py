"""The sections of a run beside its models: text, weights of the losses, evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from latent_jax.core.config import field
from latent_jax.train.curriculum import ScheduleConfig


@dataclass(frozen=True)
class AbstractDataConfig:
    """Which text, in which windows."""

    root: str | None = field(default=None, help="data folder; default: env LATENT_JAX_DATA")
    text: str = field(default="pydoc", help="a source of text or a path")
    window: int = field(default=96, ge=2, help="bytes of a window")
    stride: int | None = field(
        default=None, ge=1, help="bytes between starts of training windows (null: half a window)"
    )


@dataclass(frozen=True)
class AbstractLossConfig:
    """Weights of the loss terms, each a number or a schedule of the step."""

    reconstruct: float | ScheduleConfig = field(
        default=1.0, help="bytes given rows (nats per byte or end of segment)"
    )
    digits: float | ScheduleConfig = field(
        default=1.0, help="digits of rows given the rows above (nats per digit)"
    )
    commit: float | ScheduleConfig = field(
        default=0.25, help="squared distance of vectors to their codes, all stages"
    )
    entropy: float | ScheduleConfig = field(
        default=0.0, help="minus the codes' soft usage entropy (needs level.vq.entropy)"
    )
    top: float | ScheduleConfig = field(default=1.0, help="digits given earlier rows (nats/digit)")
    top_mse: float | ScheduleConfig = field(
        default=1.0, help="predicted row to the next quantised one (top.head continuous or mixed)"
    )
    top_vq: float | ScheduleConfig = field(
        default=0.05, help="predicted row to its own codes (top.head continuous or mixed)"
    )
    top_mse_post: float | ScheduleConfig = field(
        default=0.0,
        help="the prediction, once quantised, to the next row (straight-through); schedules of "
        "this and top_mse make a warm start on the row before quantisation",
    )
    byte_lm: float | ScheduleConfig = field(default=1.0, help="the peers (nats per byte)")
    entropy_model: float | ScheduleConfig = field(
        default=1.0, help="the model that finds segments (nats per byte)"
    )
    entropy_gaussian: float | ScheduleConfig = field(
        default=1.0, help="its Gaussian head (nats per number of an embedding)"
    )
    ratio: float | ScheduleConfig = field(
        default=1.0, help="learned segments: toward segments.bytes_per_segment"
    )


@dataclass(frozen=True)
class AbstractEvalConfig:
    """What is measured."""

    windows: int = field(default=256, ge=1, help="held-out windows, evenly spread")
    batch_size: int = field(default=64, ge=1, help="windows at once")
    quick: int = field(default=64, ge=1, help="windows of the evaluation while training")
    samples: int = field(default=4, ge=0, help="continuations and reconstructions kept")
    continuation: int = field(
        default=64, ge=0, help="bytes that the samples are continued by, timed (0: none are)"
    )
    token_lm: str | None = field(
        default="auto",
        help="a token model measured on the same bytes: name or path; auto: smollm2 where it has "
        "been fetched (null: none)",
    )
    token_lm_windows: int = field(
        default=64, ge=1, help="of the windows, how many it is measured on, evenly spread"
    )
