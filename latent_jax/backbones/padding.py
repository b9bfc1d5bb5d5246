"""Ragged rows as arrays of few sizes: every size is a compiled program."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array

from latent_jax.backbones.decoder import KV

SMALLEST_BUCKET = 16


def bucket(n: int, smallest: int = SMALLEST_BUCKET) -> int:
    """Round a length up to the next of 16, 24, 32, 48, 64, 96, 128, …: at most a third of a
    bucket is padding.

    Example:
        >>> [bucket(n) for n in (1, 17, 33, 64, 65, 1000)]
        [16, 24, 48, 64, 96, 1024]
    """
    size = smallest
    while size < n:
        if size + size // 2 >= n:
            return size + size // 2
        size *= 2
    return size


def bucket_batch(n: int, largest: int) -> int:
    """Round a number of rows up to a power of two, at most `largest`."""
    size = 1
    while size < n:
        size *= 2
    return max(min(size, largest), n)


def left_pad(
    rows: Sequence[Sequence[int]], length: int | None = None, pad_id: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Stack ragged id lists, padded on the left.

    Args:
        rows: token ids of each row.
        length: width; None takes the bucket of the longest row.
        pad_id: id at padded places (any valid id: they are masked).

    Returns:
        (int32 ids [b, t], bool mask [b, t]).

    Example:
        >>> ids, mask = left_pad([[5, 6], [7]], length=3)
        >>> ids.tolist(), mask.tolist()
        ([[0, 5, 6], [0, 0, 7]], [[False, True, True], [False, False, True]])
    """
    width = length if length is not None else bucket(max((len(r) for r in rows), default=1))
    ids = np.full((len(rows), width), pad_id, np.int32)
    mask = np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        if len(row):
            ids[i, width - len(row) :] = row
            mask[i, width - len(row) :] = True
    return ids, mask


def left_align(x: Array, mask: Array) -> tuple[Array, Array]:
    """Move every row's valid entries to the right end, in order: any padding becomes left padding.

    Args:
        x: [b, t, ...] values.
        mask: Bool[Array, 'b t'].

    Returns:
        The moved values and their mask.
    """
    order = jnp.argsort(mask, axis=1, stable=True)  # False first, both in their old order
    moved = jnp.take_along_axis(x, order.reshape(order.shape + (1,) * (x.ndim - 2)), axis=1)
    return moved, jnp.take_along_axis(mask, order, axis=1)


def pad_left(x: Array, width: int) -> Array:
    """Zeros before the tokens of ``x`` [b, t, ...], ``width`` in all."""
    return jnp.pad(x, [(0, 0), (width - x.shape[1], 0)] + [(0, 0)] * (x.ndim - 2))


def pad_prefix(prefix: KV, width: int) -> KV:
    """Masked entries after those of a prefix, ``width`` in all."""
    extra = width - prefix.mask.shape[1]
    room = [(0, 0), (0, 0), (0, extra), (0, 0), (0, 0)]
    bias = None if prefix.bias is None else jnp.pad(prefix.bias, room[:-1])
    mask = jnp.pad(prefix.mask, [(0, 0), (0, extra)])
    return KV(jnp.pad(prefix.k, room), jnp.pad(prefix.v, room), mask, bias, prefix.cross)


def take_rows(prefix: KV, rows: np.ndarray) -> KV:
    """The prefixes of some rows of the batch."""
    bias = None if prefix.bias is None else prefix.bias[:, rows]
    cross = None if prefix.cross is None else prefix.cross.rows(rows)
    return KV(prefix.k[:, rows], prefix.v[:, rows], prefix.mask[rows], bias, cross)
