"""One level of gists: records of fixed size, and beside them who made each and its checksum."""

from __future__ import annotations

import functools
import hashlib
import struct
import zlib
from pathlib import Path

import numpy as np

from latent_jax.systems.megacontext.store.files import RecordFile
from latent_jax.systems.megacontext.store.spec import TreeSpec

# Kept apart from the records: what is pending is found by reading 8 bytes a node, and the records
# stay aligned for a memory map. No gist: version 0, which is written last, so that a head cut short
# by a crash says so.
HEAD = np.dtype([("checksum", "<u4"), ("version", "<u4")])


@functools.lru_cache(maxsize=64)
def tag_of(version: str) -> int:
    """A version's mark in the heads: 32 bits of its sha256, never 0."""
    return int.from_bytes(hashlib.sha256(version.encode()).digest()[:4], "little") or 1


class LevelFiles:
    """``level<l>.bin`` and ``level<l>.head``.

    A checksum covers the record, its level, its number and its version: a record in another's
    place, or with another's version, is found.

    Args:
      directory: the store.
      spec: its description.
      level: from 1 on.
      extent: how many records count; the rest of the files does not.
      writable: whether `write` and `clear` may be called.
    """

    def __init__(self, directory: Path, spec: TreeSpec, level: int, extent: int, writable: bool):
        self.level = level
        self.extent = extent
        self.record = spec.record(level)
        self.records = RecordFile(directory / f"level{level}.bin", self.record.itemsize, writable)
        self.heads_file = RecordFile(directory / f"level{level}.head", HEAD.itemsize, writable)
        if writable:
            # Records after a crash belong to tokens that were lost with it: other tokens will
            # come in their place, and must not find a gist there.
            self.heads_file.keep(extent)

    def heads(self, first: int, count: int) -> np.ndarray:
        """Heads of some nodes; zeros where there is no gist."""
        inside = max(min(first + count, self.extent) - first, 0)
        found = np.zeros(count, HEAD)
        found[:inside] = self.heads_file.read(first, inside).reshape(-1).view(HEAD)
        return found

    def read(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Records, their heads, and which records agree with their head."""
        heads = self.heads(first, count)
        rows = self.records.read(first, count)
        agree = self._checksums(rows, first, heads["version"]) == heads["checksum"]
        return rows.view(self.record).reshape(-1), heads, agree & (heads["version"] != 0)

    def write(self, first: int, records: np.ndarray, tag: int) -> None:
        """Writes records of one version; whoever reads meanwhile sees the old, none or the new.

        Raises:
          StoreError: the disk is full or refuses.
        """
        rows = records.view(np.uint8).reshape(len(records), -1)
        heads = np.zeros(len(records), HEAD)
        heads["version"] = tag
        heads["checksum"] = self._checksums(rows, first, heads["version"])
        if self.heads(first, len(records))["version"].any():
            # A crash in between leaves no gist instead of one that looks damaged.
            self.heads_file.write(first, np.zeros_like(heads))
        self.records.write(first, rows)
        self.heads_file.write(first, heads)
        self.extent = max(self.extent, first + len(records))

    def clear(self, node: int) -> None:
        """Forgets a gist."""
        self.heads_file.write(node, np.zeros(1, HEAD))

    def mapped(self) -> np.ndarray:
        """All records as a read-only memory map, unchecked."""
        count = min(self.extent, self.records.records())
        if not count:
            return np.zeros(0, self.record)
        return np.memmap(self.records.path, self.record, "r", shape=(count,))

    def _checksums(self, rows: np.ndarray, first: int, tags: np.ndarray) -> np.ndarray:
        seeds = (
            zlib.crc32(struct.pack("<IIQ", tag, self.level, first + i))
            for i, tag in enumerate(tags.tolist())
        )
        sums = [zlib.crc32(row, seed) for row, seed in zip(rows, seeds, strict=True)]
        return np.asarray(sums, np.uint32)
