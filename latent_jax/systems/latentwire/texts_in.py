"""Texts as a compressor takes them: checked, as token ids of a static width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Int

from latent_jax import backbones
from latent_jax.backbones.padding import bucket
from latent_jax.core.errors import DataError
from latent_jax.systems.latentwire.compressed import Compressed
from latent_jax.systems.latentwire.config import ModelConfig
from latent_jax.systems.latentwire.message import Message
from latent_jax.systems.latentwire.model import Wire, num_latents
from latent_jax.systems.latentwire.prompts import PromptBuilder, pad_rows
from latent_jax.systems.latentwire.scoring import context_width


def padded(
    texts: Sequence[str], builder: PromptBuilder, backbone: backbones.Backbone, segment: int
) -> Any:
    """Token ids and mask of texts, ``[b t]`` each; ``t`` is a segment at most, or several.

    Raises:
      DataError: no text, an empty one, or one that is longer than the LLM's context.
    """
    if not texts:
        raise DataError("no text was given: there is nothing to compress")
    rows = [builder.context_ids(t) for t in texts]
    limit = backbone.config.max_position
    for number, row in enumerate(rows):
        if not row:
            raise DataError(f"text {number} is empty: there is nothing to compress")
        if len(row) > limit:
            raise DataError(
                f"text {number} has {len(row)} tokens, {backbone.name} reads {limit}: split it"
            )
    longest = max(map(len, rows))
    width = min(segment, bucket(longest, 64))
    if longest > segment:
        width = context_width(longest, segment)
    return pad_rows(rows, width, builder.pad_id)


def check_ratio(config: ModelConfig, ratio: float, name: str, training_free: bool) -> None:
    """Refuses a ratio that a compressor cannot be put at.

    Args:
      config: its shape.
      ratio: tokens per latent.
      name: what it was loaded as.
      training_free: whether nothing of it was trained.

    Raises:
      DataError: below 1, or the slots were trained at another.
    """
    if not ratio >= 1:
        raise DataError(f"ratio {ratio:g}: a latent stands for at least 1 token")
    if config.encoder.slots not in ("memory", "heads") and not training_free:
        raise DataError(
            f"ratio {ratio:g}: {name or 'this compressor'} was trained at {config.ratio:g} "
            f"tokens per latent (M = ceil(T / {config.ratio:g})) and its slots have no other; "
            "leave ratio out, or train one with model.ratio"
        )


def check_count(made: Message, config: ModelConfig) -> None:
    """Refuses latents that are not as many as was asked for.

    Args:
      made: of texts.
      config: the shape that they were compressed at.

    Raises:
      DataError: a text has more latents than ``ceil(T / ratio)``.
    """
    segment, ratio = config.segment, config.ratio
    private = sum(config.private_slots.values())
    for tokens, m in zip(np.asarray(made.length).tolist(), made.latents, strict=True):
        m -= private * math.ceil(tokens / segment)
        if m != (exact := num_latents(tokens, ratio)):
            raise DataError(
                f"ratio {ratio:g} does not divide segments of {segment} tokens: {tokens} "
                f"tokens become {m} latents ({tokens / m:.3f} tokens each) and not "
                f"{exact}; leave ratio out to take that, or split the text"
            )


@jax.jit
def compress_ids(latents: Compressed, ids: Int[Array, "b t"], mask: Bool[Array, "b t"]) -> Wire:
    """Right-padded token ids → wire; ``t`` up to a segment, or a multiple of it."""
    return latents.compress(ids, mask)
