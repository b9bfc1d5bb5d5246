"""Everything a LatentWire run can be told."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from latent_jax.backbones.config import PROJECTIONS, BackboneConfig
from latent_jax.core.config import field
from latent_jax.core.errors import ConfigError
from latent_jax.ops.wire import FORMATS
from latent_jax.systems.latentwire.prompts import PromptConfig
from latent_jax.train.config import RunBase
from latent_jax.train.curriculum import ScheduleConfig

TASKS = ("reconstruct", "continue", "answer", "recall")
# Tasks that the reader can do from the text itself, and teach.
TAUGHT = ("answer", "recall")
#: The reader that is also the encoder's body.
MAIN = "main"
# What a phase's `data` may be: the mixture, or questions on raw texts (for the prompt).
PHASES = ("main", "prompt")


@dataclass(frozen=True)
class EncoderConfig:
    """The frozen LLM's own layers, read at one slot per span of text."""

    slots: Literal["memory", "pooled", "both", "heads"] = field(
        default="memory",
        help="memory: a slot is a position of its own that runs through the LLM; pooled: a learned "
        "linear combination of its span's keys and values; both: their (gated) sum; heads: the "
        "text's own keys and values, of which every head keeps as many as it needs",
    )
    pool_start: Literal["mean", "stagger"] = field(
        default="mean", help="pooled slots start as the mean of their span, or with each head of "
        "each layer keeping one token of it as it is",
    )  # fmt: skip
    output: Literal["kv", "hidden"] = field(
        default="kv", help="what a slot leaves: per-layer keys and values, or its last hidden state"
    )
    view: Literal["text", "span"] = field(
        default="span",
        help="what a memory slot sees: the whole text and the other slots, or only the tokens of "
        "its own span (they have read what comes before them), which serves any text length alike",
    )
    lora_rank: int = field(default=64, ge=0, help="rank of the trainable deltas; 0 trains no delta")
    lora_alpha: float = field(default=64.0, gt=0, help="deltas are scaled by alpha / rank")
    lora_targets: tuple[str, ...] = field(
        default=("q", "k", "v"), help=f"adapted projections, of {', '.join(PROJECTIONS)}"
    )
    lora_on: Literal["memory", "all"] = field(
        default="memory",
        help="memory: text runs through the untouched LLM and only slots are adapted (cheaper: no "
        "backward pass over the text); all: text positions are adapted as well",
    )
    causal: bool = field(
        default=True, help="text attends causally; false needs lora_on=all (the LLM is causal)"
    )
    span_mean: float = field(
        default=1.0, ge=0, help="weight of the span's mean embedding in a slot's input"
    )

    def validate(self) -> None:
        """Refuses projections that do not exist and adapted text that is not adapted."""
        unknown = [t for t in self.lora_targets if t not in PROJECTIONS]
        if unknown:
            raise ConfigError(f"encoder.lora_targets: unknown {unknown}; allowed: {PROJECTIONS}")
        if not self.causal and self.lora_on == "memory":
            raise ConfigError("encoder.causal=false needs encoder.lora_on=all")
        if self.slots != "memory" and self.output != "kv":
            raise ConfigError(
                f"encoder.slots={self.slots} is made of keys and values: it needs encoder.output=kv"
            )
        if self.lora_on == "all" and self.slots != "memory":
            raise ConfigError(
                f"encoder.slots={self.slots} is made of the untouched LLM's cache: it needs "
                "encoder.lora_on=memory"
            )
        if self.lora_on == "all" and self.view == "span":
            raise ConfigError(
                "encoder.lora_on=all runs text and slots as one: set encoder.view=text"
            )


    @property
    def remembers(self) -> bool:
        """Whether slots run through the LLM."""
        return self.slots in ("memory", "both")

    @property
    def pools(self) -> bool:
        """Whether slots are sums over their span."""
        return self.slots in ("pooled", "both")


@dataclass(frozen=True)
class WireConfig:
    """What travels."""

    d_z: int | None = field(
        default=None, ge=1, help="width of a latent; none sends the encoder's output as it is"
    )


@dataclass(frozen=True)
class AdapterConfig:
    """How the reader receives it."""

    kind: Literal["kv", "soft"] = field(
        default="kv", help="deep prefix of keys and values, or soft tokens before the prompt"
    )


@dataclass(frozen=True)
class ReaderConfig:
    """Another frozen LLM that reads the same wire through an adapter of its own."""

    name: str = field(
        help="smollm2, gemma3, tiny, tiny_qwen3, a directory, a .gguf or .bin file ($VARIABLES are "
        "filled in), or a hub id"
    )
    kind: Literal["kv", "soft"] = field(
        default="kv", help="deep prefix of keys and values, or soft tokens before the prompt"
    )
    hidden: int = field(
        default=0, ge=0, help="width of the adapter's residual layer; 0: it is linear"
    )
    entries: int = field(
        default=1, ge=1, help="entries of its cache (or soft tokens) that it makes of one latent: "
        "its own tokens are others, and a head that looks a token up wants one of its own",
    )  # fmt: skip
    private: int = field(
        default=0, ge=0, help="latents per segment that only this reader is given"
    )
    tokens: float = field(
        default=2.0, gt=0, help="room for its own tokens, per token of the encoder's"
    )
    prompt: PromptConfig | None = field(
        default=None, help="how questions are put to it; none: as to the main reader"
    )


@dataclass(frozen=True)
class ModelConfig:
    """Encoder, wire and adapter."""

    ratio: float = field(default=4.0, ge=1, help="text tokens per latent")
    segment: int = field(default=64, ge=1, help="longest text compressed at once, tokens")
    encoder: EncoderConfig = field(default_factory=EncoderConfig, help="text to slots")
    wire: WireConfig = field(default_factory=WireConfig, help="slots to latents")
    adapter: AdapterConfig = field(default_factory=AdapterConfig, help="latents to reader")
    sink: bool = field(
        default=True,
        help="BOS (else EOS) before the encoder's text and before all that the reader is shown",
    )
    prompt_tokens: int = field(
        default=0, ge=0,
        help="learned soft tokens between a text, or its latents, and a question about it; 0: the "
        "one vector that names the task",
    )  # fmt: skip
    rebuild_entries: int = field(
        default=0, ge=0, help="learned keys and values, in every layer, between a text's latents "
        "and its reconstruction (encoder.slots=heads); 0: the one vector that names the task",
    )  # fmt: skip
    private: int = field(
        default=0, ge=0, help="latents per segment that only the main reader is given"
    )
    readers: dict[str, ReaderConfig] = field(
        default_factory=dict, help="further readers of the same wire, by a short name"
    )
    remat: bool = field(default=False, help="recompute activations in the backward pass")
    start: str | None = field(
        default=None,
        help="packaged compressor, its directory, or a run whose weights to start from",
    )

    def validate(self) -> None:
        """Refuses combinations that cannot be wired together."""
        if self.wire.d_z is None and (self.encoder.output == "kv") != (self.adapter.kind == "kv"):
            raise ConfigError(
                f"model.wire.d_z=none passes encoder.output={self.encoder.output} straight to "
                f"adapter.kind={self.adapter.kind}: set wire.d_z, or use kv with "
                "kv, hidden with soft"
            )
        if self.ratio > self.segment:
            raise ConfigError(
                f"model.ratio={self.ratio} leaves less than one latent per "
                f"model.segment={self.segment}"
            )
        for label in self.readers:
            if label == MAIN or not re.fullmatch(r"[a-z][a-z0-9_]*", label):
                raise ConfigError(
                    f"model.readers: {label!r} is no short name: small letters, digits and _, and "
                    f"not {MAIN}, which is the encoder's own"
                )
        if self.encoder.slots == "heads" and (self.wire.d_z or self.adapter.kind != "kv"):
            raise ConfigError(
                "encoder.slots=heads sends keys and values of single heads as they are: it needs "
                "wire.d_z=none and adapter.kind=kv"
            )
        if self.rebuild_entries and self.encoder.slots != "heads":
            raise ConfigError(
                "model.rebuild_entries are learned in units of what encoder.slots=heads measures: "
                f"with encoder.slots={self.encoder.slots}, set it to 0"
            )
        if self.encoder.slots == "heads" and self.readers:
            raise ConfigError(
                "encoder.slots=heads keeps entries of its own LLM's heads, which no adapter of "
                "model.readers could read: use pooled, memory or both"
            )
        unable = not self.encoder.remembers or self.encoder.lora_on == "all"
        if unable and (found := [n for n, p in self.private_slots.items() if p]):
            raise ConfigError(
                f"model: private latents ({', '.join(found)}) are memory slots over the whole "
                "segment: they need encoder.slots=memory or both, with encoder.lora_on=memory"
            )

    def __hash__(self) -> int:
        # A dict has none, and modules that hold this are static in what is compiled.
        return hash((*self.readers.items(), *(v for k, v in vars(self).items() if k != "readers")))

    @property
    def private_slots(self) -> dict[str, int]:
        """Private latents per segment of each reader, in the order in which they are sent."""
        return {MAIN: self.private, **{name: r.private for name, r in self.readers.items()}}


@dataclass(frozen=True)
class DataConfig:
    """What is compressed and asked."""

    root: str | None = field(default=None, help="data folder; default: env LATENT_JAX_DATA")
    text: str = field(
        default="auto",
        help="text to rebuild and continue: a source or a path, or several in equal shares, "
        "novels+pydoc",
    )
    qa: str = field(default="auto", help="questions: a SQuAD-format source or path")
    segments: int = field(default=20_000, ge=1, help="most training segments to draw")
    length: int = field(default=64, ge=1, help="longest training text, tokens")
    lengths: tuple[int, ...] = field(
        default=(),
        help="training text lengths, one per batch, with as many rows as make train.batch_size x "
        "length tokens; none: length",
    )
    ragged: float = field(
        default=0.0, ge=0, le=1, help="share of training texts that end inside a latent's span"
    )
    continuation: int = field(default=32, ge=1, help="tokens to continue with")
    recall: int = field(
        default=128, ge=2, help="text length of the task recall: given a few of the text's words, "
        "from anywhere in it, the reader goes on",
    )  # fmt: skip
    cue: int = field(default=6, ge=1, help="how many tokens those are, at most")
    max_context: int = field(default=256, ge=1, help="longest passage of a question, tokens")
    max_prompt: int = field(default=64, ge=1, help="longest question with its answer, tokens")
    max_answer: int = field(
        default=24, ge=2, help="longest answer in training, tokens with the stop"
    )
    questions: int = field(default=20_000, ge=1, help="most training questions")
    calibration: int = field(
        default=64, ge=1, help="training texts that tell how much each head needs (slots: heads)"
    )
    mix: dict[str, float] = field(
        default_factory=lambda: {"reconstruct": 1.0},
        help=f"share of batches per task: {', '.join(TASKS)}",
    )
    read_by: tuple[str, ...] = field(
        default=(), help=f"readers that are trained: {MAIN}, names of model.readers; none: all"
    )
    turns: Literal["summed", "alternating"] = field(
        default="summed", help="every batch is read by all of them, or each by one in turn"
    )

    def validate(self) -> None:
        """Refuses unknown tasks, an empty mixture and impossible lengths."""
        unknown = sorted(set(self.mix) - set(TASKS))
        if unknown:
            raise ConfigError(f"data.mix: unknown task {unknown}; allowed: {', '.join(TASKS)}")
        if any(v < 0 for v in self.mix.values()) or sum(self.mix.values()) <= 0:
            raise ConfigError(f"data.mix={self.mix}: shares must be >= 0 and not all 0")
        if self.cue + self.continuation > self.recall and self.mix.get("recall"):
            raise ConfigError(
                f"data.recall={self.recall} tokens cannot hold data.cue={self.cue} and "
                f"data.continuation={self.continuation}"
            )
        wrong = [n for n in self.lengths if n < 1 or self.length % n]
        if wrong:
            raise ConfigError(f"data.lengths: {wrong} do not divide data.length={self.length}")


@dataclass(frozen=True)
class LossConfig:
    """Weights of the loss terms, each a number or a schedule of the step."""

    reconstruct: float | ScheduleConfig = field(default=1.0, help="rebuild the text (nats/token)")
    recall: float | ScheduleConfig = field(default=1.0, help="go on from a cue (nats/token)")
    proceed: float | ScheduleConfig = field(default=1.0, help="continue the text (nats/token)")
    answer: float | ScheduleConfig = field(default=1.0, help="answer tokens and stop (nats/token)")
    first_token: float | ScheduleConfig = field(
        default=0.0, help="extra weight on the first supervised token of each example"
    )
    distil_logits: float | ScheduleConfig = field(
        default=0.0, help="KL from the reader on the text to the reader on its latents, nats per "
        "token of an answer or of recalled text",
    )  # fmt: skip
    distil_states: float | ScheduleConfig = field(
        default=0.0, help="share of the variance of the reader's keys and values, in every layer, "
        "on question and answer or on recalled text, that its latents leave unexplained",
    )  # fmt: skip
    corrupt: float = field(
        default=0.0, ge=0, lt=1, help="share of teacher-forced reconstruction inputs randomised"
    )
    chunk: int | None = field(
        default=None, ge=1, help="tokens whose logits exist at once; none: all"
    )

    @property
    def distils(self) -> bool:
        """Whether the reader on the text itself is a teacher."""
        return any(w != 0 for w in (self.distil_logits, self.distil_states))


@dataclass(frozen=True)
class EvalConfig:
    """What is measured at the end."""

    segments: int = field(default=200, ge=0, help="held-out segments rebuilt greedily; 0: none")
    length: int | None = field(default=None, ge=1, help="their length; none: data.length")
    text: str | None = field(default=None, help="held-out text source; none: data.text")
    continuations: int = field(
        default=0, ge=0, help="held-out texts whose next data.continuation tokens are scored; 0: "
        "none",
    )  # fmt: skip
    questions: int = field(default=0, ge=0, help="held-out questions; 0: none")
    arms: tuple[str, ...] = field(
        default=("latent", "full_text", "no_context", "token_budget_head", "shuffled", "zero"),
        help="what the reader is given in place of the text",
    )
    tuned: tuple[str, ...] = field(
        default=(), help="text arms that also get a trained soft prompt, e.g. full_text"
    )
    tuned_steps: int | None = field(
        default=None, ge=1, help="steps of a soft prompt; none: as many as answer batches seen"
    )
    tuned_tokens: int = field(default=16, ge=1, help="soft tokens of a tuned arm")
    max_new_tokens: int = field(default=16, ge=1, help="longest answer, tokens")
    batch_size: int = field(default=16, ge=1, help="rows at once")
    quick_segments: int = field(default=32, ge=0, help="segments of the evaluation while training")
    cramming_steps: int = field(
        default=200, ge=1, help="steps of the arm cramming, for questions and segments alike"
    )
    wire_bits: tuple[str, ...] = field(
        default=(), help=f"number formats the latents are also sent in, of {', '.join(FORMATS)}"
    )

    def validate(self) -> None:
        """Refuses unknown number formats."""
        unknown = [form for form in self.wire_bits if form not in FORMATS]
        if unknown:
            raise ConfigError(f"eval.wire_bits: unknown {unknown}; allowed: {', '.join(FORMATS)}")


@dataclass(frozen=True)
class LatentWireRun(RunBase):
    """A LatentWire run."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig, help="frozen LLM")
    model: ModelConfig = field(default_factory=ModelConfig, help="what is trained")
    data: DataConfig = field(default_factory=DataConfig, help="training and held-out data")
    prompt: PromptConfig = field(default_factory=PromptConfig, help="how questions are put")
    losses: LossConfig = field(default_factory=LossConfig, help="loss weights")
    eval: EvalConfig = field(default_factory=EvalConfig, help="final evaluation")

    def validate(self) -> None:
        """Refuses losses without data and texts that do not fit the segments."""
        for phase in self.train.phases:
            if phase.data not in PHASES:
                raise ConfigError(
                    f"train.phases {phase.name!r}: data={phase.data!r}; allowed: "
                    f"{', '.join(PHASES)}"
                )
            if phase.data == "prompt" and not self.model.prompt_tokens:
                raise ConfigError(
                    f"train.phases {phase.name!r}: data=prompt needs model.prompt_tokens"
                )
        if self.losses.distils and not any(map(self.data.mix.get, TAUGHT)):
            raise ConfigError(
                f"losses.distil_*: give data.mix a share of {' or '.join(TAUGHT)}, in which the "
                "reader on the text teaches"
            )
        if unknown := sorted(set(self.data.read_by) - {MAIN, *self.model.readers}):
            raise ConfigError(
                f"data.read_by: no reader {', '.join(unknown)}; there are: "
                f"{', '.join([MAIN, *self.model.readers])}"
            )
        if self.losses.distils and MAIN not in self.read_by:
            raise ConfigError(
                f"losses.distil_*: only the main reader is a teacher: put {MAIN} into data.read_by"
            )
        segment = self.model.segment
        for name in ("length", "max_context", "recall"):
            value = getattr(self.data, name)
            if name == "recall" and not self.data.mix.get("recall"):
                continue
            if value > segment and value % segment:
                raise ConfigError(
                    f"data.{name}={value} is not a multiple of model.segment={segment}"
                )
        shortest = min((self.data.length, *self.data.lengths))
        if self.model.ratio > shortest:
            raise ConfigError(
                f"model.ratio={self.model.ratio} is above the shortest text, {shortest} tokens: "
                "it would be shorter than the span of one latent"
            )

    @property
    def read_by(self) -> tuple[str, ...]:
        """The readers that are trained, the main one first."""
        return tuple(
            name for name in (MAIN, *self.model.readers)
            if not self.data.read_by or name in self.data.read_by
        )  # fmt: skip
