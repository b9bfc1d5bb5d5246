"""Everything an abstractinator run can be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from latent_jax.core.config import field
from latent_jax.core.errors import ConfigError
from latent_jax.nn.vq_config import VQConfig
from latent_jax.systems.abstractinator.segment import parse_rule
from latent_jax.train.config import RunBase
from latent_jax.train.curriculum import ScheduleConfig


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
        help="fixed:N; space: at the first byte after white space; entropy: where the section "
        "entropy's model is uncertain; information: where it has been surprised by enough bits",
    )
    delta: float | None = field(
        default=None, help="entropy: bits that a byte's exceeds the one before by (null: unused)"
    )
    threshold: float | None = field(
        default=None, help="entropy: bits above which a byte starts a segment (null: unused)"
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
        if self.rule != "entropy" and limits:
            raise ConfigError(f"segments.{limits[0]} needs segments.rule=entropy")
        if (self.rule == "information") != (self.bits is not None):
            raise ConfigError("segments.rule=information and segments.bits need each other")

    @property
    def most(self) -> int:
        """Most bytes of a segment."""
        return self.longest or parse_rule(self.rule) or 16

    def segments(self, window: int) -> int:
        """Segments kept per window."""
        size = parse_rule(self.rule)
        if self.budget is not None:
            return self.budget
        if size is None:
            return max(1, -(-window // 3))
        pieces = -(-size // min(size, self.most))  # a shorter limit cuts each in pieces
        return -(-window // size) * pieces


@dataclass(frozen=True)
class LevelConfig:
    """Compressor, quantiser and expander of a level."""

    width: int = field(default=128, ge=2, help="residual stream")
    heads: int = field(default=4, ge=1, help="attention heads")
    ff: int = field(default=512, ge=1, help="hidden width of the MLPs")
    compressor_layers: int = field(default=2, ge=0, help="blocks over the bytes")
    reach: int = field(default=32, ge=1, help="bytes that a block of the compressor looks back")
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
    byte_lm: float | ScheduleConfig = field(default=1.0, help="the peer (nats per byte)")
    entropy_model: float | ScheduleConfig = field(
        default=1.0, help="the model that finds segments (nats per byte)"
    )


@dataclass(frozen=True)
class AbstractEvalConfig:
    """What is measured."""

    windows: int = field(default=256, ge=1, help="held-out windows, evenly spread")
    batch_size: int = field(default=64, ge=1, help="windows at once")
    quick: int = field(default=64, ge=1, help="windows of the evaluation while training")
    samples: int = field(default=4, ge=0, help="continuations and reconstructions kept")


@dataclass(frozen=True)
class AbstractRun(RunBase):
    """An abstractinator run."""

    segments: SegmentConfig = field(default_factory=SegmentConfig, help="how bytes are cut")
    level: LevelConfig = field(default_factory=LevelConfig, help="bytes to rows and back")
    above: tuple[AboveConfig, ...] = field(
        default=(), help="levels over it, each reading the rows of the one below, lowest first"
    )
    top: TopConfig = field(default_factory=TopConfig, help="row model")
    byte_lm: TransformerConfig | None = field(default=None, help="a plain peer over bytes")
    entropy: EntropyConfig | None = field(
        default=None, help="a byte model whose uncertainty cuts segments"
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

    def rows(self, level: int, budget: int | None = None) -> int:
        """Rows of a level in a window with ``budget`` (by default the run's) at the lowest."""
        count = budget or self.budget
        for above in self.above[:level]:
            count = -(-count // above.children)
        return count

    @property
    def trains(self) -> dict[str, tuple[str, ...]]:
        """What a phase's ``data`` may be, and the labels that it can train."""
        own = {
            f"level{i}": (part("compressor", i), part("expander", i))
            for i in range(len(self.levels))
        }
        every = tuple(label for labels in own.values() for label in labels)
        rest = {"top": ("top",), "byte_lm": ("byte_lm",), "entropy": ("entropy",)}
        return {**own, **rest, "joint": (*every, "top")}

    def validate(self) -> None:
        """Refuses phases whose data and labels do not go together."""
        for phase in self.train.phases:
            self._check_phase(phase)
        self._check_entropy()
        vq = self.highest.vq
        if self.top.head != "discrete" and (vq.code_dim is not None or vq.distance != "euclidean"):
            raise ConfigError(
                f"top.head={self.top.head} measures Euclidean distances of rows to codes: it needs "
                "level.vq.distance=euclidean and level.vq.code_dim=null"
            )
        for i, below in enumerate(self.levels[:-1]):
            if below.vq.code_dim is not None or below.vq.distance != "euclidean":
                raise ConfigError(
                    f"above[{i}]: its expander measures Euclidean distances to the codes below: "
                    "level.vq there needs distance=euclidean and code_dim=null"
                )
        self._check_codes()
        trained = {label for phase in self.train.phases for label in phase.train}
        if self.byte_lm is not None and "byte_lm" not in trained:
            raise ConfigError("byte_lm: no phase of train.phases has data=byte_lm and trains it")
        entropy = self.losses.entropy
        if entropy != 0.0 and not self.level.vq.entropy.used:
            raise ConfigError("losses.entropy needs level.vq.entropy.value above 0")

    def _check_codes(self) -> None:
        for i, level in enumerate(self.levels):
            rows = self.train.batch_size * self.rows(i)
            if level.vq.init == "kmeans" and level.codes > rows:
                raise ConfigError(
                    f"{f'above[{i - 1}]' if i else 'level'}.codes={level.codes}: k-means of the "
                    f"first batch finds them among at most {rows} rows (train.batch_size="
                    f"{self.train.batch_size} windows of {self.rows(i)}); fewer codes, a larger "
                    "batch, or vq.init=random"
                )

    def _check_entropy(self) -> None:
        kinds = [phase.data for phase in self.train.phases]
        first = kinds.index("entropy") if "entropy" in kinds else None
        rule = self.segments.rule
        used = rule in ("entropy", "information")
        if used and self.entropy is None:
            raise ConfigError(f"segments.rule={rule} needs the section entropy")
        if self.entropy is not None and first is None and self.train.init_from is None:
            raise ConfigError(
                "entropy: no phase of train.phases has data=entropy and trains it, and there is no "
                "train.init_from to take it from"
            )
        if not used or first is None:
            return
        last = len(kinds) - 1 - kinds[::-1].index("entropy")
        before = any(kind not in ("entropy", "byte_lm") for kind in kinds[:last])
        cycle = sum(phase.steps for phase in self.train.phases)
        if before or (self.train.phases[-1].steps and self.train.steps > cycle):
            raise ConfigError(
                f"train.phases: with segments.rule={rule}, data=entropy comes once and before all "
                "levels, whose segments would move"
            )

    def _check_phase(self, phase) -> None:
        where = f"train.phases {phase.name!r}: data={phase.data!r}"
        trains = self.trains
        if phase.data == "main":
            raise ConfigError(f"{where}: a phase here names one of {', '.join(trains)}")
        if phase.data not in trains:
            raise ConfigError(f"{where}: no such data; allowed: {', '.join(trains)}")
        if phase.data in ("byte_lm", "entropy") and getattr(self, phase.data) is None:
            raise ConfigError(f"{where} needs the section {phase.data}")
        # Weight decay and moments would move parts that the phase's loss does not reach.
        mine = trains[phase.data]
        moved = set(phase.train or mine) - set(phase.freeze)
        if not phase.train:
            raise ConfigError(f"{where}: name what it trains, train: [{', '.join(mine)}]")
        extra = sorted(moved - set(mine))
        if extra:
            raise ConfigError(
                f"{where} gives {', '.join(extra)} no gradient; it can train {', '.join(mine)}"
            )
        held = [n for n in mine if n.startswith("compressor") and n not in moved]
        if held:
            raise ConfigError(
                f"{where} moves the codebooks under a held {held[0]}: use data=top, or train it"
            )
