"""Everything a language-model run can be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from latent_jax.backbones.config import DecoderConfig
from latent_jax.core.config import field
from latent_jax.core.errors import ConfigError
from latent_jax.train.config import RunBase
from latent_jax.train.curriculum import ScheduleConfig

KINDS = ("text", "lookup", "copy")


@dataclass(frozen=True)
class TokenizerConfig:
    """Byte-level BPE, trained on the run's own mixture, or plain bytes."""

    kind: Literal["bpe", "bytes"] = field(default="bpe", help="trained subwords, or bytes")
    vocab_size: int = field(default=1024, ge=300, help="tokens of the BPE, bytes included")
    digits: bool = field(
        default=False, help="every digit is a token of its own, as Qwen's and Gemma's are"
    )
    path: str | None = field(
        default=None, help="directory with a tokenizer.json to use instead of training one"
    )


@dataclass(frozen=True)
class LMModelConfig:
    """Shape of a decoder with tied embeddings."""

    family: Literal["llama", "qwen3"] = field(
        default="llama", help="architecture; qwen3 normalises queries and keys"
    )

    hidden_size: int = field(default=128, ge=8, help="width")
    num_layers: int = field(default=4, ge=1, help="layers")
    num_heads: int = field(default=4, ge=1, help="query heads")
    num_kv_heads: int = field(default=2, ge=1, help="key/value heads")
    head_dim: int = field(default=32, ge=2, help="width of a head")
    intermediate_size: int = field(default=352, ge=8, help="width of the gated MLP")
    max_position: int = field(default=512, ge=16, help="longest context, tokens")
    rope_theta: float = field(default=10_000.0, gt=0, help="base of the rotary frequencies")
    start: Literal["plain", "induction"] = field(
        default="plain",
        help="initialisation; induction outlines induction heads in the first two layers",
    )

    def validate(self) -> None:
        """Refuses heads that cannot be grouped or rotated."""
        if self.num_heads % self.num_kv_heads or self.head_dim % 2:
            raise ConfigError(
                f"model: num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}, "
                f"and head_dim={self.head_dim} must be even"
            )
        shape = (self.num_heads, self.num_kv_heads)
        if self.start == "induction" and (shape not in ((4, 2), (6, 3)) or self.num_layers < 2):
            raise ConfigError(
                "model.start=induction needs num_heads=4 with num_kv_heads=2, or 6 with 3, and at "
                "least 2 layers"
            )

    def decoder(self, vocab_size: int) -> DecoderConfig:
        """The decoder's own config."""
        return DecoderConfig(
            family=self.family,
            vocab_size=vocab_size,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            intermediate_size=self.intermediate_size,
            max_position=self.max_position,
            rope_theta=self.rope_theta,
            tie_embeddings=True,
            **({"qk_norm": True, "norm_eps": 1e-6} if self.family == "qwen3" else {}),
        )


def _check_template(where: str, template: str) -> None:
    missing = [f for f in ("{context}", "{question}", "{answer}") if f not in template]
    if missing:
        raise ConfigError(f"{where}: {template!r} lacks {', '.join(missing)}")


@dataclass(frozen=True)
class StageConfig:
    """One stage's training rows; a phase of the trainer names it by ``data``."""

    rows: int = field(default=8000, ge=1, help="packed rows drawn; they are shuffled each epoch")
    length: int = field(default=128, ge=16, help="tokens of a row")
    mix: dict[str, float] = field(
        default_factory=lambda: {"text": 1.0},
        help="share of tokens per kind of document: text, lookup, copy",
    )
    pairs: tuple[int, int] = field(default=(4, 8), help="fewest and most facts of a lookup")
    questions: int = field(default=3, ge=1, help="solved questions per lookup")
    templates: tuple[str, ...] = field(
        default=(), help="layouts of lookups, drawn evenly; empty: data.template"
    )
    copy: tuple[int, int] = field(default=(4, 32), help="shortest and longest copied text, tokens")
    noise: float = field(
        default=0.5, ge=0, le=1, help="share of copies that repeat random tokens instead of text"
    )
    facts: float = field(
        default=0.0, ge=0, le=1, help="share of copies that repeat the facts of a lookup"
    )

    def validate(self) -> None:
        """Refuses unknown kinds of documents and impossible sizes."""
        unknown = sorted(set(self.mix) - set(KINDS))
        if unknown:
            raise ConfigError(f"mix: unknown kind {unknown}; allowed: {', '.join(KINDS)}")
        if any(v < 0 for v in self.mix.values()) or sum(self.mix.values()) <= 0:
            raise ConfigError(f"mix={self.mix}: shares must be >= 0 and not all 0")
        if self.noise + self.facts > 1:
            raise ConfigError(f"noise={self.noise} and facts={self.facts} add up to more than 1")
        for template in self.templates:
            _check_template("templates", template)
        if not 1 <= self.copy[0] <= self.copy[1] <= (self.length - 2) // 2:
            raise ConfigError(
                f"copy={self.copy}: a text and its copy must fit a row of length={self.length}"
            )


@dataclass(frozen=True)
class LMDataConfig:
    """Documents of the mixture."""

    root: str | None = field(default=None, help="data folder; default: env LATENT_JAX_DATA")
    text: str = field(default="pydoc", help="running text: a source or a path")
    values: Literal["number", "word"] = field(default="number", help="what lookups answer with")
    template: str = field(
        default="{context}\nQuestion: {question}\nAnswer: {answer}\n", help="layout of a lookup"
    )
    stages: dict[str, StageConfig] = field(
        default_factory=lambda: {"main": StageConfig()}, help="training rows by stage"
    )

    def validate(self) -> None:
        """Refuses a layout whose answers cannot be found again."""
        _check_template("data.template", self.template)
        if not self.template.endswith("{answer}\n"):
            raise ConfigError("data.template must end with the answer and a newline")


@dataclass(frozen=True)
class LMLossConfig:
    """Weights of the loss terms, each a number or a schedule of the step (nats/token)."""

    text: float | ScheduleConfig = field(default=1.0, help="every token of running text")
    lookup: float | ScheduleConfig = field(default=1.0, help="answers of lookups and their stop")
    copy: float | ScheduleConfig = field(default=1.0, help="the second copy of a text")


@dataclass(frozen=True)
class LMEvalConfig:
    """What is measured."""

    rows: int = field(default=64, ge=1, help="held-out windows of text")
    questions: int = field(default=200, ge=1, help="held-out lookups, answered greedily")
    copies: int = field(default=64, ge=1, help="held-out texts copied greedily")
    copy_length: int = field(default=24, ge=1, help="their length, tokens")
    pairs: tuple[int, int] = field(default=(4, 8), help="facts of a held-out lookup")
    batch_size: int = field(default=50, ge=1, help="rows at once")
    quick: int = field(default=64, ge=1, help="rows of the evaluation while training")


@dataclass(frozen=True)
class LMRun(RunBase):
    """A language-model run."""

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig, help="text to ids")
    model: LMModelConfig = field(default_factory=LMModelConfig, help="architecture")
    data: LMDataConfig = field(default_factory=LMDataConfig, help="training and held-out data")
    losses: LMLossConfig = field(default_factory=LMLossConfig, help="loss weights")
    eval: LMEvalConfig = field(default_factory=LMEvalConfig, help="evaluation")

    def validate(self) -> None:
        """Refuses phases without a stage and rows beyond the context window."""
        for name in {p.data for p in self.train.phases} or {"main"}:
            if name not in self.data.stages:
                raise ConfigError(
                    f"data.stages has no {name!r}, which training reads; "
                    f"there are: {', '.join(self.data.stages)}"
                )
        for name, stage in self.data.stages.items():
            if stage.length > self.model.max_position:
                raise ConfigError(
                    f"data.stages.{name}.length={stage.length} is beyond "
                    f"model.max_position={self.model.max_position}"
                )
