"""The raw history: token ids and one checksum per block."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
from jaxtyping import Int, Int32

from latent_jax.core.errors import StoreError
from latent_jax.systems.megacontext.store.files import RecordFile
from latent_jax.systems.megacontext.store.spec import TreeSpec

_CHECKSUM = np.dtype("<u4")


class DamagedTokens(StoreError):
    """Tokens that are not what was written.

    Attributes:
      spans: ``(start, stop)`` in tokens.
    """

    def __init__(self, message: str, spans: list[tuple[int, int]]):
        super().__init__(message)
        self.spans = spans


def runs(numbers: Int[np.ndarray, " n"] | list[int]) -> list[tuple[int, int]]:
    """Rising numbers as ``(first, count)`` of the stretches without a gap.

    Example:
      >>> runs([3, 4, 5, 9])
      [(3, 3), (9, 1)]
    """
    numbers = np.asarray(numbers, np.int64)
    if not len(numbers):
        return []
    if numbers[-1] - numbers[0] == len(numbers) - 1:  # streaming meets nothing else
        return [(int(numbers[0]), len(numbers))]
    pieces = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
    return [(int(piece[0]), len(piece)) for piece in pieces]


class TokenFiles:
    """``ids.bin`` and ``ids.crc``.

    A block's checksum starts from its number, so that a block in another's place is found too.

    Args:
      directory: the store.
      spec: its description.
      tokens: how many count.
      tail: checksum of those after the last whole block.
      writable: whether `append` may be called.
    """

    def __init__(self, directory: Path, spec: TreeSpec, tokens: int, tail: int, writable: bool):
        self.block = spec.block
        self.vocab_size = spec.vocab_size
        self.dtype = spec.id_dtype
        self.count = tokens
        self.tail = tail
        self.ids = RecordFile(directory / "ids.bin", self.dtype.itemsize, writable)
        self.sums = RecordFile(directory / "ids.crc", _CHECKSUM.itemsize, writable)

    def append(self, ids: Int[np.ndarray, " n"]) -> None:
        """Adds tokens to the end. When it fails, nothing has been added.

        Raises:
          StoreError: not ids of the vocabulary, or the disk refuses.
        """
        data = self.checked(ids)
        if not len(data):
            return
        width = self.dtype.itemsize
        view = memoryview(data.astype(self.dtype)).cast("B")
        first, filled = divmod(self.count, self.block)
        stops = range((self.block - filled) * width, len(view) + 1, self.block * width)
        sums, start = [], 0
        seed = self.tail if filled else first
        for number, stop in enumerate(stops, first):
            sums.append(zlib.crc32(view[start:stop], seed))
            start, seed = stop, number + 1
        tail = zlib.crc32(view[start:], seed)
        self.ids.write(self.count, view)
        if sums:
            self.sums.write(first, np.asarray(sums, _CHECKSUM))
        self.count, self.tail = self.count + len(data), tail

    def read(self, start: int, stop: int) -> Int32[np.ndarray, " n"]:
        """Tokens ``start`` to ``stop``, checked.

        Raises:
          StoreError: outside the history.
          DamagedTokens: some are not what was written.
        """
        if not 0 <= start <= stop <= self.count:
            raise StoreError(
                f"{self.ids.path.parent}: tokens {start} to {stop} were asked for, the history "
                f"has 0 to {self.count}"
            )
        if start == stop:
            return np.zeros(0, np.int32)
        first, last = start // self.block, (stop - 1) // self.block
        ids, damaged = self.blocks(first, last - first + 1)
        if damaged:
            pieces = [(a * self.block, min((a + n) * self.block, self.count))
                      for a, n in runs(damaged)]  # fmt: skip
            where = ", ".join(f"{a} to {b}" for a, b in pieces)
            raise DamagedTokens(
                f"{self.ids.path}: tokens {where} are damaged (checksum); restore the file from a "
                "copy, or ingest into a new store",
                pieces,
            )
        offset = first * self.block
        return ids[start - offset : stop - offset].astype(np.int32)

    def readable(
        self, start: int, stop: int
    ) -> tuple[Int32[np.ndarray, " n"], list[int]]:
        """Tokens ``start`` to ``stop`` with -1 in the place of damaged blocks, and which these are.

        Raises:
          StoreError: outside the history.
        """
        try:
            return self.read(start, stop), []
        except DamagedTokens as error:
            first = start // self.block
            ids = self.blocks(first, -(-stop // self.block) - first)[0].astype(np.int32)
            ids, damaged = ids[start - first * self.block :][: stop - start], []
            for a, b in error.spans:
                ids[max(a - start, 0) : b - start] = -1
                damaged += range(a // self.block, -(-b // self.block))
            return ids, damaged

    def blocks(self, first: int, count: int) -> tuple[np.ndarray, list[int]]:
        """Ids of some blocks (the last may be the unfinished one), and which are damaged."""
        stop = min((first + count) * self.block, self.count)
        data = self.ids.read(first * self.block, stop - first * self.block).reshape(-1)
        view, step = memoryview(data), self.block * self.dtype.itemsize
        whole = len(view) // step
        sums = self.sums.read(first, whole).view(_CHECKSUM).reshape(-1).tolist()
        damaged = [
            first + i
            for i in range(whole)
            if zlib.crc32(view[i * step : (i + 1) * step], first + i) != sums[i]
        ]
        if (
            whole * step < len(view)
            and zlib.crc32(view[whole * step :], first + whole) != self.tail
        ):
            damaged.append(first + whole)
        return data.view(self.dtype), damaged

    def whole_blocks(self) -> int:
        """Finished blocks."""
        return self.count // self.block

    def checked(self, ids: Int[np.ndarray, " n"]) -> np.ndarray:
        """Ids as an array.

        Raises:
          StoreError: they are not ids of the vocabulary.
        """
        ids = np.asarray(ids)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise StoreError(
                f"append needs a list of token ids, not {ids.dtype} of shape {ids.shape}"
            )
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            at = int(np.flatnonzero((ids < 0) | (ids >= self.vocab_size))[0])
            raise StoreError(
                f"token id {int(ids[at])} (number {at} of {ids.size}) is outside the store's "
                f"vocabulary of {self.vocab_size}"
            )
        return ids
