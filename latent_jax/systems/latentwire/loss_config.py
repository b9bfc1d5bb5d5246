"""What a compressor is trained to do, and how much each of it counts."""

from __future__ import annotations

from dataclasses import dataclass

from latent_jax.core.config import field
from latent_jax.core.errors import ConfigError
from latent_jax.systems.latentwire.rates import RATES, check_rate
from latent_jax.train.curriculum import ScheduleConfig


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
    distil_first: int = field(
        default=0, ge=0, help="distil_logits on the first so many supervised tokens of a row "
        "alone; 0: on all",
    )  # fmt: skip
    distil_temperature: float = field(
        default=1.0, gt=0, help="of both distributions that distil_logits compares"
    )
    distil_layers: int = field(
        default=0, ge=0, help="distil_states in the first so many layers alone, 2 or more (the "
        "first one's come of the tokens, whatever stands before them); 0: in all",
    )  # fmt: skip
    corrupt: float | ScheduleConfig = field(
        default=0.0, ge=0, lt=1, help="share of teacher-forced reconstruction inputs randomised; "
        "or a schedule of it",
    )  # fmt: skip
    sampled: float | ScheduleConfig = field(
        default=0.0, ge=0, le=1, help="share of the teacher-forced tokens of reconstructions and "
        "answers that give way to what the reader itself would say there (scheduled sampling, by a "
        "first pass); or a schedule of it",
    )  # fmt: skip
    embeddings: float | ScheduleConfig = field(
        default=0.0, help="soft tokens to the mean embedding of what they stand for: 1 - cosine + "
        "0.1 squared error over variance",
    )  # fmt: skip
    contrast: float | ScheduleConfig = field(
        default=0.0, help="squared cosine between the mean latents of different texts"
    )
    magnitude: float | ScheduleConfig = field(
        default=0.0, help="squared log of a soft token's size over that of embeddings"
    )
    first_entropy: float | ScheduleConfig = field(
        default=0.0, help="how sure the first prediction is: log of the vocabulary's size less "
        "entropy, nats; a bonus on staying undecided",
    )  # fmt: skip
    gist: float | ScheduleConfig = field(
        default=0.0, help="what model.gist_layers say of masked tokens, to their embeddings: 1 - "
        "cosine + 0.1 squared error over variance",
    )  # fmt: skip
    gist_mask: float = field(
        default=0.85, gt=0, le=1, help="share of a text's tokens that are masked; 1: all"
    )
    anchor: float | ScheduleConfig = field(
        default=0.0, help="1 - cosine between what a text's one vector says of it and the mean of "
        "the LLM's last states on it (encoder.slots=anchor)",
    )  # fmt: skip
    commitment: float | ScheduleConfig = field(
        default=0.25, help="squared distance of a latent's numbers to its codes (wire.codes)"
    )
    label_smoothing: float = field(
        default=0.0, ge=0, lt=1, help="share of every target spread over the vocabulary"
    )
    keep: float | ScheduleConfig = field(
        default=1.0, gt=0, le=1, help="share of the latents that the reader is shown in training; "
        "or a schedule of it",
    )  # fmt: skip
    chunk: int | None = field(
        default=None, ge=1, help="tokens whose logits exist at once; none: all"
    )

    def validate(self) -> None:
        """Refuses rates that leave their range, and settings of a distillation that is off."""
        check_rate("keep", self.keep, above=0.0)
        check_rate("corrupt", self.corrupt, below=1.0)
        check_rate("sampled", self.sampled)
        if self.distil_layers == 1:
            raise ConfigError(
                "distil_layers = 1: the first layer's keys and values are those of the tokens, "
                "whatever stands before them: 2 or more, or 0 for all"
            )
        idle = {
            "distil_first": self.distil_first and self.distil_logits == 0,
            "distil_temperature": self.distil_temperature != 1 and self.distil_logits == 0,
            "distil_layers": self.distil_layers and self.distil_states == 0,
        }
        for name in (name for name, on in idle.items() if on):
            term = "distil_states" if name == "distil_layers" else "distil_logits"
            raise ConfigError(f"{name} is of {term}, which has no weight")

    @property
    def distils(self) -> bool:
        """Whether the reader on the text itself is a teacher."""
        return any(w != 0 for w in (self.distil_logits, self.distil_states))

    @property
    def scheduled(self) -> dict[str, ScheduleConfig]:
        """Rates that change over the training steps."""
        return {n: r for n in RATES if isinstance(r := getattr(self, n), ScheduleConfig)}
