"""Texts to histories of whole blocks."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from latent_jax import data
from latent_jax.systems.megacontext.config import MegaRun


def histories(
    config: MegaRun, tokenizer: Any, split: str, blocks: int, limit: int
) -> Int[np.ndarray, "n t"]:
    """Windows of whole blocks from a split; held-out ones come from ``eval.text`` if it is set."""
    d = config.data
    text = d.text if split == "train" else config.eval.text or d.text
    return data.segments(
        tokenizer,
        data.load_texts(text, split, d.root),
        blocks * config.model.layout.block,
        limit,
        seed=config.seed,
    )


def train_stream(config: MegaRun, tokenizer: Any):
    """Endless, shuffled, resumable rows of ``data.blocks`` blocks."""
    rows = histories(config, tokenizer, "train", config.data.blocks, config.data.rows)
    return data.pipeline(
        lambda i: {"ids": rows[i]},
        config.train.batch_size,
        size=len(rows),
        seed=config.seed,
        remainder="drop" if len(rows) >= config.train.batch_size else "wrap",
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
