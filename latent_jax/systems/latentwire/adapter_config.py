"""What travels, and what the main reader makes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from latent_jax.backbones.config import PROJECTIONS
from latent_jax.core.config import field
from latent_jax.core.errors import ConfigError


@dataclass(frozen=True)
class WireConfig:
    """What travels."""

    d_z: int | None = field(
        default=None, ge=1, help="width of a latent; none sends the encoder's output as it is"
    )
    fit: Literal["data", "vocabulary", "random"] = field(
        default="data",
        help="where the map to d_z and back starts: principal directions of the encoder's output "
        "on training texts, of the LLM's input embeddings, or random ones",
    )
    levels: int = field(
        default=0, ge=0, help="finite scalar quantisation: values of each number of a latent, 3 or "
        "more; 0: real numbers",
    )  # fmt: skip

    codes: int = field(
        default=0, ge=0, help="residual VQ: codes of each stage, 2 or more; 0: real numbers"
    )
    stages: int = field(default=4, ge=1, help="stages of the residual VQ: digits of a latent")

    def validate(self) -> None:
        """Refuses quantised latents that have no width of their own."""
        if self.codes and (self.codes < 2 or self.d_z is None or self.levels):
            raise ConfigError(
                f"wire.codes={self.codes}: use 2 or more (0: none), with wire.d_z and levels=0"
            )
        if self.levels and (self.levels < 3 or self.d_z is None):
            raise ConfigError(
                f"wire.levels={self.levels}: use 3 or more (0: none), with wire.d_z"
            )


@dataclass(frozen=True)
class AdapterConfig:
    """How the reader receives it.

    All but ``kind`` starts as the identity, and acts on what the reader gets: of soft tokens first
    ``residual``, then ``calibration``, then ``transform``.
    """

    kind: Literal["kv", "soft", "cross", "coprocessor"] = field(
        default="kv", help="deep prefix of keys and values, soft tokens before the prompt, "
        "gated cross-attention blocks that read the latents in front of some layers, or what is "
        "added to the reader's own cache of fixed words",
    )  # fmt: skip
    carrier: str = field(
        default=" ...", help="those words, repeated to as many tokens as latents (coprocessor)"
    )
    depths: tuple[int, ...] = field(
        default=(), ge=0, help="the layers, from 0, that have such a block in front (kind=cross)"
    )
    gate: float = field(
        default=0.0, help="where the gates of such blocks start; 0: the reader is as it was"
    )
    entries: int = field(
        default=1, ge=1, help="soft tokens that are made of one latent (pool, then expand)"
    )
    positions: Literal["span", "ordinal"] = field(
        default="span", help="where the reader finds a latent: in the middle of the tokens that it "
        "stands for, or numbered 0, 1, 2, with the prompt behind the last number",
    )  # fmt: skip
    onto_soft: bool = field(
        default=False, help="a deep prefix is added, at first with no weight, to the keys and "
        "values of soft tokens that are made of the same latents (adapter.kind=kv, wire.d_z)",
    )  # fmt: skip
    task_rank: int = field(
        default=0, ge=0, help="rank of what each task adds to the linear map that all tasks share "
        "(content and task adapter; needs wire.d_z); 0: one map for all",
    )  # fmt: skip
    residual: Literal["none", "affine", "film", "mlp"] = field(
        default="none",
        help="what is learned on top of the linear map: a factor and a shift per dimension, the "
        "same from the latent, or a two-layer residual",
    )
    hidden: int = field(
        default=64, ge=1, help="width of the two-layer residual, of a block's MLP, or of a "
        "coprocessor",
    )  # fmt: skip
    calibration: Literal["none", "embed_rms", "token_rms", "distribution", "colour"] = field(
        default="none",
        help="size of soft tokens, from the vocabulary's statistics: one factor for a text, one "
        "for each token (a probe), every dimension's mean and spread over a text, or a learned "
        "factor and shift per dimension that start at those of the training texts",
    )
    transform: Literal["none", "nearest", "anchor", "codebook"] = field(
        default="none",
        help="soft tokens drawn to the vocabulary: mean of the nearest embeddings, the nearest "
        "one with a share of what is missing, or a mixture of learned codes",
    )
    neighbours: int = field(default=4, ge=1, help="embeddings that are nearest")
    offset: float = field(default=0.5, ge=0, le=1, help="share of what is missing (anchor)")
    codes: int = field(default=64, ge=2, help="learned codes (codebook)")

    def validate(self) -> None:
        """Refuses for a deep prefix what only soft tokens have."""
        soft = {
            "calibration": self.calibration != "none", "transform": self.transform != "none",
            "entries": self.entries > 1,
        }  # fmt: skip
        if self.kind != "soft" and (wrong := [name for name, on in soft.items() if on]):
            raise ConfigError(f"adapter.{', '.join(wrong)}: only adapter.kind=soft has soft tokens")
        if (self.kind == "cross") != bool(self.depths) or len(set(self.depths)) < len(self.depths):
            raise ConfigError(
                f"adapter.depths={list(self.depths)}: adapter.kind=cross wants different layers, "
                "the other kinds none"
            )
        if not self.linear and (self.residual != "none" or self.task_rank):
            raise ConfigError(
                f"adapter.residual, task_rank are of a linear map: kind={self.kind} has none"
            )
        if self.kind == "coprocessor" and not self.carrier:
            raise ConfigError("adapter.carrier is empty: a coprocessor adds to the cache of words")
        if self.onto_soft and self.kind != "kv":
            raise ConfigError("adapter.onto_soft is of a deep prefix: adapter.kind=kv")

    @property
    def linear(self) -> bool:
        """Whether a linear map makes what the reader gets."""
        return self.kind in ("kv", "soft")

    @property
    def plain(self) -> bool:
        """Whether the reader gets what the linear map makes."""
        return {self.residual, self.calibration, self.transform} == {"none"}


@dataclass(frozen=True)
class ReaderLoraConfig:
    """Deltas of the LLM that reads: with any, it is not frozen, and results say so."""

    rank: int = field(
        default=0, ge=0, help="rank of the trained deltas of the reader; 0: it is frozen"
    )
    alpha: float = field(default=16.0, gt=0, help="deltas are scaled by alpha / rank")
    targets: tuple[str, ...] = field(
        default=("q", "v"), help=f"adapted projections, of {', '.join(PROJECTIONS)}"
    )
    layers: int = field(default=0, ge=0, help="the first so many layers are adapted; 0: all")

    def validate(self) -> None:
        """Refuses projections that do not exist."""
        unknown = [t for t in self.targets if t not in PROJECTIONS]
        if unknown or not self.targets:
            raise ConfigError(f"reader_lora.targets: unknown {unknown}; allowed: {PROJECTIONS}")
