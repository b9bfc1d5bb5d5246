"""Texts to histories of whole blocks."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from latent_jax import data
from latent_jax.core.errors import ConfigError, DataError
from latent_jax.systems.megacontext.config import MegaRun
from latent_jax.train.protocol import BatchSpec


def histories(
    config: MegaRun, tokenizer: Any, split: str, tokens: int, limit: int
) -> Int[np.ndarray, "n t"]:
    """Windows of a split; held-out ones come from ``eval.text`` if it is set."""
    d = config.data
    text = d.text if split == "train" else config.eval.text or d.text
    texts = data.load_texts(text, split, d.root)
    return data.segments(tokenizer, texts, tokens, limit, seed=config.seed)


def filler(config: MegaRun, characters: int = 1 << 22) -> str:
    """Held-out text around hidden facts, the first so many characters."""
    d = config.data
    texts = data.load_texts(config.eval.text or d.text, "validation", d.root)
    return "\n\n".join(texts)[:characters]


def topics(config: MegaRun, characters: int = 1 << 22) -> tuple[str, str]:
    """Held-out texts on different things: the filler and another source (``eval.topic``), or both
    halves of the filler, cut where a document or paragraph ends.
    """
    text, other = filler(config, characters), config.eval.topic
    if other is not None:
        texts = data.load_texts(other, "validation", config.data.root)
        return text, "\n\n".join(texts)[:characters]
    cut = text.rfind("\n\n", 0, len(text) // 2 + 1)
    cut = cut if cut > 0 else len(text) // 2
    return text[:cut], text[cut:]


def calibration(config: MegaRun, tokenizer: Any, level: int = 1) -> Int[np.ndarray, "n t"]:
    """Training texts that tell how much each head needs: windows, or whole nodes of an upper level
    of half as much text, two at least.

    Raises:
      DataError: fewer than two.
    """
    gist, layout = config.model.gist, config.model.layout
    window = gist.window * layout.block
    tokens = window + gist.lead * layout.block
    limit = gist.calibration
    if level > 1:
        tokens = layout.block * int(layout.widths[level])
        limit = max(limit * window // (2 * tokens), 2)
    rows = histories(config, tokenizer, "train", tokens, limit)
    if len(rows) < 2:
        raise DataError(
            f"data.text: {len(rows)} text of {tokens} tokens; calibration of level {level} needs "
            "two"
        )
    return rows


def _rows(config: MegaRun, phase: str) -> tuple[int, tuple[str, ...]]:
    """Blocks of a phase's rows, and the fields whose presence says what they are.

    Raises:
      ConfigError: another name, or a level that the layout does not have.
    """
    layout = config.model.layout
    if phase in ("main", "near"):
        return config.data.blocks, () if phase == "main" else ("near",)
    known = [f"upper{level}" for level in range(2, layout.levels + 1)]
    if phase not in known:
        names = ", ".join(["main", "near", *known])
        raise ConfigError(
            f"train.phases: no data {phase!r}; there are: {names} (a level needs its slots in "
            "model.layout.slots)"
        )
    width = int(layout.widths[int(phase.removeprefix("upper"))])
    return width + config.data.beyond, ("upper",)


def batch_specs(config: MegaRun, phase: str) -> tuple[BatchSpec, ...]:
    """Shapes of the batches of `train_stream`, from the configuration alone."""
    blocks, marks = _rows(config, phase)
    rows, tokens = config.train.batch_size, blocks * config.model.layout.block
    arrays = {"ids": jax.ShapeDtypeStruct((rows, tokens), np.int32)}
    arrays |= {mark: jax.ShapeDtypeStruct((rows,), bool) for mark in marks}
    return (BatchSpec(phase, 1.0, arrays),)


def train_stream(config: MegaRun, tokenizer: Any, phase: str = "main"):
    """Endless, shuffled, resumable rows.

    Args:
      phase: ``main``, rows of ``data.blocks`` blocks; ``near``, the same, with gists of everything
        before a token's own block; ``upper2``, ``upper3``, …, rows of one node of that level and
        ``data.beyond`` blocks.

    Raises:
      ConfigError: another name, or a level that the layout does not have.
    """
    blocks, marks = _rows(config, phase)
    mark = {name: np.True_ for name in marks}
    tokens = blocks * config.model.layout.block
    rows = histories(config, tokenizer, "train", tokens, config.data.rows)
    return data.pipeline(
        lambda i: {"ids": rows[i], **mark},
        config.train.batch_size,
        size=len(rows),
        seed=config.seed,
        remainder="drop" if len(rows) >= config.train.batch_size else "wrap",
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
