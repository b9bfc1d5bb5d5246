"""A history that goes on in memory, over a store that stays as it is."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int, Int32, UInt8

from latent_jax.core.errors import StoreError
from latent_jax.systems.megacontext.store.tree import GistTree, State


class Overlay(GistTree):
    """A `GistTree` whose new tokens and gists are in memory alone, rounded as they are stored.

    What the store had not built is left to it.

    Args:
      tree: what it goes on from; nothing may be appended to it meanwhile.
    """

    def __init__(self, tree: GistTree):
        super().__init__(tree._disk)
        self.tree, self._begin = tree, len(tree)
        self._ids = np.zeros(0, np.int32)
        self._new: dict[tuple[int, int], tuple[np.ndarray, State]] = {}
        self.damaged = set(tree.damaged)
        # The block that the store began is damaged to its end if its beginning is.
        first = self._begin - self._begin % self.spec.block
        damaged = self._begin > first and tree.readable(first, self._begin)[1]
        self._broken = (first, first + self.spec.block) if damaged else (0, 0)
        self._done = {level: tree.count(level) for level in range(1, tree.levels + 1)}

    def __len__(self) -> int:
        return self._begin + len(self._ids)

    def close(self, discard: bool = False) -> None:
        """Lets go of what is new; the store is somebody else's."""

    def append(self, ids: Int[np.ndarray, " n"]) -> tuple[int, int]:
        """As `GistTree.append`.

        Raises:
          StoreError: not ids of the vocabulary.
        """
        start = len(self)
        self._ids = np.concatenate([self._ids, self._disk.tokens.checked(ids)]).astype(np.int32)
        return start, len(self)

    def tokens(self, start: int = 0, stop: int | None = None) -> Int32[np.ndarray, " n"]:
        """As `GistTree.tokens`."""
        stop = len(self) if stop is None else stop
        self._within(start, stop)
        old = self.tree.tokens(min(start, self._begin), min(stop, self._begin))
        return np.concatenate([old, self._since(start, stop)])

    def readable(self, start: int, stop: int) -> tuple[Int32[np.ndarray, " n"], list[int]]:
        """As `GistTree.readable`."""
        self._within(start, stop)
        old, damaged = self.tree.readable(min(start, self._begin), min(stop, self._begin))
        ids = np.concatenate([old, self._since(start, stop)])
        first, last = self._broken
        if max(start, first) < min(stop, last):
            ids[max(first - start, 0) : last - start] = -1
            damaged = sorted({*damaged, first // self.spec.block})
        self.damaged |= set(damaged)
        return ids, damaged

    def state(
        self, level: int, first: int = 0, count: int | None = None
    ) -> UInt8[np.ndarray, " n"]:
        """As `GistTree.state`."""
        first, count = self._nodes(level, first, count)
        nodes = range(first, first + count)
        old = len(range(first, min(first + count, self.tree.count(level))))
        new = [self._new.get((level, n), (None, State.ABSENT))[1] for n in nodes[old:]]
        before = self.tree.state(level, first, old) if old else []
        return np.concatenate([before, new]).astype(np.uint8)

    def write(
        self, level: int, first: int, gists: Float[np.ndarray, "n slots width"],
        partial: bool = False,
    ) -> None:  # fmt: skip
        """As `GistTree.write`, of nodes that the store does not have."""
        gists = np.asarray(gists)
        first, count = self._nodes(level, first, len(gists))
        if count and first < self.tree.count(level):
            raise StoreError(f"{self.path}: level {level}, node {first} is the store's own")
        held = self.spec.decode(self.spec.encode(level, gists))
        state = State.PARTIAL if partial else State.CURRENT
        self._new |= {(level, first + i): (held[i], state) for i in range(count)}

    def gists(
        self, level: int, first: int = 0, count: int | None = None, stale: bool = False
    ) -> Float[np.ndarray, "n slots width"]:
        """As `GistTree.gists`."""
        first, count = self._nodes(level, first, count)
        old = len(range(first, min(first + count, self.tree.count(level))))
        self._require(level, first + old, count - old, State.PARTIAL)
        new = [self._new[level, n][0] for n in range(first + old, first + count)]
        if not new:
            return self.tree.gists(level, first, count, stale)
        before = [self.tree.gists(level, first, old, stale)] if old else []
        return np.concatenate([*before, np.stack(new)])

    def _since(self, start: int, stop: int) -> Int32[np.ndarray, " n"]:
        return self._ids[max(start - self._begin, 0) : max(stop - self._begin, 0)]

    def _within(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= len(self):
            raise StoreError(
                f"{self.path}: tokens {start} to {stop} were asked for, the history has 0 to "
                f"{len(self)}"
            )
