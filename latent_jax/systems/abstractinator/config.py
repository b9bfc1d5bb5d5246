"""Everything an abstractinator run can be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from latent_jax.core.config import field
from latent_jax.core.errors import ConfigError
from latent_jax.nn.vq_config import Ramp, VQConfig
from latent_jax.systems.abstractinator.run_sections import (
    AbstractDataConfig,
    AbstractEvalConfig,
    AbstractLossConfig,
)
from latent_jax.systems.abstractinator.segment import parse_rule
from latent_jax.train.config import RunBase

# Plain byte models beside the levels; each is trained by a phase of its own.
PEERS = ("byte_lm", "byte_lm_flops")


def part(kind: str, level: int) -> str:
    """Name of a level's part, in parameters, labels and loss terms.

    Example:
      >>> part("expander", 0), part("expander", 1)
      ('expander', 'expander1')
    """
    return kind if level == 0 else f"{kind}{level}"


def _check_heads(where: str, width: int, heads: int) -> None:
    if width % heads or width // heads % 2:
        raise ConfigError(
            f"{where}.heads={heads} must divide {where}.width={width} into even parts"
        )


@dataclass(frozen=True)
class SegmentConfig:
    """How windows of bytes are cut."""

    rule: str = field(
        default="fixed:6",
        help="fixed:N; space: at the first byte after white space (space:N: once a segment has N "
        "bytes); entropy: where the section entropy's model is uncertain; information: where it "
        "has been surprised by enough bits; learned: where the section router says",
    )
    score: Literal["logits", "gaussian"] = field(
        default="logits", help="entropy: which head's entropy, of bytes or of their embeddings"
    )
    delta: float | None = field(
        default=None, help="entropy: bits that a byte's exceeds the one before by (null: unused)"
    )
    threshold: float | None = field(
        default=None,
        help="bits (entropy; null: unused) or probability (learned; null: 0.5) above which a byte "
        "starts a segment",
    )
    bytes_per_segment: float | None = field(
        default=None, gt=1.0, help="learned: mean length that the ratio loss asks for"
    )
    bits: float | None = field(
        default=None, gt=0.0, help="information: bits of surprise that a segment holds at most"
    )
    longest: int | None = field(
        default=None, ge=1, help="most bytes of a segment (null: N of fixed, else 16)"
    )
    budget: int | None = field(
        default=None, ge=1,
        help="segments per window; bytes beyond are left out and counted (null: as many as fixed "
        "makes; else a third of the bytes)",
    )

    def validate(self) -> None:
        """Refuses unknown rules, and limits that do not belong to the rule."""
        parse_rule(self.rule)
        limits = [n for n in ("delta", "threshold") if getattr(self, n) is not None]
        if self.rule == "entropy" and not limits:
            raise ConfigError(
                "segments.rule=entropy needs segments.threshold or segments.delta, in bits; "
                "`latent-jax data calibrate-segments RUN --bytes-per-segment X` finds them"
            )
        if self.rule != "entropy" and limits and (limits, self.rule) != (["threshold"], "learned"):
            raise ConfigError(f"segments.{limits[0]} needs segments.rule=entropy")
        if (self.rule == "information") != (self.bits is not None):
            raise ConfigError("segments.rule=information and segments.bits need each other")
        if self.rule != "entropy" and self.score != "logits":
            raise ConfigError(f"segments.score={self.score} needs segments.rule=entropy")
        if (self.rule == "learned") != (self.bytes_per_segment is not None):
            raise ConfigError(
                "segments.bytes_per_segment and segments.rule=learned go together: it is the mean "
                "length that the ratio loss asks for"
            )
        if self.rule == "learned" and self.bytes_per_segment >= self.most:
            raise ConfigError(
                f"segments.bytes_per_segment={self.bytes_per_segment:g}: it has to be below "
                f"segments.longest={self.most}, which no segment exceeds"
            )
        if self.rule == "learned" and not 0 <= self.cut < 1:
            raise ConfigError(
                f"segments.threshold={self.threshold} is a probability with segments.rule=learned"
            )

    @property
    def cut(self) -> float:
        """Probability above which a byte starts a learned segment."""
        return 0.5 if self.threshold is None else self.threshold

    @property
    def most(self) -> int:
        """Most bytes of a segment."""
        kind, size = parse_rule(self.rule)
        return self.longest or (size if kind == "fixed" else 16)

    def segments(self, window: int) -> int:
        """Segments kept per window."""
        kind, size = parse_rule(self.rule)
        if self.budget is not None:
            return self.budget
        if kind != "fixed":
            return max(1, -(-window // max(3, min(size, self.most))))
        pieces = -(-size // min(size, self.most))  # a shorter limit cuts each in pieces
        return -(-window // size) * pieces


@dataclass(frozen=True)
class CorruptConfig:
    """Rows that the expander looks back on, made in training as imperfect as in generation."""

    share: Ramp = field(
        default=Ramp(), help="of the rows; a schedule of the steps that the level has trained"
    )
    by: Literal["noise", "model"] = field(
        default="noise",
        help="noise: Gaussian; model: the row that the row model, or the expander above, predicts",
    )
    noise: float = field(
        default=0.5, gt=0.0, help="its standard deviation, relative to the rows' root mean square"
    )


@dataclass(frozen=True)
class LevelConfig:
    """Compressor, quantiser and expander of a level."""

    width: int = field(default=128, ge=2, help="residual stream")
    heads: int = field(default=4, ge=1, help="attention heads")
    ff: int = field(default=512, ge=1, help="hidden width of the MLPs")
    compressor_layers: int = field(default=2, ge=0, help="blocks over the bytes")
    reach: int = field(default=32, ge=1, help="bytes that a block of the compressor looks back")
    context: bool = field(
        default=False,
        help="blocks of the compressor look back beyond their segment; without, equal segments "
        "have equal rows",
    )
    queries: int = field(default=4, ge=1, help="learned queries that pool a segment")
    row_width: int = field(default=64, ge=1, help="numbers in a row")
    expander_layers: int = field(default=2, ge=1, help="blocks over a segment's bytes")
    lookback: int = field(default=2, ge=0, help="earlier rows that the expander reads")
    codes: int = field(default=256, ge=2, help="codes per stage")
    stages: int = field(default=4, ge=1, help="digits of a row")
    taper: float = field(
        default=1.0, ge=1.0,
        help="how many times larger than the next stage's share of a row's numbers a stage's share "
        "is; the stages then start with bytes of their own (1: no shares)",
    )
    vq: VQConfig = field(default_factory=VQConfig, help="how codebooks are searched and learned")
    corrupt: CorruptConfig = field(
        default_factory=CorruptConfig, help="of the rows that the expander looks back on"
    )

    def validate(self) -> None:
        """Refuses what the level cannot be, or does not carry through to the expander."""
        _check_heads("level", self.width, self.heads)
        if self.taper > 1 and (self.queries % self.stages or self.row_width % self.stages):
            raise ConfigError(
                f"level.taper={self.taper:g}: level.stages={self.stages} must divide level.queries="
                f"{self.queries} and level.row_width={self.row_width}"
            )
        if self.vq.learn != "ema" or self.vq.groups != 1:
            raise ConfigError("level.vq: a level needs learn=ema and groups=1")
        if self.corrupt.share.used and not self.lookback:
            raise ConfigError("level.corrupt.share: with lookback=0 no expander looks back on rows")
        if self.vq.bypass.value or self.vq.soft.used:
            raise ConfigError(
                "level.vq: soft, and a bypass that does not end at 0, are not for a level, whose "
                "expander reads in training the quantised rows that it reads in generation"
            )


@dataclass(frozen=True)
class AboveConfig(LevelConfig):
    """A level over the rows of the one below."""

    children: int = field(default=4, ge=2, help="rows of the level below that one row stands for")
    compressor_layers: int = field(default=1, ge=0, help="blocks over the rows below")
    reach: int = field(default=8, ge=1, help="rows that a block of the compressor looks back")


@dataclass(frozen=True)
class TransformerConfig:
    """Size of a plain transformer."""

    layers: int = field(default=2, ge=0, help="blocks")
    width: int = field(default=128, ge=2, help="residual stream")
    heads: int = field(default=4, ge=1, help="attention heads")
    ff: int = field(default=512, ge=1, help="hidden width of the MLPs")

    def validate(self) -> None:
        """Refuses heads that do not divide the width, or cannot be rotated."""
        _check_heads("transformer", self.width, self.heads)


@dataclass(frozen=True)
class TopConfig(TransformerConfig):
    """The row model."""

    head: Literal["discrete", "continuous", "mixed"] = field(
        default="discrete",
        help="discrete: logits of digits; continuous: a row, whose distance to the codes gives "
        "them; mixed: the sum of both",
    )


@dataclass(frozen=True)
class EntropyConfig(TransformerConfig):
    """A small byte model whose uncertainty cuts segments."""

    layers: int = field(default=1, ge=0, help="blocks")
    width: int = field(default=64, ge=2, help="residual stream")
    ff: int = field(default=128, ge=1, help="hidden width of the MLPs")
    reach: int = field(default=32, ge=1, help="bytes that a block looks back on")
    head: Literal["logits", "gaussian", "both"] = field(
        default="logits", help="predicts the next byte, a Gaussian of its embedding, or both"
    )


@dataclass(frozen=True)
class RouterConfig(TransformerConfig):
    """The model that learns where segments start."""

    layers: int = field(default=1, ge=0, help="blocks")
    width: int = field(default=64, ge=2, help="residual stream")
    ff: int = field(default=128, ge=1, help="hidden width of the MLPs")
    reach: int = field(default=16, ge=1, help="bytes that a block looks back on")


@dataclass(frozen=True)
class AbstractRun(RunBase):
    """An abstractinator run."""

    segments: SegmentConfig = field(default_factory=SegmentConfig, help="how bytes are cut")
    level: LevelConfig = field(default_factory=LevelConfig, help="bytes to rows and back")
    above: tuple[AboveConfig, ...] = field(
        default=(), help="levels over it, each reading the rows of the one below, lowest first"
    )
    top: TopConfig = field(default_factory=TopConfig, help="row model")
    byte_lm: TransformerConfig | None = field(
        default=None, help="a plain peer over bytes, of as many parameters"
    )
    byte_lm_flops: TransformerConfig | None = field(
        default=None,
        help="another of as many training FLOPs: its phase's steps are right when "
        "flops.train.byte_lm_flops in the results is flops.train.model",
    )
    entropy: EntropyConfig | None = field(
        default=None, help="a byte model whose uncertainty cuts segments"
    )
    router: RouterConfig | None = field(
        default=None, help="the model that learns where segments start"
    )
    data: AbstractDataConfig = field(default_factory=AbstractDataConfig, help="text")
    losses: AbstractLossConfig = field(default_factory=AbstractLossConfig, help="loss weights")
    eval: AbstractEvalConfig = field(default_factory=AbstractEvalConfig, help="final evaluation")

    @property
    def budget(self) -> int:
        """Segments per window."""
        return self.segments.segments(self.data.window)

    @property
    def levels(self) -> tuple[LevelConfig, ...]:
        """All levels, lowest first."""
        return (self.level, *self.above)

    @property
    def highest(self) -> LevelConfig:
        """The level whose rows the row model reads."""
        return self.levels[-1]

    def longest(self, level: int) -> int:
        """Most bytes, or rows of the level below, that a row stands for."""
        return self.above[level - 1].children if level else self.segments.most

    def typical(self, level: int) -> int:
        """Bytes, or rows of the level below, of a usual segment, a query of the pool for each."""
        fixed = level or parse_rule(self.segments.rule).kind == "fixed"
        longest = self.longest(level)
        return longest if fixed else min(self.levels[level].queries, longest)

    def rows(self, level: int, budget: int | None = None) -> int:
        """Rows of a level in a window with ``budget`` (by default the run's) at the lowest."""
        count = budget or self.budget
        for above in self.above[:level]:
            count = -(-count // above.children)
        return count

    @property
    def gaussian(self) -> bool:
        """Whether segments are cut by the entropy of the Gaussian head."""
        only = self.entropy is not None and self.entropy.head == "gaussian"
        return only or self.segments.score == "gaussian"

    @property
    def peers(self) -> dict[str, TransformerConfig]:
        """The plain byte models that there are, by name."""
        found = {name: getattr(self, name) for name in PEERS}
        return {name: config for name, config in found.items() if config is not None}

    @property
    def trains(self) -> dict[str, tuple[str, ...]]:
        """What a phase's ``data`` may be, and the labels that it can train."""
        own = {
            f"level{i}": (part("compressor", i), part("expander", i))
            for i in range(len(self.levels))
        }
        if self.router is not None:
            own["level0"] += ("router",)
        every = tuple(label for labels in own.values() for label in labels)
        rest = {"top": ("top",), **{name: (name,) for name in PEERS}, "entropy": ("entropy",)}
        return {**own, **rest, "joint": (*every, "top")}

    def validate(self) -> None:
        """Refuses what does not go together; see `checks`."""
        from latent_jax.systems.abstractinator import checks  # it needs the types of this module

        checks.check(self)
