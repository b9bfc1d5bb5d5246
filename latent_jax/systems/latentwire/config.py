"""Everything a LatentWire run can be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from latent_jax.backbones.config import BackboneConfig
from latent_jax.core.config import field
from latent_jax.core.errors import ConfigError
from latent_jax.ops.wire import FORMATS
from latent_jax.systems.latentwire.adapter_config import AdapterConfig, WireConfig
from latent_jax.systems.latentwire.extraction import check_rules
from latent_jax.systems.latentwire.faults import FAULTS
from latent_jax.systems.latentwire.loss_config import LossConfig
from latent_jax.systems.latentwire.model_config import (
    MAIN,
    EncoderConfig,
    ModelConfig,
    ReaderConfig,
)
from latent_jax.systems.latentwire.nudge_config import NudgeConfig
from latent_jax.systems.latentwire.pool import num_latents, span_edges
from latent_jax.systems.latentwire.prompts import PromptConfig
from latent_jax.train.config import RunBase
from latent_jax.train.curriculum import ScheduleConfig, ever_on

__all__ = [
    "MAIN", "PHASES", "TASKS", "TAUGHT", "AdapterConfig", "DataConfig", "EncoderConfig",
    "EvalConfig", "LatentWireRun", "LossConfig", "ModelConfig", "ReaderConfig", "WireConfig",
]  # fmt: skip

TASKS = ("reconstruct", "continue", "answer", "recall")
# Tasks that the reader can do from the text itself, and teach.
TAUGHT = ("answer", "recall")
# What a phase's `data` may be: the mixture, or questions on raw texts (for the prompt).
PHASES = ("main", "prompt")


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


# Losses that only the main reader has, other than from a teacher; 0 unless they are asked for.
_OF_MAIN = ("embeddings", "contrast", "magnitude", "first_entropy", "gist", "anchor")


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
    ood: str | None = field(
        default=None, help="a second source of as many held-out questions, on which nothing was "
        "trained, such as qed: the same arms, as qed.* (of other sources ood.*)",
    )  # fmt: skip
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
    cost_rows: int = field(
        default=0, ge=0, help="questions, each on a text of its own, whose first token is timed, "
        "from the wire and from the text, beside keys and values and FLOPs; 0: none",
    )  # fmt: skip
    cost_tokens: int = field(default=512, ge=1, help="tokens of each of these texts")
    cost_pairs: int = field(default=3, ge=1, help="timed pairs, after a run that compiles")
    extract: tuple[str, ...] = field(
        default=(), help="rules by which answers are also cut shorter, as <set>.extract.*: words:N "
        "(the first N), punctuation (up to the first), span (that a trained head picks)",
    )  # fmt: skip
    span_steps: int = field(
        default=300, ge=1, help="training steps of that head, on what the reader says of training "
        "questions from their full text",
    )  # fmt: skip
    span_questions: int = field(default=512, ge=8, help="how many of them at most")
    nudges: NudgeConfig = field(
        default_factory=NudgeConfig, help="a second, nudged decoding of every arm, as "
        "<set>.nudged.*; never a claim",
    )  # fmt: skip
    faults: tuple[str, ...] = field(
        default=(), help="errors made on purpose, for the gallery of failures alone: "
        f"{', '.join(FAULTS)}",
    )  # fmt: skip

    def validate(self) -> None:
        """Refuses unknown number formats and faults, and a second source without questions."""
        check_rules(self.extract)
        if self.ood is not None and not self.questions:
            raise ConfigError("eval.ood: set eval.questions, how many questions of it to ask")
        if wrong := [name for name in self.faults if name not in FAULTS]:
            raise ConfigError(f"eval.faults: unknown {wrong}; allowed: {', '.join(FAULTS)}")
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
        if self.losses.distils and self.losses.label_smoothing:
            raise ConfigError(
                "losses.label_smoothing: a teacher's own predictions are spread already; set one "
                "of losses.distil_* and label_smoothing to 0"
            )
        soft = [n for n in ("embeddings", "magnitude") if getattr(self.losses, n) != 0]
        if soft and self.model.adapter.kind != "soft":
            raise ConfigError(f"losses.{', '.join(soft)} are of soft tokens: adapter.kind=soft")
        if self.losses.embeddings != 0 and self.model.private:
            raise ConfigError("losses.embeddings: private latents stand for no span")
        if self.losses.embeddings != 0 and self.model.ratio % self.model.adapter.entries != 0:
            raise ConfigError(
                f"losses.embeddings: model.ratio={self.model.ratio} is no multiple of "
                f"adapter.entries={self.model.adapter.entries}: soft tokens stand for no tokens"
            )
        if self.losses.anchor != 0 and self.model.encoder.slots != "anchor":
            raise ConfigError("losses.anchor is of encoder.slots=anchor: set it, or leave it 0")
        if (self.losses.gist != 0) != (self.model.gist_layers > 0):
            raise ConfigError("losses.gist and model.gist_layers go together: set both, or none")
        latents = self.losses.contrast != 0 or self.losses.keep != 1
        if latents and self.model.encoder.slots == "heads":
            raise ConfigError(
                "losses.contrast, losses.keep: heads are trained on the whole cache, which has no "
                "latents"
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
        self._refuse_idle_losses()
        if self.eval.ood is not None and self.eval.ood == self.data.qa:
            raise ConfigError(
                f"eval.ood={self.eval.ood}: that is data.qa, which is trained on; name another "
                "source, such as qed"
            )
        segment = self.model.segment
        timed = self.eval.cost_tokens
        if self.eval.cost_rows and timed > segment and timed % segment:
            raise ConfigError(
                f"eval.cost_tokens={timed} is not a multiple of model.segment={segment}"
            )
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

    def _refuse_idle_losses(self) -> None:
        """Refuses settings of losses that this run would not notice."""
        losses, steps = self.losses, self.train.steps
        others = {"continue" if n == "proceed" else n: n for n in vars(losses)}
        replaced = {others.get(n, n) for phase in self.train.phases for n in phase.weights}
        for name, value in vars(losses).items():
            timed = isinstance(value, ScheduleConfig) and value.kind != "constant"
            if timed and steps and name not in replaced and not ever_on(value, steps):
                raise ConfigError(
                    f"losses.{name}: stays 0 in all {steps} steps of this run (kind={value.kind}): "
                    "let it begin earlier, or give train.steps more"
                )
        if losses.corrupt != 0 and not self.data.mix.get("reconstruct"):
            raise ConfigError(
                "losses.corrupt: it is of texts that are rebuilt: give data.mix a share of "
                "reconstruct"
            )
        if losses.sampled != 0 and not any(map(self.data.mix.get, ("reconstruct", "answer"))):
            raise ConfigError(
                "losses.sampled: it is of texts that are rebuilt and of answers: give data.mix a "
                "share of reconstruct or answer"
            )
        idle = [name for name in _OF_MAIN if getattr(losses, name) != 0]
        if idle and MAIN not in self.read_by:
            raise ConfigError(
                f"losses.{', '.join(idle)}: of the main reader alone: put {MAIN} into data.read_by"
            )

    def trains(self, task: str) -> bool:
        """Whether batches ask for a task, and a loss counts what comes of it at any step."""
        term, steps = "proceed" if task == "continue" else task, self.train.steps
        terms = (term, *(("distil_logits", "distil_states") if task in TAUGHT else ()))
        weights = [getattr(self.losses, name) for name in terms]
        weights += [phase.weights.get(name, 0.0) for phase in self.train.phases
                    for name in (task, *terms[1:])]  # fmt: skip
        return bool(self.data.mix.get(task)) and any(ever_on(w, steps) for w in weights)

    @property
    def spans(self) -> tuple[str, ...]:
        """What is said of texts whose tokens do not divide into whole spans, a line each."""
        ratio, where = self.model.ratio, {}
        lengths = {"data.length": (self.data.length, *self.data.lengths)}
        if self.data.mix.get("answer") or self.eval.questions:
            lengths["data.max_context"] = (self.data.max_context,)
        if self.data.mix.get("recall"):
            lengths["data.recall"] = (self.data.recall,)
        for name, found in lengths.items():
            for tokens in found:  # a longer text is whole segments
                where.setdefault(min(tokens, self.model.segment), {})[name] = None
        lines = []
        for tokens, names in where.items():
            count = num_latents(tokens, ratio)
            last = tokens - int(span_edges(count, ratio)[-2])
            if abs(tokens / ratio - count) > 1e-9:
                lines.append(
                    f"model.ratio={ratio:g} does not divide {tokens} tokens ({', '.join(names)}): "
                    f"M = ceil({tokens} / {ratio:g}) = {count} latents, of which the last stands "
                    f"for {last} token{'' if last == 1 else 's'}"
                )
        return tuple(lines)

    @property
    def read_by(self) -> tuple[str, ...]:
        """The readers that are trained, the main one first."""
        return tuple(
            name for name in (MAIN, *self.model.readers)
            if not self.data.read_by or name in self.data.read_by
        )  # fmt: skip
