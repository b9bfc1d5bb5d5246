"""Bits per byte of a token model on the same windows of bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from latent_jax import backbones
from latent_jax.core import fetch

_BATCH = 8
_LENGTHS = 32  # batches are padded to multiples of it: a few shapes are compiled
_DOCUMENT = "<|endoftext|>"  # what documents began with in training, where a tokenizer has it


def found(name: str | None) -> str | None:
    """The token model that a config asks for; ``auto`` is smollm2 where it has been fetched."""
    if name != "auto":
        return name
    return "smollm2" if fetch.cached("smollm2") else None


def bits_per_byte(name: str, windows: Sequence[bytes], report: Any) -> dict[str, float]:
    """Measures a token model; each window is coded alone, after a document's first token.

    Bytes at a window's edges that are half of a character (or no UTF-8 at all) are charged 8 bits.

    Args:
      name: what `backbones.load` takes.
      windows: texts as bytes.
      report: called as report(what, done, total).

    Returns:
      ``bpb.smollm2``, or ``bpb.token_lm`` of another model, and ``token_lm.bytes``, on how many.

    Raises:
      BackboneError: no such model.
    """
    model = backbones.load(name)
    tokenizer = model.tokenizer
    marks = (tokenizer.token_to_id(_DOCUMENT), tokenizer.bos_id, tokenizer.eos_id)
    first = next((mark for mark in marks if mark is not None), tokenizer.pad_id)
    texts = [window.decode("utf-8", errors="ignore") for window in windows]
    size = sum(map(len, windows))
    bits = 8.0 * (size - sum(len(text.encode()) for text in texts))
    tokens = sorted(([first, *tokenizer.encode(text)] for text in texts), key=len)
    for at in range(0, len(tokens), _BATCH):
        part = tokens[at : at + _BATCH]
        ids = np.zeros((_BATCH, -(-max(map(len, part)) // _LENGTHS) * _LENGTHS), np.int32)
        for row, mine in zip(ids, part, strict=False):
            row[: len(mine)] = mine
        mask = np.arange(ids.shape[1]) < np.asarray([*map(len, part), *[0] * _BATCH])[:_BATCH, None]
        bits += float(_nats(model.logits(ids, mask), ids, mask)) / math.log(2)
        report("token model", min(at + _BATCH, len(tokens)), len(tokens))
    label = "smollm2" if name == "smollm2" else "token_lm"
    return {f"bpb.{label}": bits / max(size, 1), "token_lm.bytes": size}


@jax.jit
def _nats(logits: jax.Array, ids: jax.Array, mask: jax.Array) -> jax.Array:
    nll = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:])
    return jnp.sum(jnp.where(mask[:, 1:], nll, 0.0))
