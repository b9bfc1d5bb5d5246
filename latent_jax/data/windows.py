"""Splitting a long sequence and sliding windows over it so that none crosses a border.

A split is two lists of half-open ranges ``[start, stop)``; windows are given by their starts.
Everything here is a pure function of sizes; the same numbers give the same windows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from latent_jax.core.errors import DataError


class Split(NamedTuple):
    """Ranges ``[start, stop)`` of each part, in order."""

    train: Int64[np.ndarray, "a 2"]
    validation: Int64[np.ndarray, "b 2"]


def split_tail(n: int, fraction: float = 0.1, unit: int = 1) -> Split:
    """Holds out the end of the sequence: the greatest heights.

    Args:
      n: length of the sequence.
      fraction: share of whole units that is held out, rounded down.
      unit: the border lies at a multiple of this (the window length, say).

    Raises:
      DataError: one of the parts would be empty.
    """
    units = n // unit
    held = int(units * fraction)
    if not 0 < held < units:
        raise DataError(
            f"split: a fraction {fraction} of {n} gaps in units of {unit} leaves one part empty"
        )
    border = (units - held) * unit
    return Split(_ranges([(0, border)]), _ranges([(border, n)]))


def split_interleaved(n: int, blocks: int = 100, fraction: float = 0.1) -> Split:
    """Holds out whole blocks spread evenly over the sequence.

    Args:
      n: length of the sequence.
      blocks: equal blocks to cut it into.
      fraction: share of blocks that is held out; every ``1 / fraction``-th.

    Raises:
      DataError: more blocks than gaps, or one of the parts would be empty.
    """
    if not 2 <= blocks <= n:
        raise DataError(f"split: blocks={blocks} must be between 2 and the {n} gaps")
    if not 0 < fraction < 1:
        raise DataError(f"split: fraction={fraction} must lie between 0 and 1")
    edges = np.linspace(0, n, blocks + 1).astype(np.int64)
    # block i is held out where the running share passes a half-integer: evenly, none at the ends
    share = np.floor(np.arange(blocks + 1) * fraction + 0.5)
    held = np.diff(share) > 0
    if not held.any() or held.all():
        raise DataError(f"split: a fraction {fraction} of {blocks} blocks leaves one part empty")
    pairs = np.stack([edges[:-1], edges[1:]], axis=1)
    return Split(_ranges(pairs[~held]), _ranges(pairs[held]))


def _ranges(pairs: object) -> Int64[np.ndarray, "m 2"]:
    """As an array, with ranges that touch made one."""
    merged: list[list[int]] = []
    for start, stop in np.asarray(pairs, np.int64).reshape(-1, 2).tolist():
        if merged and merged[-1][1] == start:
            merged[-1][1] = stop
        else:
            merged.append([start, stop])
    return np.array(merged, np.int64).reshape(-1, 2)


def window_starts(
    ranges: Int64[np.ndarray, "m 2"], length: int, stride: int = 1, run: int = 0
) -> Int64[np.ndarray, " w"]:
    """Starts of all windows that lie inside one range (and inside one run).

    Args:
      ranges: a part of a `Split`.
      length: gaps in a window.
      stride: distance of consecutive starts; ``length`` for windows that do not overlap.
      run: length of unbroken runs, counted from position 0 (`Spacings.run`); 0 for no breaks.

    Raises:
      DataError: a length or stride below 1, or no window fits.
    """
    if length < 1 or stride < 1:
        raise DataError(f"windows: length={length} and stride={stride} must be at least 1")
    parts = [
        np.arange(start, stop - length + 1, stride, dtype=np.int64)
        for low, high in np.asarray(ranges).tolist()
        for start, stop in _pieces(low, high, run)
    ]
    starts = np.concatenate([*parts, np.empty(0, np.int64)])
    if not len(starts):
        longest = max((int(b - a) for a, b in ranges), default=0)
        longest = min(longest, run) if run else longest
        raise DataError(
            f"windows: {length} gaps do not fit, the longest unbroken stretch has {longest}"
        )
    return starts


def _pieces(low: int, high: int, run: int) -> list[tuple[int, int]]:
    if not run:
        return [(low, high)]
    cuts = [low, *range((low // run + 1) * run, high, run), high]
    return list(zip(cuts[:-1], cuts[1:], strict=True))


def check_disjoint(
    train: Int64[np.ndarray, " a"], validation: Int64[np.ndarray, " b"], length: int
) -> None:
    """Refuses parts whose windows share a gap.

    Args:
      train: starts of the training windows.
      validation: starts of the validation windows.
      length: gaps in a window.

    Raises:
      DataError: naming the first pair of windows that overlap.
    """
    order = np.sort(np.asarray(train))
    held = np.asarray(validation)
    # The last training window that starts before a validation window's end overlaps it, or none.
    at = np.searchsorted(order, held + length) - 1
    bad = (at >= 0) & (order[np.maximum(at, 0)] > held - length) if len(order) else at > 0
    if bad.any():
        first = int(bad.argmax())
        raise DataError(
            f"split: the training window at {order[at[first]]} and the validation window at "
            f"{held[first]} share gaps (windows of {length})"
        )
