"""Packing documents of any length into rows of one length, for language-model training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from latent_jax.core.errors import DataError

# A document is tried in this many open rows; more fill better and cost more.
OPEN_ROWS = 16


def pack(
    token_lists: Iterable[Sequence[int]],
    length: int,
    pad_id: int = 0,
    max_rows: int | None = None,
) -> dict[str, np.ndarray]:
    """Packs documents into rows by first fit, in order.

    A document longer than a row is split. Attention and loss must not cross documents: mask them
    with ``segment_ids``, and count RoPE positions from ``positions``.

    Args:
        token_lists: token ids of each document (add EOS yourself where wanted); empty ones are
            left out.
        length: tokens per row.
        pad_id: fills the rest of a row.
        max_rows: stop when this many rows are full; None for all.

    Returns:
        int32 arrays ``[rows, length]``: ``tokens``; ``segment_ids``, 0 on padding and 1, 2, … per
        document in its row; ``positions`` within the document.

    Raises:
        DataError: `length` < 1, or no tokens at all.

    Example:
        >>> packed = pack([[5, 6, 7], [8, 9]], length=6)
        >>> packed["tokens"].tolist(), packed["segment_ids"].tolist()
        ([[5, 6, 7, 8, 9, 0]], [[1, 1, 1, 2, 2, 0]])
    """
    if length < 1:
        raise DataError(f"pack: length={length} must be at least 1")
    rows: list[list[Sequence[int]]] = []
    room: list[int] = []
    open_rows: list[int] = []
    for document in token_lists:
        for start in range(0, len(document), length):
            piece = document[start : start + length]
            fit = next((row for row in open_rows if room[row] >= len(piece)), None)
            if fit is None:
                fit = len(rows)
                rows.append([])
                room.append(length)
                open_rows.append(fit)
            rows[fit].append(piece)
            room[fit] -= len(piece)
            if room[fit] == 0:
                open_rows.remove(fit)
            elif len(open_rows) > OPEN_ROWS:
                # the fullest row is the least likely to take anything more
                open_rows.remove(min(open_rows, key=room.__getitem__))
        if max_rows is not None and len(rows) - len(open_rows) >= max_rows:
            break
    if not rows:
        raise DataError("pack: no tokens to pack")
    if max_rows is not None:
        # fullest first, but in their own order, so that the result stays deterministic
        keep = sorted(sorted(range(len(rows)), key=lambda r: (room[r], r))[:max_rows])
        rows = [rows[r] for r in keep]
    packed = {
        "tokens": np.full((len(rows), length), pad_id, np.int32),
        "segment_ids": np.zeros((len(rows), length), np.int32),
        "positions": np.zeros((len(rows), length), np.int32),
    }
    for row, pieces in enumerate(rows):
        at = 0
        for number, piece in enumerate(pieces, 1):
            span = slice(at, at + len(piece))
            packed["tokens"][row, span] = piece
            packed["segment_ids"][row, span] = number
            packed["positions"][row, span] = np.arange(len(piece))
            at += len(piece)
    return packed
