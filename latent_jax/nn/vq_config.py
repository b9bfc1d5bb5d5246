"""What a quantiser can be told."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from latent_jax.core.config import field
from latent_jax.core.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Ramp:
    """A value over training steps: ``start`` before ``begin``, then linearly to ``value``.

    Example:
      >>> warm = Ramp(value=1.0, start=0.0, begin=100, steps=100)
      >>> float(warm(100)), float(warm(150)), float(warm(900))
      (0.0, 0.5, 1.0)
    """

    value: float = field(default=0.0, help="value in the end")
    start: float | None = field(default=None, help="value at first (as in the end if null)")
    begin: int = field(default=0, ge=0, help="first step of the change")
    steps: int = field(default=0, ge=0, help="steps that the change takes")

    def __call__(self, step: Int[Array, ""] | int) -> Float[Array, ""]:
        """The value at ``step``."""
        first = self.value if self.start is None else self.start
        done = jnp.where(
            self.steps > 0,
            jnp.clip((step - self.begin) / max(self.steps, 1), 0.0, 1.0),
            jnp.where(step >= self.begin, 1.0, 0.0),
        )
        return jnp.asarray(first + (self.value - first) * done, jnp.float32)

    @property
    def used(self) -> bool:
        """Whether it is ever other than 0."""
        return bool(self.value or self.start)


@dataclasses.dataclass(frozen=True)
class ResetConfig:
    """Restart of dead codes from residuals of the present batch."""

    fraction: float = field(
        default=0.1, ge=0.0, lt=1.0, help="dead below this share of uniform use; 0 is never"
    )
    stale: int = field(default=20, ge=1, help="and unchosen for this many steps")
    share: float = field(
        default=0.25, gt=0.0, le=1.0, help="of a stage's codes, restarted at most at once"
    )
    every: int = field(default=1, ge=1, help="steps between two restarts")
    size: float = field(default=1.0, gt=0.0, help="cluster size of a restarted code")
    protect: int = field(default=0, ge=0, help="first codes of each stage that never restart")


@dataclasses.dataclass(frozen=True)
class VQConfig:
    """How codebooks are searched, learned and kept alive. Every `Ramp` is a schedule."""

    distance: Literal["euclidean", "cosine"] = field(
        default="euclidean", help="cosine: unit-length codes of unit-length residuals"
    )
    code_dim: int | None = field(default=None, ge=1, help="width of projected codes")
    groups: int = field(default=1, ge=1, help="parts of a vector with codebooks of their own")
    shared: bool = field(default=False, help="one codebook for all stages")
    learn: Literal["ema", "gradient"] = field(default="ema", help="how codebooks move")
    target: Literal["stage", "joint"] = field(
        default="stage",
        help="what an EMA code averages: its stage's input, or that less all other stages",
    )
    decay: float = field(default=0.95, ge=0.0, lt=1.0, help="of the moving averages")
    epsilon: float = field(default=1e-5, ge=0.0, help="Laplace smoothing of cluster sizes")
    init: Literal["random", "data", "kmeans"] = field(
        default="kmeans", help="first codes; from data one stage per training step"
    )
    kmeans_iters: int = field(default=10, ge=1, help="Lloyd iterations")
    beam: int = field(default=1, ge=1, help="prefixes kept per stage in training")
    eval_beam: int = field(default=1, ge=1, help="and in evaluation")
    chunk: int | None = field(default=None, ge=1, help="codes scored at once (null: 16 MiB)")
    statistics: Literal["auto", "scatter", "matmul"] = field(
        default="auto", help="how rows are summed per code; auto: scatter except on TPU"
    )
    rotation: bool = field(default=False, help="rotation trick instead of straight-through")
    dropout: float = field(
        default=0.0, ge=0.0, le=1.0, help="share of rows cut to a random number of stages"
    )
    dropout_keep: int = field(default=1, ge=1, help="stages that dropout never cuts")
    commitment: Ramp = field(default=Ramp(0.25), help="weight of the commitment loss")
    stage_weights: tuple[float, ...] = field(
        default=(), help="weights of the stages' commitment (all 1 if empty)"
    )
    ema: Ramp = field(default=Ramp(1.0), help="0 holds the codebooks still, 1 lets them move")
    bypass: Ramp = field(default=Ramp(), help="share of the input that passes unquantised")
    soft: Ramp = field(default=Ramp(), help="share of the Gumbel-soft code in the code used")
    soft_temperature: Ramp = field(default=Ramp(1.0), help="of it, in squared distance")
    temperature: Ramp = field(default=Ramp(), help="of sampled codes, in squared distance")
    entropy: Ramp = field(default=Ramp(), help="weight of the usage-entropy bonus")
    entropy_temperature: float = field(default=1.0, gt=0.0, help="of its soft assignment")
    orthogonality: Ramp = field(default=Ramp(), help="weight of the orthogonality loss")
    reset: ResetConfig = field(default=ResetConfig(), help="restart of dead codes")
    seed: int = field(default=0, help="of random choices when no `codes` stream is given")

    def __post_init__(self) -> None:
        if self.learn == "gradient" and self.target == "joint":
            raise ConfigError("target=joint is a moving average: it needs learn=ema")
        if self.learn == "gradient" and self.distance == "cosine":
            raise ConfigError("distance=cosine keeps codes at unit length: it needs learn=ema")
        if self.learn == "ema" and self.orthogonality.used:
            raise ConfigError(
                "orthogonality has no gradient to give to codebooks of moving averages: use "
                "learn=gradient"
            )
        if self.target == "joint" and self.distance == "cosine":
            raise ConfigError("target=joint needs distance=euclidean: unit codes are no means")
        if self.target == "joint" and self.soft.used:
            raise ConfigError("target=joint needs hard codes: leave soft at 0")
        searched = max(self.beam, self.eval_beam) > 1
        if searched and (self.temperature.used or self.soft.used):
            raise ConfigError("a beam wider than 1 does not go with sampled or soft codes")


@dataclasses.dataclass(frozen=True)
class QuantizerConfig:
    """A quantiser in a system's YAML; `make` builds the module."""

    kind: Literal["rvq", "fsq", "lfq"] = field(default="rvq", help="codebooks, scalars, signs")
    codes: int = field(default=1024, ge=1, help="codes per stage (rvq)")
    sizes: tuple[int, ...] = field(default=(), help="codes of each stage, instead (rvq)")
    stages: int = field(default=8, ge=1, help="depth")
    levels: tuple[int, ...] = field(default=(8, 5, 5, 5), help="values per dimension (fsq)")
    bits: int = field(default=10, ge=1, le=30, help="dimensions (lfq)")
    vq: VQConfig = field(default=VQConfig(), help="everything else (rvq)")

    def make(self, dim: int) -> Any:
        """The Linen module for vectors of ``dim``."""
        from latent_jax.nn.finite_scalar import FSQ, LFQ
        from latent_jax.nn.residual_vq import ResidualVQ

        if self.kind == "fsq":
            return FSQ(dim=dim, levels=self.levels, stages=self.stages)
        if self.kind == "lfq":
            return LFQ(dim=dim, bits=self.bits, stages=self.stages)
        return ResidualVQ(dim, self.sizes or self.codes, self.stages, self.vq)
