"""The commit record: what of a store's files counts.

Two copies lie on two pages of one file. A commit makes the data durable first, then writes one
copy, makes it durable, and writes the other: whatever byte a crash or a bit flip hits, one copy
is whole. Everything in the other files beyond what the newest whole copy names does not count.
"""

from __future__ import annotations

import dataclasses
import json
import os
import struct
import time
import zlib
from pathlib import Path
from typing import Any

from latent_jax.core.errors import StoreError
from latent_jax.core.files import parse_json, write_bytes
from latent_jax.systems.megacontext.store.files import make_durable, read_at, write_at, writing
from latent_jax.systems.megacontext.store.spec import FORMAT, TreeSpec

NAME = "commit.bin"
PAGE = 4096
_MAGIC = b"GISTTREE"
_MOST, _MOST_LEVELS = 1 << 48, 64  # what no store reaches
_HEADER = struct.Struct("<8sI")  # magic, checksum of the rest of the page: JSON and zeros


@dataclasses.dataclass(frozen=True)
class Commit:
    """One state of a store.

    Attributes:
      sequence: counts commits.
      tokens: length of the history.
      tail: checksum of the tokens after the last whole block.
      version: of the gist model; empty before there is one.
      documents: bytes of the table of documents.
      versions: bytes of the table of gist versions.
      gists: per level from 1 on, how many records have been written.
    """

    sequence: int = 0
    tokens: int = 0
    tail: int = 0
    version: str = ""
    documents: int = 0
    versions: int = 0
    gists: tuple[int, ...] = ()

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Commit:
        """Inverse of `dataclasses.asdict`; anything odd is a TypeError or ValueError."""
        commit = cls(**tree | {"gists": tuple(tree["gists"])})
        numbers = (commit.sequence, commit.tokens, commit.tail, commit.documents, commit.versions)
        for number in (*numbers, *commit.gists):
            if type(number) is not int or not 0 <= number < _MOST:
                raise ValueError(f"{number!r} is no count")
        if not isinstance(commit.version, str) or len(commit.gists) > _MOST_LEVELS:
            raise ValueError("its version or its levels")
        return commit


class CommitFile:
    """The file of both copies.

    Args:
      directory: the store.
      writable: whether `write` may be called.

    Raises:
      StoreError: no store there.
    """

    def __init__(self, directory: Path, writable: bool):
        self.path = directory / NAME
        self.damaged: list[int] = []  # copies that the last `read` found broken
        try:
            self._handle = os.open(self.path, os.O_RDWR if writable else os.O_RDONLY)
        except FileNotFoundError:
            if (directory / "meta.json").exists():
                raise StoreError(
                    f"{directory}: {NAME} is missing, so nobody knows what of the store counts; "
                    "restore it from a copy"
                ) from None
            what = "not a store of gists" if directory.is_dir() else "no such store"
            raise StoreError(f"{directory}: {what}; make one with: mega ingest") from None
        except OSError as error:
            raise StoreError(f"{self.path}: cannot be opened ({error.strerror})") from error

    def read(self) -> tuple[TreeSpec, Commit]:
        """The newest whole copy.

        Raises:
          StoreError: both are damaged, or they are of another format.
        """
        for attempt in range(5):
            pages = [self._page(i) for i in range(2)]
            size = os.fstat(self._handle).st_size
            self.damaged = [
                i for i, page in enumerate(pages) if page is None or size < (i + 1) * PAGE
            ]
            whole = [page for page in pages if page is not None]
            if whole:
                break
            time.sleep(0.002 * attempt)  # a writer may have been between the two reads
        else:
            raise StoreError(
                f"{self.path}: both commit records are damaged; restore the file from a copy"
            )
        try:
            for page in whole:
                if page["format"] != FORMAT:
                    raise StoreError(
                        f"{self.path.parent}: a store of format {page['format']}, this library "
                        f"reads format {FORMAT}; use the library it was made with or ingest again"
                    )
            newest = max(whole, key=lambda page: page["commit"]["sequence"])
            return TreeSpec.from_json(newest["spec"]), Commit.from_json(newest["commit"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise StoreError(
                f"{self.path}: the commit record makes no sense ({error!r}); restore the file from "
                "a copy"
            ) from None

    def write(self, spec: TreeSpec, commit: Commit) -> None:
        """Makes `commit` the state; the data it names must be durable. A plain OSError on failure.

        The second copy need not be durable before the next commit, which syncs it first.
        """
        page = _pack(spec, commit)
        make_durable(self._handle)
        write_at(self._handle, page, 0)
        make_durable(self._handle)
        write_at(self._handle, page, PAGE)

    def close(self) -> None:
        """Lets go of the file."""
        os.close(self._handle)

    def _page(self, which: int) -> dict[str, Any] | None:
        data = read_at(self._handle, PAGE, which * PAGE).tobytes()
        magic, checksum = _HEADER.unpack_from(data)
        rest = data[_HEADER.size :]
        if magic != _MAGIC or zlib.crc32(rest) != checksum:
            return None
        try:
            return parse_json(rest.rstrip(b"\0"))
        except ValueError:
            return None


def create(directory: Path, spec: TreeSpec) -> None:
    """Writes the file for an empty history; from then on the directory is a store.

    Raises:
      StoreError: it cannot be written.
    """
    page = _pack(spec, Commit())
    with writing(directory / NAME):
        write_bytes(directory / NAME, page + page)


def _pack(spec: TreeSpec, commit: Commit) -> bytes:
    tree = {"format": FORMAT, "spec": spec.to_json(), "commit": dataclasses.asdict(commit)}
    text = json.dumps(tree, separators=(",", ":")).encode()
    rest = text.ljust(PAGE - _HEADER.size, b"\0")
    if _HEADER.size + len(rest) > PAGE:
        raise StoreError(f"the commit record needs {len(text)} bytes, more than a page of {PAGE}")
    return _HEADER.pack(_MAGIC, zlib.crc32(rest)) + rest
