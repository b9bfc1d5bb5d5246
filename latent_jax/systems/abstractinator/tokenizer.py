"""Bytes as tokens: ids 0-255 are the bytes themselves, the specials follow from the one table."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from jaxtyping import Int32

from latent_jax.ops.digits import Specials

SPECIALS = Specials(codes=256)
BOS, EOP, PAD = SPECIALS.bos, SPECIALS.eop, SPECIALS.pad
VOCAB = SPECIALS.size
# What an expander can say: a byte, or that its segment is over. The other specials are inputs only.
SPOKEN = EOP + 1


def encode(text: str | bytes) -> Int32[np.ndarray, " t"]:
    """The bytes of a text (UTF-8) as ids.

    Example:
      >>> encode("aé").tolist(), decode([97, 195, 169, EOP, PAD])
      ([97, 195, 169], 'aé')
    """
    # What a terminal passes on that is no UTF-8 arrives as surrogates; its bytes are meant.
    raw = text.encode("utf-8", errors="surrogateescape") if isinstance(text, str) else text
    return np.frombuffer(raw, np.uint8).astype(np.int32)


def to_bytes(ids: Iterable[int]) -> bytes:
    """The bytes among ids; specials are nothing."""
    return bytes(int(i) for i in ids if 0 <= int(i) < SPECIALS.codes)


def decode(ids: Iterable[int]) -> str:
    """Text of ids; bytes that are no UTF-8 become replacement characters."""
    return to_bytes(ids).decode("utf-8", errors="replace")
