"""Everything a spacing run can be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from latent_jax.core.config import field
from latent_jax.core.errors import ConfigError
from latent_jax.train.config import RunBase
from latent_jax.train.curriculum import ScheduleConfig

# What a slot can be asked to know of the window, see `auxiliary.targets`.
AUXILIARY = (
    "mean", "entropy", "max_step", "low_quantile", "curvature", "halves", "energy", "roughness",
)  # fmt: skip
# Gaps that those statistics are of.
AUXILIARY_SPAN = 64


def lengths(context: int) -> list[int]:
    """Lengths of the past that get a linear prediction: all, 3/4, 1/2, 3/8, ... down to 2 gaps."""
    found = [context]
    size = 1 << max(context.bit_length(), 1)
    while size >= 2:
        found += [n for n in (size * 3 // 4, size // 2) if 2 <= n < found[-1]]
        size //= 2
    return found


@dataclass(frozen=True)
class EmbedConfig:
    """What a position knows of the gaps up to it, before any attention."""

    near: int = field(default=16, ge=1, help="last gaps given as they are")
    kernels: int = field(
        default=48, ge=0, help="learned linear summaries of all past gaps in the window; 0: none"
    )
    knots: int = field(default=256, ge=4, help="spline coefficients of each summary's kernel")
    products: int = field(
        default=0,
        ge=0,
        help="second-order terms: kernels also weigh products of the displacements of zeros 0, 1, "
        "... products - 1 apart",
    )
    start: Literal["autoregression", "primes", "random"] = field(
        default="autoregression",
        help="kernels at the start: least-squares predictors of the next gap from pasts of several "
        "lengths, waves at the logarithms of prime powers, or noise",
    )
    ridge: float = field(
        default=1e-8, gt=0.0,
        help="of the least squares, relative to the variance of each regressor: more bends the "
        "kernels, less lets a short window's own predictions run away when they are read again",
    )
    height: bool = field(
        default=True, help="give ln(t / 2 pi), and measure distances with it; false: neither"
    )


@dataclass(frozen=True)
class PositionConfig:
    """The coordinate in which attention measures distance."""

    kind: Literal["index", "warped", "physical"] = field(
        default="warped",
        help="index: gaps; warped: mean physical distance 2 pi j / L; physical: distance itself",
    )
    frequencies: Literal["geometric", "primes"] = field(
        default="geometric", help="rotary planes at a geometric series, or at ln q of prime powers"
    )


@dataclass(frozen=True)
class MemoryConfig:
    """Slots, and what in them has an identity."""

    kind: Literal["none", "prefix", "postfix"] = field(
        default="none",
        help="prefix: slots before the data, which reads them; postfix: slots after the data, "
        "which does not see them, and the prediction reads nothing else",
    )
    slots: int = field(default=8, ge=0, help="number of slots")
    read: Literal["attention", "claims"] = field(
        default="attention",
        help="how postfix slots take in the past. attention: beside the data, in the blocks that "
        "attend, each by itself; claims: they compete for every gap, and a slot starts from the "
        "kernels' sums over its shares",
    )
    pool: Literal["weighted", "sum"] = field(
        default="weighted",
        help="read-out of postfix slots: a mean with learned weights, or a sum that tells none "
        "from another",
    )
    identity: Literal["fixed", "off", "permute_per_batch", "anonymous"] = field(
        default="fixed",
        help="fixed: a learned vector per slot; off: none, slots differ by content; "
        "permute_per_batch: the vectors change places every step; anonymous: no position, content "
        "or read-out weight knows which slot it is (contents are drawn per window)",
    )
    content: Literal["normal", "zeroed"] = field(
        default="normal", help="learned start of each slot, or zero (identity only)"
    )
    cuts: int = field(
        default=8, ge=1, help="places of a window from which postfix slots predict, per step"
    )
    dropout: float = field(default=0.0, ge=0, lt=1, help="share of slots hidden in training")
    norm_cap: float | None = field(default=None, gt=0, help="longest slot before the read-out")
    block_norm: bool = field(
        default=False, help="scale a window's slots together to unit mean square, in every layer"
    )
    assignment: Literal["mean", "diagonal"] = field(
        default="diagonal", help="auxiliary targets read all from the slots' mean, or one per slot"
    )

    def validate(self) -> None:
        """Refuses memory without slots, and options of the other kind."""
        if self.kind != "none" and self.slots < 1:
            raise ConfigError(f"model.memory.slots=0 with model.memory.kind={self.kind}")
        if self.identity == "off" and self.content == "zeroed" and self.kind != "none":
            raise ConfigError(
                "model.memory: identity=off with content=zeroed leaves slots that are all alike"
            )
        if self.identity == "anonymous" and self.kind == "prefix":
            raise ConfigError("model.memory.identity=anonymous needs model.memory.kind=postfix")
        for name, value, usual in (
            ("read", self.read, "attention"), ("pool", self.pool, "weighted"),
        ):  # fmt: skip
            if value != usual and self.kind != "postfix":
                raise ConfigError(f"model.memory.{name}={value} needs model.memory.kind=postfix")
        if self.read == "claims" and self.pool != "sum":
            raise ConfigError(
                "model.memory.read=claims needs model.memory.pool=sum: the past is the sum of what "
                "the slots hold of it"
            )
        if self.norm_cap is not None and self.kind == "prefix":
            raise ConfigError(
                f"model.memory.norm_cap={self.norm_cap} needs model.memory.kind=postfix: "
                "nothing is read out of a prefix"
            )


@dataclass(frozen=True)
class HeadConfig:
    """The predictive density."""

    components: int = field(default=8, ge=1, help="components of the mixture")
    family: Literal["gaussian", "truncated", "lognormal"] = field(
        default="gaussian", help="what each component is"
    )
    floor: float = field(default=0.005, gt=0, help="smallest scale, mean spacings")
    positive_mean: bool = field(default=False, help="locations pass a softplus")

    @property
    def plain(self) -> bool:
        """Whether locations are gaps themselves, so that a prediction can be added to them."""
        return self.family != "lognormal" and not self.positive_mean


@dataclass(frozen=True)
class SpacingModelConfig:
    """Embedding, transformer, memory, mixture."""

    layers: int = field(default=6, ge=0, help="transformer blocks; 0: a mixture on the embedding")
    attention_layers: int | None = field(
        default=None, ge=0, help="how many of the blocks, the last ones, attend; none: all"
    )
    heads: int = field(default=8, ge=1, help="attention heads")
    width: int = field(default=256, ge=2, help="residual stream")
    ff: int = field(default=1024, ge=1, help="hidden width of the MLPs")
    embed: EmbedConfig = field(default_factory=EmbedConfig, help="gaps to vectors")
    positions: PositionConfig = field(default_factory=PositionConfig, help="distances")
    memory: MemoryConfig = field(default_factory=MemoryConfig, help="slots")
    head: HeadConfig = field(default_factory=HeadConfig, help="vectors to densities")

    @property
    def attending(self) -> range:
        """The blocks that attend: the last ones, but before the read-out of claims."""
        count = self.layers if self.attention_layers is None else self.attention_layers
        if self.memory.read == "claims":
            return range(count)
        return range(self.layers - count, self.layers)

    @property
    def slot_width(self) -> int:
        """Entries of a slot: claims also carry shares of the linear prediction and its scale."""
        return self.width + (2 if self.memory.read == "claims" else 0)

    def validate(self) -> None:
        """Refuses heads that do not divide the width, or cannot be rotated."""
        if self.width % self.heads or self.width // self.heads % 2:
            raise ConfigError(
                f"model.heads={self.heads} must divide model.width={self.width} into even parts"
            )
        attending = self.layers if self.attention_layers is None else self.attention_layers
        if attending > self.layers:
            raise ConfigError(
                f"model.attention_layers={attending} is above model.layers={self.layers}"
            )
        if self.memory.read == "claims" and not self.embed.kernels:
            raise ConfigError(
                "model.memory.read=claims needs model.embed.kernels above 0: slots hold their sums"
            )
        if self.memory.kind != "none" and not attending:
            raise ConfigError(
                f"model.memory.kind={self.memory.kind} needs a block that attends: slots are read "
                "and written there"
            )


@dataclass(frozen=True)
class SpacingDataConfig:
    """Which gaps."""

    root: str | None = field(default=None, help="data folder; default: env LATENT_JAX_DATA")
    source: str = field(
        default="zeta",
        help="zeta (the table that `fetch zeros` gets), a file of zeros, or cue:…, gue:…, "
        "poisson:…, picket:…, ar:…",
    )
    window: int = field(default=256, ge=2, help="gaps in a window; the last is only predicted")
    train_window: int | None = field(
        default=None,
        ge=2,
        help="gaps in a training window, if longer: more targets see window - 1 gaps, none more",
    )
    split: Literal["tail", "interleaved"] = field(
        default="tail", help="hold out the greatest heights, or whole blocks of all heights"
    )
    held_out: float = field(default=0.1, gt=0, lt=1, help="share held out")
    calibration: float = field(
        default=0.0, ge=0, lt=0.5,
        help="share of each training stretch, its end, that is not trained on and that the "
        "density's calibration is fitted to; 0: none",
    )
    recent: int | None = field(
        default=None,
        ge=2,
        help="train on the last so many windows only, whose heights are nearest to a held-out tail",
    )

    def validate(self) -> None:
        """Refuses to choose the nearest heights where all heights are held out."""
        if self.recent is not None and self.split != "tail":
            raise ConfigError("data.recent needs data.split=tail")


@dataclass(frozen=True)
class SpacingLossConfig:
    """Weights of the loss terms, each a number or a schedule of the step."""

    nll: float | ScheduleConfig = field(default=1.0, help="all scored positions (nats)")
    last: float | ScheduleConfig = field(
        default=0.0, help="extra weight on pasts of at least 3/4 of the window (nats)"
    )
    entropy: float | ScheduleConfig = field(
        default=0.0, help="minus the entropy of the mixture weights: positive keeps them spread"
    )
    orthogonality: float | ScheduleConfig = field(
        default=0.0, help="mean squared cosine between the slots of a window"
    )
    auxiliary: float | ScheduleConfig = field(
        default=0.0, help="squared error of each auxiliary target (variance 1)"
    )


@dataclass(frozen=True)
class SpacingEvalConfig:
    """What is measured at the end."""

    windows: int = field(default=2000, ge=16, help="held-out windows, evenly spread")
    batch_size: int = field(default=64, ge=1, help="windows at once")
    calibration_targets: int = field(
        default=20000, ge=100,
        help="gaps that a calibration is fitted to, and held-out gaps that it is judged by",
    )
    rollouts: int = field(default=16, ge=0, help="sampled continuations; 0: none")
    horizon: int = field(default=200, ge=1, help="their length, gaps")
    floors: bool = field(default=True, help="exact floor of random-matrix spacings")
    baselines: bool = field(default=True, help="autoregressions on the same data")
    quick: int = field(default=128, ge=1, help="windows of the evaluation while training")


@dataclass(frozen=True)
class SpacingRun(RunBase):
    """A spacing run."""

    seeds: int = field(
        default=1, ge=1, help="models trained side by side, each with its own start and windows"
    )
    model: SpacingModelConfig = field(default_factory=SpacingModelConfig, help="architecture")
    data: SpacingDataConfig = field(default_factory=SpacingDataConfig, help="gaps")
    losses: SpacingLossConfig = field(default_factory=SpacingLossConfig, help="loss weights")
    eval: SpacingEvalConfig = field(default_factory=SpacingEvalConfig, help="final evaluation")
    clip_norm: float | None = field(
        default=1.0, gt=0,
        help="longest gradient of each seed (train.optimizer.clip_norm would mix them)",
    )

    def validate(self) -> None:
        """Refuses batches that the seeds cannot share, clipping across what it has to keep apart,
        losses on slots that are not there, and more gaps than a window has.
        """
        self._validate_batches()
        self._validate_slot_losses()
        if self.data.calibration and self.model.head.family != "gaussian":
            raise ConfigError(
                f"data.calibration={self.data.calibration} needs model.head.family=gaussian"
            )
        if self.model.memory.kind == "postfix" and self.model.memory.cuts >= self.data.window:
            raise ConfigError(
                f"model.memory.cuts={self.model.memory.cuts} needs a longer window than "
                f"data.window={self.data.window}"
            )
        longer = self.data.train_window
        if longer is not None and longer < self.data.window:
            raise ConfigError(
                f"data.train_window={longer} is below data.window={self.data.window}"
            )
        attends = self.model.attention_layers != 0 and self.model.layers > 0
        if longer is not None and longer > self.data.window and attends:
            raise ConfigError(
                f"data.train_window={longer} needs model.attention_layers=0: a block that attends "
                f"would see more than the {self.data.window - 1} gaps of an evaluation"
            )
        if self.model.embed.near >= self.data.window:
            raise ConfigError(
                f"model.embed.near={self.model.embed.near} gaps do not fit "
                f"data.window={self.data.window}"
            )

    def _validate_batches(self) -> None:
        t = self.train
        if t.batch_size // t.accumulate % self.seeds:
            parts = f"seeds={self.seeds} must divide train.batch_size={t.batch_size}"
            if t.accumulate > 1:
                parts += f" / train.accumulate={t.accumulate}"
            raise ConfigError(f"{parts}: each has its own windows")
        if self.seeds > 1 and t.optimizer.clip_norm is not None:
            raise ConfigError(
                f"train.optimizer.clip_norm={t.optimizer.clip_norm} with seeds={self.seeds} would "
                "clip them together: set it to null, clip_norm clips each by itself"
            )
        if t.accumulate > 1 and self.clip_norm is not None:
            hint = "" if self.seeds > 1 else " and use train.optimizer.clip_norm"
            raise ConfigError(
                f"clip_norm={self.clip_norm} with train.accumulate={t.accumulate} would clip every "
                f"micro-batch by itself: set clip_norm to null{hint}"
            )

    def _validate_slot_losses(self) -> None:
        for name in ("auxiliary", "orthogonality"):
            if self.model.memory.kind == "none" and getattr(self.losses, name) != 0:
                raise ConfigError(
                    f"losses.{name} is about slots: set it to 0, or model.memory.kind to prefix or "
                    "postfix"
                )
        if self.losses.auxiliary != 0 and self.data.window <= AUXILIARY_SPAN:
            raise ConfigError(
                f"losses.auxiliary is about {AUXILIARY_SPAN} gaps that the model has seen: "
                f"data.window={self.data.window} must be above that"
            )
