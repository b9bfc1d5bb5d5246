"""The gist tree: a history of tokens, and gists of it at every level."""

from __future__ import annotations

import enum
import time
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from latent_jax.core.errors import StoreError
from latent_jax.systems.megacontext.store.disk import Disk
from latent_jax.systems.megacontext.store.history import History
from latent_jax.systems.megacontext.store.levels import tag_of
from latent_jax.systems.megacontext.store.tokens import runs
from latent_jax.systems.megacontext.store.verify import Verification, verify

_PARTIAL = "{} without damaged tokens"  # marks such a gist in the heads, after its version

# A reader that meets a record being rewritten looks again this often.
_LOOKS = 5


class State(enum.IntEnum):
    """Of a node's gist."""

    ABSENT = 0
    STALE = 1  # made by another version of the gist model
    PARTIAL = 2  # made without blocks whose tokens were damaged: of use, and pending
    CURRENT = 3


class PendingGists(StoreError):
    """Gists that were asked for and are not there, or are of another version."""


class DamagedGists(StoreError):
    """Gists that are not what was written; from now on they are pending.

    Attributes:
      level: their level.
      nodes: their numbers.
    """

    def __init__(self, message: str, level: int, nodes: list[int]):
        super().__init__(message)
        self.level = level
        self.nodes = nodes


class GistTree(History):
    """Tokens are appended; gists are written for complete nodes, children before parents.

    Node ``i`` of level l >= 1 covers the blocks ``[i * branch**(l-1), (i+1) * branch**(l-1))``;
    at level 0 a node is a block of raw tokens. There are as many levels as the history has
    complete nodes for. Tokens after the last whole block stay raw.

    `flush` is the point of no loss: whatever ends the process, the store opens again as last
    flushed. One process writes, any number read; readers see what was flushed before they opened
    (or called `refresh`) and are never blocked. A tree belongs to one thread.

    Use `create` and `open`, as context managers: after an error nothing unflushed is kept.

    Example:
      >>> import tempfile
      >>> from pathlib import Path
      >>> from latent_jax.systems.megacontext.store import TreeSpec
      >>> spec = TreeSpec(vocab_size=100, width=2, block=4, branch=2)
      >>> with GistTree.create(Path(tempfile.mkdtemp()) / "store", spec) as tree:
      ...     tree.set_version("a")
      ...     span = tree.append(range(10))
      ...     tree.write(1, 0, np.ones((2, 1, 2)))
      ...     tree.levels, tree.pending(1).tolist(), tree.pending(2).tolist()
      (2, [], [0])
    """

    def __init__(self, disk: Disk):
        super().__init__(disk)
        self._damaged: set[tuple[int, int]] = set()  # what a reader found and cannot clear
        self._done: dict[int, int] = {}  # per level: every node before it is current

    def refresh(self) -> bool:
        """Lets a reader see what was flushed since; returns whether there was anything."""
        version = self.version
        changed = super().refresh()
        if changed:
            self._damaged.clear()  # it may have been built again
        if self.version != version:
            self._done.clear()
        return changed

    def verify(self) -> Verification:
        """Reads everything against its checksums; damaged gists become pending."""
        return verify(self._disk, self._forget)

    @property
    def version(self) -> str:
        """Of the gist model; empty before `set_version`."""
        return self._disk.version

    @property
    def versions(self) -> list[str]:
        """All versions that have ever been current."""
        return [row["version"] for row in self._disk.versions.rows]

    def set_version(self, version: str) -> None:
        """Names the gist model (the digest of its checkpoint) that gists are written with.

        Gists of any other version become stale, those of this one current. Flushes.

        Raises:
          StoreError: not writable, or no usable name.
        """
        self._disk.check_writable()
        before = self.version
        if not version or len(version) > 128 or not version.isprintable():
            raise StoreError(f"gist version {version!r}: give a digest of 1 to 128 characters")
        if version == before:
            return
        tags = {tag_of(v): v for v in self.versions}
        if tags.setdefault(tag_of(version), version) != version:
            raise StoreError(
                f"gist versions {version} and {tags[tag_of(version)]} share a mark (1 in 4e9); "
                "salt one of the names"
            )
        if version not in self.versions:
            self._disk.versions.add({"version": version})
        self._disk.version = version
        try:
            self.flush()
        except StoreError:
            self._disk.version = before
            raise
        self._done.clear()

    def state(
        self, level: int, first: int = 0, count: int | None = None
    ) -> UInt8[np.ndarray, " n"]:
        """`State` of the gists of some complete nodes.

        Raises:
          StoreError: the history has no such nodes.
        """
        first, count = self._nodes(level, first, count)
        if level > len(self._disk.levels):
            return np.zeros(count, np.uint8)
        return self._states(level, first, self._disk.level(level).heads(first, count))

    def pending(self, level: int) -> Int[np.ndarray, " n"]:
        """Complete nodes of a level that lack a gist of the current version, in order.

        What is done costs nothing: the nodes before the first pending one are remembered.
        """
        done, count = self._done.get(level, 0), self.count(level)
        if level < 1 or done >= count:
            return np.zeros(0, np.int64)
        nodes = done + np.flatnonzero(self.state(level, done, count - done) != State.CURRENT)
        self._done[level] = int(nodes[0]) if len(nodes) else count
        return nodes

    def write(
        self, level: int, first: int, gists: Float[np.ndarray, "n slots width"],
        partial: bool = False,
    ) -> None:  # fmt: skip
        """Stores gists of the current version for nodes from `first` on, over older ones.

        Args:
          partial: they were made without tokens that are damaged; see `State`.

        Raises:
          StoreError: no such nodes, wrong shape, not finite, or the disk is full.
          PendingGists: children are not current, of gists that are not partial.
        """
        self._disk.check_writable()
        gists = np.asarray(gists)
        first, count = self._nodes(level, first, len(gists))
        records = self.spec.encode(level, gists)
        if not self.version:
            raise StoreError(f"{self.path}: gists need a version; call set_version first")
        if level > 1 and not partial:
            branch = self.spec.branch
            self._require(level - 1, first * branch, count * branch, State.CURRENT)
        if count:
            version = _PARTIAL.format(self.version) if partial else self.version
            self._disk.level(level).write(first, records, tag_of(version))

    def lost(self, level: int, node: int) -> bool:
        """Whether a node has no gist because all tokens under it are damaged: none can be made."""
        if self.state(level, node, 1)[0] >= State.PARTIAL:
            return False
        return len(self.readable(*self.span(level, node))[1]) == self.spec.blocks_in(level)

    def gists(
        self, level: int, first: int = 0, count: int | None = None, stale: bool = False
    ) -> Float[np.ndarray, "n slots width"]:
        """Gists, checked, in the stored dtype (int8 as float32).

        Args:
          level: from 1 on.
          first: node.
          count: nodes; default all from `first` on.
          stale: take gists of older versions as well.

        Raises:
          StoreError: the history has no such nodes.
          PendingGists: some are not there, or stale.
          DamagedGists: some are not what was written; they are pending from now on.
        """
        first, count = self._nodes(level, first, count)
        wanted = State.STALE if stale else State.PARTIAL
        for look in range(_LOOKS):
            self._require(level, first, count, wanted)
            records, heads, agree = self._disk.level(level).read(first, count)
            if agree.all() and (self._states(level, first, heads) >= wanted).all():
                return self.spec.decode(records)
            if self.writable:
                break  # nobody else writes
            time.sleep(0.001 * look)
        bad = (first + np.flatnonzero(~agree)).tolist()
        for node in bad:
            self._forget(level, node)
        raise DamagedGists(
            f"{self.path}: level {level}, nodes {_spelled(bad)}: damaged gists (checksum); they "
            "are pending now, and the next build makes them again",
            level,
            bad,
        )

    def mapped(self, level: int) -> np.ndarray:
        """All records of a level as a read-only memory map: no copy, no check.

        For scans over a whole level. What counts is in `state`; a record may be rewritten while
        it is looked at. int8 records have the fields ``values`` and ``scale``.
        """
        if not 1 <= level <= len(self._disk.levels):
            raise StoreError(f"{self.path}: there are no gists of level {level}")
        records = self._disk.level(level).mapped()
        return records if self.spec.dtype == "int8" else records["values"]

    def made_by(self, level: int) -> list[tuple[int, int, str]]:
        """Which version made which nodes: ``(first, count, version)``; '' where no gist is."""
        tags = np.zeros(self.count(level), np.uint32)
        if 1 <= level <= len(self._disk.levels):
            tags = self._disk.level(level).heads(0, len(tags))["version"]
        spelled = [name for v in self.versions for name in (v, _PARTIAL.format(v))]
        names = {tag_of(name): name for name in spelled} | {0: ""}
        edges = [0, *(np.flatnonzero(np.diff(tags)) + 1).tolist(), len(tags)]
        pieces = [(a, b - a) for a, b in zip(edges, edges[1:], strict=False) if b > a]
        return [(first, count, names.get(int(tags[first]), "?")) for first, count in pieces]

    def _nodes(self, level: int, first: int, count: int | None) -> tuple[int, int]:
        have = self.count(level) if level >= 1 else 0
        count = max(have - first, 0) if count is None else count
        if level < 1 or first < 0 or count < 0 or first + count > have:
            raise StoreError(
                f"{self.path}: level {level}, nodes {first} to {first + count - 1}: the history "
                f"of {len(self)} tokens has {have} complete nodes there"
            )
        return first, count

    def _states(self, level: int, first: int, heads: np.ndarray) -> UInt8[np.ndarray, " n"]:
        tags = heads["version"]
        found = np.where(tags != 0, State.STALE, State.ABSENT).astype(np.uint8)
        if self.version:
            found[tags == tag_of(_PARTIAL.format(self.version))] = State.PARTIAL
            found[tags == tag_of(self.version)] = State.CURRENT
        for at, node in self._damaged:
            if at == level and first <= node < first + len(found):
                found[node - first] = State.ABSENT
        return found

    def _require(self, level: int, first: int, count: int, wanted: State) -> None:
        low = first + np.flatnonzero(self.state(level, first, count) < wanted)
        if len(low):
            what = "gist" if wanted == State.STALE else "gist of the current version"
            raise PendingGists(
                f"{self.path}: level {level}, nodes {_spelled(low)}: no {what}; build them first"
            )

    def _forget(self, level: int, node: int) -> None:
        if self.writable:
            self._disk.level(level).clear(node)
        else:
            self._damaged.add((level, node))
        self._done[level] = min(self._done.get(level, 0), node)


def _spelled(nodes: Any) -> str:
    pieces = [str(a) if n == 1 else f"{a} to {a + n - 1}" for a, n in runs(nodes)]
    return ", ".join(pieces[:6]) + (f" and {len(pieces) - 6} more" if len(pieces) > 6 else "")
