"""The history of a gist tree: its tokens, the documents they came from, and how it opens."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from jaxtyping import Int, Int32

from latent_jax.core.errors import StoreError
from latent_jax.systems.megacontext.store import commits
from latent_jax.systems.megacontext.store.disk import Disk
from latent_jax.systems.megacontext.store.spec import TreeSpec


class Document(NamedTuple):
    """A text in the history: tokens ``start`` to ``stop``."""

    path: str
    sha256: str
    start: int
    stop: int


class History:
    """What a `GistTree` is before there are gists; see there."""

    def __init__(self, disk: Disk):
        self._disk = disk
        self._open = True
        self.damaged: set[int] = set()  # blocks whose tokens `readable` could not read

    @classmethod
    def create(cls, path: str | Path, spec: TreeSpec) -> Self:
        """Makes an empty store and opens it for writing.

        Raises:
          StoreError: there is something already, or it cannot be written.
        """
        return cls(Disk.create(Path(path), spec))

    @staticmethod
    def exists(path: str | Path) -> bool:
        """Whether there is a store, of whatever kind."""
        return (Path(path) / commits.NAME).exists()

    @classmethod
    def open(cls, path: str | Path, writable: bool = False, **expected: Any) -> Self:
        """Opens a store.

        Args:
          path: its directory.
          writable: become its one writer.
          **expected: fields of `TreeSpec` that the store must have.

        Raises:
          StoreError: no store there, of another format or spec, damaged beyond use, or in the
            hands of another writer.
        """
        known = {field.name for field in dataclasses.fields(TreeSpec)}
        if unknown := set(expected) - known:
            raise TypeError(f"open() got {sorted(unknown)}; a spec has {sorted(known)}")
        tree = cls(Disk.open(Path(path), writable))
        for name, value in expected.items():
            value = tuple(value) if name == "slots" else value
            found = getattr(tree.spec, name)
            if found != value:
                tree.close(discard=True)
                raise StoreError(
                    f"{path}: made with {name} {_abbreviated(found)}, but {_abbreviated(value)} "
                    "is wanted; use what it was made with, or another store"
                )
        return tree

    def close(self, discard: bool = False) -> None:
        """Flushes and lets the next writer in; closing twice is harmless.

        Args:
          discard: do not flush; the store stays as last flushed.

        Raises:
          StoreError: the flush failed; it is closed all the same.
        """
        if not self._open:
            return
        try:
            if self.writable and not discard:
                self.flush()
        finally:
            self._open = False
            self._disk.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        # After an error nobody knows whether what was appended is whole.
        self.close(discard=kind is not None)

    def flush(self) -> None:
        """Makes everything so far durable, in one step: a crash leaves all of it or none.

        Raises:
          StoreError: the disk refuses; the store stays as last flushed.
        """
        self._disk.flush()

    def refresh(self) -> bool:
        """Lets a reader see what was flushed since; returns whether there was anything."""
        return not self.writable and self._disk.refresh()

    @property
    def path(self) -> Path:
        """The store's directory."""
        return self._disk.path

    @property
    def spec(self) -> TreeSpec:
        """What the store holds."""
        return self._disk.spec

    @property
    def writable(self) -> bool:
        """Whether this is the store's writer."""
        return self._disk.writable

    @property
    def problems(self) -> list[str]:
        """Damage to the store's description that was found while opening; `verify` finds all."""
        return self._disk.problems

    def sizes(self) -> dict[str, int]:
        """Bytes in use per file, preallocation left out."""
        return self._disk.sizes()

    # Geometry

    def __len__(self) -> int:
        """Tokens in the history."""
        return self._disk.tokens.count

    @property
    def levels(self) -> int:
        """The highest level with a complete node; 0 while there is no whole block."""
        level = 0
        while self.count(level + 1):
            level += 1
        return level

    def count(self, level: int) -> int:
        """Complete nodes of a level."""
        return len(self) // self.spec.tokens_in(level)

    def span(self, level: int, node: int) -> tuple[int, int]:
        """Tokens under a node: ``(start, stop)``."""
        width = self.spec.tokens_in(level)
        return node * width, (node + 1) * width

    def cover(self, level: int | None = None) -> list[tuple[int, int, int]]:
        """All whole blocks exactly once, by the coarsest nodes up to `level`, then finer ones.

        Returns:
          ``(level, first, count)`` from old to new.
        """
        top = self.levels if level is None else min(level, self.levels)
        found, blocks = [], 0
        for at in range(top, -1, -1):
            width = self.spec.blocks_in(at)
            count = (self.count(0) - blocks) // width
            if count:
                found.append((at, blocks // width, count))
                blocks += count * width
        return found

    # Tokens

    def append(self, ids: Int[np.ndarray, " n"]) -> tuple[int, int]:
        """Adds tokens to the end and returns their span. When it fails, nothing was added.

        Raises:
          StoreError: not ids of the vocabulary, not writable, or the disk is full.
        """
        self._disk.check_writable()
        start = len(self)
        self._disk.tokens.append(ids)
        return start, len(self)

    def tokens(self, start: int = 0, stop: int | None = None) -> Int32[np.ndarray, " n"]:
        """Raw tokens, checked.

        Raises:
          StoreError: outside the history.
          DamagedTokens: some are not what was written; names their spans.
        """
        return self._disk.tokens.read(start, len(self) if stop is None else stop)

    def readable(self, start: int, stop: int) -> tuple[Int32[np.ndarray, " n"], list[int]]:
        """Tokens with -1 in the place of damaged blocks, and which these are; they are remembered
        in ``damaged``.

        Raises:
          StoreError: outside the history.
        """
        ids, damaged = self._disk.tokens.readable(start, stop)
        self.damaged |= set(damaged)
        return ids, damaged

    @property
    def documents(self) -> list[Document]:
        """The texts that were added as such, in order."""
        return [Document(**row) for row in self._disk.documents.rows]

    def add_document(self, path: str, sha256: str, ids: Int[np.ndarray, " n"]) -> Document:
        """Appends a text and its row in the table; a flush commits both or neither."""
        document = Document(path, sha256, *self.append(ids))
        self._disk.documents.add(document._asdict())
        return document


def _abbreviated(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) > 24 else text or "(none)"
