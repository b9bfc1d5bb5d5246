"""Append-only tables of JSON rows, each line with its own checksum."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

from latent_jax.systems.megacontext.store.files import RecordFile


class LineTable:
    """Rows in memory, and in a file whose first `length` bytes are committed.

    Args:
      path: the file.
      length: committed bytes.
      writable: whether rows may be added.
    """

    def __init__(self, path: Path, length: int, writable: bool):
        self.file = RecordFile(path, 1, writable)
        self.length = length
        self.damaged: list[int] = []  # line numbers, from 1
        self._rows: list[dict[str, Any]] | None = None
        self._new = b""
        if writable:
            self.file.keep(length)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows that can be read, the ones added since the last commit too."""
        if self._rows is None:
            self._rows, self.damaged = self._read()
        return self._rows

    def _read(self) -> tuple[list[dict[str, Any]], list[int]]:
        have = min(self.length, self.file.records())
        rows, damaged = _parse(self.file.read(0, have).tobytes())
        if have < self.length:  # cut short, though perhaps between two lines
            damaged.append(len(rows) + len(damaged) + 1)
        return rows, damaged

    def add(self, row: dict[str, Any]) -> None:
        """Adds a row, in memory until `write`."""
        self.rows.append(row)
        body = json.dumps(row)  # ASCII: paths may hold bytes that are no UTF-8
        # The leading newline keeps a row whole where the line before it was cut short.
        self._new += f"\n{zlib.crc32(body.encode()):08x} {body}\n".encode()

    def write(self) -> int:
        """Writes the new rows and returns the length to commit.

        Raises:
          StoreError: the disk is full or refuses.
        """
        if self._new:
            self.file.write(self.length, self._new)
        return self.length + len(self._new)

    def committed(self, length: int) -> None:
        """Told that everything up to `length` counts."""
        self.length, self._new = length, b""

    def reload(self) -> None:
        """Reads the committed rows again, to see whether they still are what was written."""
        _, self.damaged = self._read()

    def reread(self, length: int) -> None:
        """Takes over what another process has committed."""
        if length != self.length:
            self.length, self._rows = length, None


def _parse(data: bytes) -> tuple[list[dict[str, Any]], list[int]]:
    rows, damaged = [], []
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line:
            continue
        checksum, _, body = line.partition(b" ")
        if checksum == f"{zlib.crc32(body):08x}".encode():
            rows.append(json.loads(body))
        else:
            damaged.append(number)
    return rows, damaged
