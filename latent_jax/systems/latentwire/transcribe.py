"""Training records as each reader sees them: the same text in the tokens of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from latent_jax.core.errors import ConfigError
from latent_jax.systems.latentwire.config import MAIN, DataConfig, ReaderConfig
from latent_jax.systems.latentwire.readers import Reader

#: What a reader is fed: its own tokens, which of them are real, which of them it must predict.
FED = ("inputs", "inputs_mask", "supervised")


def field(reader: str, name: str) -> str:
    """Name of a batch's array for one reader; the main reader's have no prefix."""
    return name if reader == MAIN else f"{reader}.{name}"


def room(reader: ReaderConfig, tokens: int) -> int:
    """Static width of what a reader is fed, for so many tokens of the encoder's (and a stop)."""
    return math.ceil(tokens * reader.tokens) + 1


def check_window(reader: Reader, data: DataConfig) -> None:
    """Refuses texts that a reader's LLM could not read as text, beside which its latents stand.

    Raises:
      ConfigError: naming what to shorten.
    """
    need = room(reader.config, data.max_context) + room(reader.config, data.max_prompt)
    window = reader.backbone.config.max_position
    if need > window:
        raise ConfigError(
            f"model.readers.{reader.label}: a text and a question may take {need} of its tokens, "
            f"{reader.config.name} reads {window}: lower data.max_context={data.max_context}, or "
            f"model.readers.{reader.label}.tokens={reader.config.tokens:g}"
        )


def fed(inputs: Sequence[int], supervised: int) -> dict[str, np.ndarray]:
    """One reader's part of a record; its last ``supervised`` inputs are what it must predict."""
    mask = np.zeros(len(inputs), bool)
    mask[len(inputs) - supervised :] = True
    ids = np.asarray(inputs, np.int32)
    return {"inputs": ids, "inputs_mask": np.ones(len(inputs), bool), "supervised": mask}


def retold(
    encoder: Any, reader: Reader, inputs: Int[np.ndarray, " t"], supervised: int, stop: bool
) -> dict[str, np.ndarray]:
    """The same for another reader: given part and supervised part in its own tokens.

    What does not fit its room is cut off at the end. With ``stop`` its EOS follows, if there is
    one: how many tokens of its own a text has, no wire says.
    """
    tokenizer, cut = reader.backbone.tokenizer, len(inputs) - supervised
    given = tokenizer.encode(encoder.decode(inputs[:cut])) if cut else []
    said = tokenizer.encode(encoder.decode(inputs[cut:]))
    if stop and tokenizer.eos_id is not None:
        said.append(tokenizer.eos_id)
    said = said[: max(1, room(reader.config, len(inputs)) - len(given))]
    return _named(reader, fed([*given, *said], len(said)))


def asked(
    reader: Reader, question: str, answer: str, data: DataConfig
) -> dict[str, np.ndarray] | None:
    """A question with its answer; None if they do not fit the room that the reader has."""
    prompt, gold = reader.builder.supervised(question, answer)
    own = reader.config
    if len(prompt) + len(gold) > room(own, data.max_prompt) or len(gold) > room(
        own, data.max_answer
    ):
        return None
    return _named(reader, fed([*prompt, *gold], len(gold)))


def _named(reader: Reader, record: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {field(reader.label, name): value for name, value in record.items()}


def own_tokens(encoder: Any, reader: Reader, texts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Texts in the encoder's tokens as the reader's, as many as it has room for."""
    encode = reader.backbone.tokenizer.encode
    return [
        encode(encoder.decode(ids))[: room(reader.config, len(ids)) - 1] for ids in texts
    ]
