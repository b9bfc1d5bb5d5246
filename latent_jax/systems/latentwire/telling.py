"""What a reader says of latents: answers to questions, and the text itself."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latent_jax.backbones.decoder import Decoder
from latent_jax.core.errors import DataError
from latent_jax.systems.latentwire import baselines
from latent_jax.systems.latentwire.compressed import Compressed, for_task
from latent_jax.systems.latentwire.given import Asked, Given, prefix_to_given
from latent_jax.systems.latentwire.model import Wire, split_segments
from latent_jax.systems.latentwire.prompts import PromptBuilder, pad_rows
from latent_jax.systems.latentwire.scoring import decode
from latent_jax.systems.latentwire.transcribe import room

#: What asks for a text of a compressor that was never trained to rebuild one.
AGAIN = "\nThe same text again:\n"


def builder_of(own: Any) -> PromptBuilder:
    """How a `LatentWire` puts questions to the LLM that reads."""
    return own.builder if own.by is None else own.by.builder


def answers(
    own: Any, wire: Wire, latents: Compressed, questions: str | Sequence[str], max_new_tokens: int
) -> list[str]:
    """Greedy answers; see `LatentWire.answer`.

    Args:
      own: a `LatentWire`.
      wire: bare latents.
      latents: the compressor as they were made with it.
      questions: one for all texts, one per text, or several about a single text.
      max_new_tokens: longest answer.

    Raises:
      DataError: questions and texts that cannot be paired.
    """
    b = wire.z.shape[0]
    questions = [questions] * b if isinstance(questions, str) else list(questions)
    if b == 1 and len(questions) > 1:
        b = len(questions)
        wire = jax.tree.map(lambda x: jnp.repeat(x, b, axis=0), wire)
    if len(questions) != b:
        raise DataError(
            f"{len(questions)} questions about {b} texts: give one question per text, one for "
            "all, or several about a single text"
        )
    builder = builder_of(own)
    rows = [builder.prompt_ids(q) for q in questions]
    prompt = pad_rows(rows, max(map(len, rows)), builder.pad_id, left=True)
    stops = builder.stop_ids
    ids, lengths = _decode(own, latents, wire, "answer", prompt, max_new_tokens, stops)
    return [builder.text(row[:n]) for row, n in zip(ids, lengths, strict=True)]


def rebuilt(own: Any, wire: Wire, latents: Any) -> list[list[int]]:
    """Greedy reconstructions as token ids; see `LatentWire.rebuild_ids` and `answers`."""
    c, builder = latents.module.config, builder_of(own)
    parts = split_segments(wire, c.segment, c.ratio, sum(c.private_slots.values()))
    b, n = len(wire.z), len(parts.z) // len(wire.z)
    # Where no embedding was trained to ask for the text, words do.
    asking = [] if "reconstruct" in own.tasks else builder.tokenizer.encode(AGAIN)
    prompt = pad_rows([asking] * (b * n), len(asking), builder.pad_id)
    lengths, stops = np.asarray(parts.length), ()
    if own.by is not None:
        lengths = np.array([room(own.by.config, k) if k else 0 for k in lengths.tolist()])
        stops = builder.tokenizer.stop_ids
    most = int(lengths.max())
    ids, said = _decode(own, latents, parts, "reconstruct", prompt, most, stops)
    rows = [row[: min(k, m)].tolist() for row, k, m in zip(ids, lengths, said, strict=True)]
    return [sum(rows[i * n : (i + 1) * n], []) for i in range(b)]


def _decode(own, latents, wire, task, prompt, max_new_tokens, stop_ids):
    reader = own.reading
    if own.by is not None:
        reader, latents = own.by.backbone, own.by.latents(latents)
    known = for_task(latents, task if task in own.tasks else None)
    given = given_of(reader.decoder, reader.params, known, wire)
    lead = latents.task(task, wire.z.shape[0]) if task in own.tasks else None
    given = baselines.instructed(latents, given, task if task in own.tasks else None)
    return decode(reader, Asked(given, *prompt, lead), max_new_tokens, stop_ids)


@functools.partial(jax.jit, static_argnums=0)
def given_of(decoder: Decoder, params: Any, latents: Any, wire: Wire) -> Given:
    """What the reader is given of latents, as keys and values."""
    return prefix_to_given(decoder, params, latents.prefix(wire))
