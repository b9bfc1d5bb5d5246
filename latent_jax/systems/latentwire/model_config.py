"""The shape of a compressor: its encoder, its readers, and how they go together."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from latent_jax.backbones.config import PROJECTIONS
from latent_jax.core.config import field
from latent_jax.core.errors import ConfigError
from latent_jax.systems.latentwire.adapter_config import (
    AdapterConfig,
    ReaderLoraConfig,
    WireConfig,
)
from latent_jax.systems.latentwire.prompts import PromptConfig

#: The reader that is also the encoder's body.
MAIN = "main"
#: Slots that sum up one vector per token.
VECTORS = ("states", "embedded", "bytes")
#: Slots that leave vectors, not keys and values.
OF_VECTORS = (*VECTORS, "anchor")


@dataclass(frozen=True)
class EncoderConfig:
    """The frozen LLM's own layers, read at one slot per span of text."""

    slots: Literal[
        "memory", "pooled", "both", "heads", "states", "embedded", "bytes", "anchor"
    ] = field(
        default="memory",
        help="memory: a slot is a position of its own that runs through the LLM; pooled: a learned "
        "linear combination of its span's keys and values; both: their (gated) sum; heads: the "
        "text's own keys and values, of which every head keeps as many as it needs; states, "
        "embedded, bytes: the LLM's last states, its input embeddings, or what a small transformer "
        "makes of the text's UTF-8 bytes, summed up by pooler; anchor: one vector for the segment, "
        "made of its embeddings beside the mean of the LLM's last states, expanded to all slots",
    )
    places: int | None = field(
        default=None, ge=1, help="heads: most entries of one head in a segment; the reader has "
        "room for so many in every head, most of them hidden. none: as many as there are tokens",
    )  # fmt: skip
    layers: int = field(
        default=0, ge=0, help="how many of the LLM's layers encode, the first ones; 0: all"
    )
    carry: int = field(
        default=0, ge=0, help="a segment is read behind the latents of so many before it; 0: every "
        "segment is compressed alone",
    )  # fmt: skip
    backbone: str | None = field(
        default=None, help="a frozen LLM other than the reader whose last states are taken, as a "
        "sentence encoder's (slots=states, or the semantic anchor of slots=anchor), by a name as "
        "of model.readers; none: the reader",
    )  # fmt: skip
    pieces: int = field(
        default=8, ge=1, help="most of its tokens for one of the reader's; what is longer is cut"
    )
    pooler: Literal["mean", "attention", "queries", "hierarchical", "convolution"] = field(
        default="mean",
        help="vectors of tokens to slots, each at first the mean of its span: mean (nothing is "
        "trained); attention: within the span; queries: one per slot, over the whole segment, "
        "gated; hierarchical: by the prime factors of the ratio; convolution: beyond the span",
    )
    byte_layers: int = field(default=2, ge=1, help="layers of the transformer over bytes")
    anchor_width: int = field(default=512, ge=2, help="of that one vector (slots=anchor); even")
    anchor_layers: int = field(default=2, ge=1, help="of the transformer that makes it")
    refiner: int = field(
        default=0, ge=0, help="transformer layers over the latents of a segment; 0: none"
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
    train: Literal["lora", "full"] = field(
        default="lora", help="what of the layers is trained: deltas of rank lora_rank, or all of "
        "their weights, apart from the reader's, which stay as they are (lora_* then count for "
        "nothing but lora_on)",
    )  # fmt: skip
    lora_rank: int = field(default=64, ge=0, help="rank of the trainable deltas; 0 trains no delta")
    lora_alpha: float = field(default=64.0, gt=0, help="deltas are scaled by alpha / rank")
    lora_targets: tuple[str, ...] = field(
        default=("q", "k", "v"), help=f"adapted projections, of {', '.join(PROJECTIONS)}"
    )
    lora_on: Literal["memory", "all"] = field(
        default="memory",
        help="memory: text runs through the untouched LLM and only slots are adapted (cheaper: no "
        "backward pass over the text); all: text positions are adapted as well; of train=full too",
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
        if self.slots in OF_VECTORS and self.output != "hidden":
            raise ConfigError(
                f"encoder.slots={self.slots} makes vectors, not keys and values: it needs "
                "encoder.output=hidden"
            )
        if self.slots not in ("memory", *OF_VECTORS) and self.output != "kv":
            raise ConfigError(
                f"encoder.slots={self.slots} is made of keys and values: it needs encoder.output=kv"
            )
        if self.lora_on == "all" and self.slots not in ("memory", "states"):
            raise ConfigError(
                f"encoder.slots={self.slots} is made of the untouched LLM: it needs "
                "encoder.lora_on=memory"
            )
        if self.lora_on == "all" and self.view == "span" and self.slots == "memory":
            raise ConfigError(
                "encoder.lora_on=all runs text and slots as one: set encoder.view=text"
            )
        if self.whole and not self.runs:
            raise ConfigError(
                f"encoder.train=full: no trained pass through the LLM's layers makes "
                f"encoder.slots={self.slots}: use memory or both, or states with lora_on=all"
            )
        if self.places is not None and self.slots != "heads":
            raise ConfigError(
                f"encoder.places={self.places} is of encoder.slots=heads: leave it out"
            )
        own = ("heads", "embedded", "bytes")
        for name in (n for n in ("layers", "carry") if getattr(self, n) and self.slots in own):
            why = {"layers": "keeps entries of all layers", "carry": "packs segments one by one"}
            raise ConfigError(
                f"encoder.{name}={getattr(self, name)}: encoder.slots={self.slots} "
                f"{why[name] if self.slots == 'heads' else 'runs no layer of the LLM'}; set it to 0"
            )
        if self.backbone is not None:
            self._check_separate()
        if self.anchor_width % 2:
            raise ConfigError(f"encoder.anchor_width={self.anchor_width}: use an even number")
        if self.pooler != "mean" and not self.vectors:
            raise ConfigError(
                f"encoder.pooler={self.pooler} is of encoder.slots={', '.join(VECTORS)}; pooled "
                "and both sum up keys and values, see encoder.pool_start"
            )

    def _check_separate(self) -> None:
        who = f"encoder.backbone={self.backbone}"
        if not self.backbone:
            raise ConfigError("encoder.backbone is empty: name an LLM, or none for the reader")
        if self.slots not in ("states", "anchor"):
            raise ConfigError(
                f"{who} is of encoder.slots=states or anchor: {self.slots} is made of the reader's "
                "own layers, embeddings or tokens"
            )
        if self.lora_on == "all" or self.carry:
            raise ConfigError(
                f"{who} is frozen and reads segments alone: it needs encoder.lora_on=memory and "
                "encoder.carry=0"
            )

    @property
    def remembers(self) -> bool:
        """Whether slots run through the LLM."""
        return self.slots in ("memory", "both")

    @property
    def vectors(self) -> bool:
        """Whether slots sum up one vector per token."""
        return self.slots in VECTORS

    @property
    def runs(self) -> bool:
        """Whether slots come of a pass through the LLM's layers in which these may be others."""
        return self.remembers or (self.slots == "states" and self.lora_on == "all")

    @property
    def adapts(self) -> bool:
        """Whether the LLM's layers have trained deltas."""
        return self.runs and self.train == "lora" and self.lora_rank > 0

    @property
    def whole(self) -> bool:
        """Whether the LLM's layers are trained as a whole."""
        return self.train == "full"

    @property
    def pools(self) -> bool:
        """Whether slots are sums over their span."""
        return self.slots in ("pooled", "both")


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
    positions: Literal["span", "ordinal"] = field(
        default="span", help="where it finds a latent, see adapter.positions; ordinal: whatever "
        "its own tokens are",
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
    reader_lora: ReaderLoraConfig = field(
        default_factory=ReaderLoraConfig, help="deltas of the main reader behind latents"
    )
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
    follow: Literal["segment", "text"] = field(
        default="segment",
        help="where a prompt's positions begin: after the last segment, so that a token is always "
        "as far from the latent that holds it, or after the text",
    )
    gist_layers: int = field(
        default=0, ge=0, help="layers of a head that fills in a text's masked tokens from its "
        "latents, for losses.gist alone; 0: none",
    )  # fmt: skip
    remat: bool = field(default=False, help="recompute activations in the backward pass")
    start: str | None = field(
        default=None,
        help="packaged compressor, its directory, or a run whose weights to start from",
    )

    def validate(self) -> None:
        """Refuses combinations that cannot be wired together."""
        other = (self.encoder.output == "kv") != (self.adapter.kind == "kv")
        if self.wire.d_z is None and other and self.adapter.linear:
            raise ConfigError(
                f"model.wire.d_z=none passes encoder.output={self.encoder.output} straight to "
                f"adapter.kind={self.adapter.kind}: set wire.d_z, or use kv with "
                "kv, hidden with soft"
            )
        if self.encoder.carry and self.adapter.kind == "cross":
            raise ConfigError("encoder.carry reads latents as a prefix: adapter.kind=cross is none")
        if self.encoder.layers and self.encoder.output == "kv" and self.wire.d_z is None:
            raise ConfigError(
                f"encoder.layers={self.encoder.layers} leaves keys and values of so many layers, "
                "and the reader wants them of all: set wire.d_z"
            )
        separate = self.encoder.backbone is not None
        if separate and self.encoder.slots == "states" and self.wire.d_z is None:
            raise ConfigError(
                f"encoder.backbone={self.encoder.backbone} has states of its own width: set "
                "wire.d_z"
            )
        if separate and self.encoder.slots == "states" and self.wire.fit == "vocabulary":
            raise ConfigError(
                "wire.fit=vocabulary has directions of the reader's embeddings, and "
                f"encoder.backbone={self.encoder.backbone} has others: use data or random"
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
        places = self.encoder.places
        if places is not None and places * self.ratio < self.segment:
            raise ConfigError(
                f"encoder.places={places}: heads keep {self.segment / self.ratio:g} entries of a "
                "segment on average; allow at least so many"
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
        if self.adapter.positions == "ordinal" and (
            self.encoder.slots == "heads" or self.encoder.carry
        ):
            why = (
                "encoder.slots=heads keeps keys that are rotated to where their tokens stood"
                if self.encoder.slots == "heads"
                else "encoder.carry reads the next segment where its text stands, behind latents"
            )
            raise ConfigError(f"adapter.positions=ordinal: {why}; use span")
        if self.encoder.refiner and self.wire.d_z is None and self.encoder.output == "kv":
            raise ConfigError(
                "encoder.refiner works on latents of a width of their own: set wire.d_z, or "
                "encoder.output=hidden"
            )
        if self.encoder.refiner and (self.wire.d_z or 2) % 2:
            raise ConfigError(f"encoder.refiner needs an even wire.d_z, not {self.wire.d_z}")
        if (self.adapter.onto_soft or self.adapter.task_rank) and self.wire.d_z is None:
            name = "onto_soft" if self.adapter.onto_soft else "task_rank"
            raise ConfigError(f"adapter.{name} needs a map of its own: set wire.d_z")
        if self.gist_layers and self.encoder.slots == "heads":
            raise ConfigError("model.gist_layers: encoder.slots=heads has no latents to train")
        if self.adapter.entries > 1 and self.wire.d_z is None:
            raise ConfigError("adapter.entries > 1 needs a map of its own: set wire.d_z")
        if self.wire.fit == "vocabulary" and not (
            self.wire.d_z and self.encoder.output == "hidden" and self.adapter.kind == "soft"
        ):
            raise ConfigError(
                "wire.fit=vocabulary needs wire.d_z, and vectors on both sides: "
                "encoder.output=hidden and adapter.kind=soft"
            )
        if self.encoder.slots == "heads" and not self.adapter.plain:
            raise ConfigError(
                "encoder.slots=heads is read as it is: adapter.residual must be none"
            )
        whole = self.ratio == int(self.ratio)
        if self.encoder.pooler == "hierarchical" and not whole:
            raise ConfigError(
                f"encoder.pooler=hierarchical divides the ratio: {self.ratio} is no whole number"
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
