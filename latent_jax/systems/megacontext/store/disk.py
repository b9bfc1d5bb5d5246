"""A store's directory: opening, committing and closing its files together."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from latent_jax.core.errors import StoreError
from latent_jax.core.files import write_json
from latent_jax.systems.megacontext.store import commits, files
from latent_jax.systems.megacontext.store.levels import HEAD, LevelFiles
from latent_jax.systems.megacontext.store.lines import LineTable
from latent_jax.systems.megacontext.store.lock import WriterLock
from latent_jax.systems.megacontext.store.spec import FORMAT, TreeSpec
from latent_jax.systems.megacontext.store.tokens import TokenFiles

META = "meta.json"
# A store stays usable where its tokens are cut off, but so many were never there: looking at each
# would take for ever.
_LOST = 1 << 32


class Disk:
    """All files of a store, and the one commit record that says what of them counts.

    Use `create` and `open`.

    Attributes:
      problems: damage to the store's description, found while opening.
      version: of the gist model; part of the next commit.
    """

    def __init__(self, path: Path, writable: bool, lock: WriterLock | None):
        self.path = path
        self.writable = writable
        self.problems: list[str] = []
        self._lock = lock
        self._failure = ""
        self._commits = commits.CommitFile(path, writable)
        try:
            self.spec, self.commit = self._commits.read()
            for copy in self._commits.damaged:
                self.problems.append(f"{commits.NAME}: copy {copy + 1} of 2 is damaged")
            if not _whole_meta(path):
                self.problems.append(f"{META} is missing or damaged; {commits.NAME} has a copy")
            if writable:
                self._recover()
            commit = self.commit
            self.version = commit.version
            self.tokens = TokenFiles(path, self.spec, commit.tokens, commit.tail, writable)
            if commit.tokens - self.tokens.ids.records() > _LOST:
                raise StoreError(
                    f"{path}: {commits.NAME} names {commit.tokens:,} tokens, "
                    f"{self.tokens.ids.path.name} holds {self.tokens.ids.records():,}: they are "
                    "not of one store; restore both from a copy"
                )
            self.documents = LineTable(path / "documents.jsonl", commit.documents, writable)
            self.versions = LineTable(path / "versions.jsonl", commit.versions, writable)
            self.levels: list[LevelFiles] = []
            self.level(len(commit.gists))
        except BaseException:
            self._commits.close()
            raise

    @classmethod
    def create(cls, path: Path, spec: TreeSpec) -> Disk:
        """Makes an empty store; see `GistTree.create`."""
        with files.writing(path):
            path.mkdir(parents=True, exist_ok=True)
        lock = WriterLock(path)
        try:
            if (path / commits.NAME).exists():
                raise StoreError(f"{path}: already holds a store; open it, or name a new directory")
            # What a kill in here leaves behind is no obstacle: lock, meta.json, files set aside.
            if any(p.name not in ("lock", META) and p.name[0] != "." for p in path.iterdir()):
                raise StoreError(f"{path}: holds other files; name a new directory")
            _write_meta(path, spec)
            commits.create(path, spec)
            with files.writing(path):
                files.sync_directory(path)
            return cls(path, True, lock)
        except BaseException:
            lock.release()
            raise

    @classmethod
    def open(cls, path: Path, writable: bool) -> Disk:
        """Opens a store; see `GistTree.open`."""
        if not writable:
            return cls(path, False, None)
        commits.CommitFile(path, False).close()  # where there is no store, no lock is left behind
        lock = WriterLock(path)
        try:
            return cls(path, True, lock)
        except BaseException:
            lock.release()
            raise

    def level(self, level: int) -> LevelFiles | None:
        """Files of a level from 1 on; those below it are opened too."""
        while len(self.levels) < level:
            new = len(self.levels)
            extent = self.commit.gists[new] if new < len(self.commit.gists) else 0
            file = LevelFiles(self.path, self.spec, new + 1, extent, self.writable)
            self.levels.append(file)
        return self.levels[level - 1] if level else None

    def check_writable(self) -> None:
        """Raises StoreError unless changes may be made."""
        if self._failure:
            raise StoreError(f"{self._failure}; open it again")
        if not self.writable:
            raise StoreError(f"{self.path}: open for reading only; open it with writable=True")

    def flush(self) -> None:
        """Makes everything so far durable and counted, in one step.

        Raises:
          StoreError: the disk refuses; the store stays as last flushed.
        """
        self.check_writable()
        commit = dataclasses.replace(
            self.commit,
            tokens=self.tokens.count,
            tail=self.tokens.tail,
            version=self.version,
            documents=self.documents.write(),
            versions=self.versions.write(),
            gists=tuple(file.extent for file in self.levels),
        )
        try:
            with files.writing(self.path):
                for file in self._files():
                    file.sync()
                if any(file.created for file in self._files()):
                    files.sync_directory(self.path)
                if commit != self.commit:
                    commit = dataclasses.replace(commit, sequence=commit.sequence + 1)
                    self._commits.write(self.spec, commit)
        except StoreError as error:
            # After a failed fsync the system may have dropped pages, and calls the next one good.
            self._failure = str(error)
            raise
        for file in self._files():
            file.created = False
        self.documents.committed(commit.documents)
        self.versions.committed(commit.versions)
        self.commit = commit

    def refresh(self) -> bool:
        """Takes over what another process has committed since; whether there was anything."""
        _, commit = self._commits.read()
        if commit == self.commit:
            return False
        self.commit, self.version = commit, commit.version
        self.tokens.count, self.tokens.tail = commit.tokens, commit.tail
        self.documents.reread(commit.documents)
        self.versions.reread(commit.versions)
        self.level(len(commit.gists))
        for file, extent in zip(self.levels, commit.gists, strict=False):
            file.extent = extent
        return True

    def close(self) -> None:
        """Lets go of everything without a flush; gives unused preallocation back."""
        try:
            # After a failed commit nobody knows which state the disk holds: nothing is cut off.
            if self.writable and not self._failure:
                with contextlib.suppress(StoreError):
                    self._trim()
        finally:
            self._failure = f"{self.path}: the store is closed"
            for file in self._files():
                file.close()
            self._commits.close()
            if self._lock:
                self._lock.release()

    def _trim(self) -> None:
        self.tokens.ids.keep(self.commit.tokens)
        self.tokens.sums.keep(self.commit.tokens // self.spec.block)
        self.documents.file.keep(self.commit.documents)
        self.versions.file.keep(self.commit.versions)
        extents = [*self.commit.gists, *[0] * len(self.levels)]
        for file, extent in zip(self.levels, extents, strict=False):
            file.heads_file.keep(extent)
            file.records.keep(extent)

    def sizes(self) -> dict[str, int]:
        """Bytes in use per file, preallocation left out."""
        ids, sums = self.tokens.ids, self.tokens.sums
        found = {
            ids.path.name: self.tokens.count * ids.stride,
            sums.path.name: self.tokens.whole_blocks() * sums.stride,
            commits.NAME: 2 * commits.PAGE,
        }
        for file in self.levels:
            found[file.records.path.name] = file.extent * file.record.itemsize
            found[file.heads_file.path.name] = file.extent * HEAD.itemsize
        for table in (self.documents, self.versions):
            found[table.file.path.name] = table.length
        return found

    def _files(self) -> list[files.RecordFile]:
        found = [self.tokens.ids, self.tokens.sums, self.documents.file, self.versions.file]
        return found + [f for file in self.levels for f in (file.records, file.heads_file)]

    def _recover(self) -> None:
        for left in self.path.glob(".*.tmp"):  # set aside by a process that was killed
            with contextlib.suppress(OSError):
                left.unlink()
        if self._commits.damaged:
            with files.writing(self.path):
                self._commits.write(self.spec, self.commit)
        if not _whole_meta(self.path):
            _write_meta(self.path, self.spec)


def _write_meta(path: Path, spec: TreeSpec) -> None:
    tree = {"format": FORMAT, "spec": spec.to_json()}
    with files.writing(path / META):
        write_json(path / META, tree | {"sha256": _digest(tree)})


def _whole_meta(path: Path) -> bool:
    """The file is for people; the commit record is what is read."""
    try:
        stored = json.loads((path / META).read_text(encoding="utf-8"))
        return stored.pop("sha256") == _digest(stored)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _digest(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
