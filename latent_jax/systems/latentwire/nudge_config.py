"""How decoding may be nudged away from what the reader would say.

A weak reader or a bad compressor can be made to look better by forbidding what it says most; what
that is worth is measured for every arm alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from latent_jax.core.config import field
from latent_jax.core.errors import ConfigError
from latent_jax.systems.latentwire.prompts import PromptBuilder


@dataclass(frozen=True)
class NudgeConfig:
    """How a second decoding of every answer is nudged; as it stands, not at all."""

    gain: float = field(
        default=1.0, ge=0, help="values of the entries that stand for the text are multiplied by it"
    )
    gain_tokens: int = field(
        default=0, ge=0, help="new tokens over which the gain goes back to 1, in equal steps; 0: "
        "never",
    )  # fmt: skip
    first_top_p: float | None = field(
        default=None, gt=0, le=1, help="the first token is drawn from this nucleus; none: greedy"
    )
    ban_eos: int = field(default=0, ge=0, help="first tokens that cannot be EOS")
    min_tokens: int = field(default=0, ge=0, help="tokens before which no stop can end an answer")
    not_first: tuple[str, ...] = field(
        default=(), help="words that no answer may begin with, each a single token of the reader"
    )

    def validate(self) -> None:
        """Refuses a schedule of nothing."""
        if self.gain_tokens and self.gain == 1:
            raise ConfigError("eval.nudges.gain_tokens: a gain of 1 has no way back to 1")

    @property
    def on(self) -> bool:
        """Whether anything is nudged."""
        return self != NudgeConfig()

    def gains(self, tokens: int) -> Float[np.ndarray, " n"]:
        """The gain behind which each new token is chosen.

        Example:
          >>> NudgeConfig(gain=3.0, gain_tokens=2).gains(4).tolist()
          [3.0, 2.0, 1.0, 1.0]
        """
        left = np.ones(tokens)
        if self.gain_tokens:
            left = np.maximum(1 - np.arange(tokens) / self.gain_tokens, 0)
        return (1 + (self.gain - 1) * left).astype(np.float32)

    def banned(
        self, builder: PromptBuilder, vocabulary: int, tokens: int
    ) -> Bool[np.ndarray, "n v"]:
        """Ids that may not be said, of each new token.

        Raises:
          ConfigError: a word of ``not_first`` that is no single token.
        """
        found = np.zeros((tokens, vocabulary), bool)
        eos = builder.tokenizer.eos_id
        if eos is not None:
            found[: self.ban_eos, eos] = True
        found[: self.min_tokens, list(builder.stop_ids)] = True
        for word in self.not_first:
            ids = builder.answer_ids(word, stop=False)
            if len(ids) != 1:
                raise ConfigError(
                    f"eval.nudges.not_first: {word!r} at the beginning of an answer is {len(ids)} "
                    "tokens of this reader; name words that are one"
                )
            found[0, ids] = True
        return found
