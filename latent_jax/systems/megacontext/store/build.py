"""Making the gists that are pending."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from latent_jax.core.errors import StoreError
from latent_jax.systems.megacontext.store.tokens import DamagedTokens, runs
from latent_jax.systems.megacontext.store.tree import DamagedGists, GistTree, State

# (level, children) -> gists [batch, slots, width]; children are tokens [batch, block] for level 1,
# else gists of the level below [batch, branch, slots, width].
GistFn = Callable[[int, np.ndarray], Any]


class Built(NamedTuple):
    """What `build` did.

    Attributes:
      nodes: gists made, per level.
      calls: calls of the gist function.
      skipped: blocks whose tokens are damaged, and whose gists cannot be made.
    """

    nodes: dict[int, int]
    calls: int
    skipped: list[int]


def build(
    tree: GistTree,
    gist_fn: GistFn,
    *,
    batch: int = 32,
    neighbours: bool = False,
    lead: int = 0,
    top: int | None = None,
    limit: int | None = None,
    under: tuple[int, int, int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Built:
    """Makes every pending gist whose children are there, level by level.

    Call it after each `append` to stream (one gist per whole block and one per `branch` of them:
    33 for 1024 tokens), or once at the end: the gists are the same bit for bit for the same
    `batch`. For that the batch has one size, filled with zeros, and a node always lies in the same
    row of it; a `gist_fn` must not let one row see another. A higher level is made from the level
    below as it is stored, rounded.

    Nothing is flushed here.

    Args:
      tree: open for writing, with its version set.
      gist_fn: see `GistFn`; called with NumPy arrays.
      batch: rows of one call. 1 wastes nothing when streaming, more is faster in bulk.
      neighbours: a batch of level 1 also holds the tokens of the blocks before those to be made,
        from the batch's first row on, so that a block can be encoded behind them.
      lead: rows of tokens in front of a batch of level 1, the blocks before its first one; -1 where
        there are none, or damaged ones.
      top: highest level to make; all that the history has by default.
      limit: make at most this many, to spread the work after a change of version.
      under: ``(level, first, count)``: only these nodes and what lies below them.
      progress: called with (level, nodes made) after each call.

    Raises:
      StoreError: no version, not writable, a result of the wrong shape or not finite, or a disk
        that is full or fails again and again.
    """
    if batch < 1:
        raise StoreError(f"build: batch={batch}; at least 1")
    if not tree.version:
        raise StoreError(f"{tree.path}: gists need a version; call set_version first")
    highest = tree.levels if under is None else under[0]
    top = highest if top is None else min(top, highest)
    work = _Work(tree, gist_fn, batch, neighbours, lead, top, under, limit)
    level, mended = 1, set()
    while level <= work.top:
        try:
            for made in work.level(level):
                if progress is not None:
                    progress(level, made)
            level += 1
        except DamagedGists as error:
            # A child turned out to be damaged and is pending now: make it again first.
            again = {(error.level, node) for node in error.nodes}
            if again & mended:
                raise
            mended |= again
            level = error.level
    return Built(work.made, work.calls, sorted(work.skipped))


class _Work:
    def __init__(
        self,
        tree: GistTree,
        gist_fn: GistFn,
        batch: int,
        neighbours: bool,
        lead: int,
        top: int,
        under: tuple[int, int, int] | None,
        limit: int | None,
    ):
        self.tree, self.gist_fn, self.batch = tree, gist_fn, batch
        self.neighbours, self.lead = neighbours, lead
        self.top, self.under, self.limit = top, under, limit
        self.made: dict[int, int] = {}
        self.calls = 0
        self.skipped: set[int] = set()

    def level(self, level: int) -> Any:
        """Makes the gists of one level; yields how many after each call."""
        nodes = self._nodes(level)
        if self.limit is not None:
            nodes = nodes[: max(self.limit - sum(self.made.values()), 0)]
        if not len(nodes):
            return
        starts = np.flatnonzero(np.diff(nodes // self.batch, prepend=-1))
        for group in np.split(nodes, starts[1:]):
            wanted = group
            if level == 1 and self.neighbours:
                wanted = np.arange(group[0] // self.batch * self.batch, group[-1] + 1)
            children, filled = self._children(level, wanted)
            filled = np.intersect1d(filled, group).tolist()
            if not filled:
                continue
            if level == 1 and self.lead:
                children = np.concatenate([self._leading(int(group[0])), children])
            gists = np.asarray(self.gist_fn(level, children))
            self.calls += 1
            if len(gists) != self.batch:
                raise StoreError(
                    f"the gist function returned shape {gists.shape} for a batch of {self.batch}"
                )
            for first, count in runs(filled):
                row = first % self.batch
                self.tree.write(level, first, gists[row : row + count])
            self.made[level] = self.made.get(level, 0) + len(filled)
            yield len(filled)

    def _nodes(self, level: int) -> Int[np.ndarray, " n"]:
        nodes = self.tree.pending(level)
        if not len(nodes):
            return nodes
        branch = self.tree.spec.branch
        if self.under is not None:
            top, first, count = self.under
            width = branch ** (top - level)
            nodes = nodes[(nodes >= first * width) & (nodes < (first + count) * width)]
        if level == 1:
            return nodes[~np.isin(nodes, list(self.skipped))] if self.skipped else nodes
        ready = [
            self.tree.state(level - 1, first * branch, count * branch).reshape(count, branch)
            for first, count in runs(nodes)
        ]
        ready = [np.all(states == State.CURRENT, axis=1) for states in ready]
        return nodes[np.concatenate(ready)] if ready else nodes

    def _leading(self, block: int) -> Int[np.ndarray, "lead block"]:
        first = block // self.batch * self.batch
        rows = np.full((self.lead, self.tree.spec.block), -1, np.int32)
        before = np.arange(max(first - self.lead, 0), first)
        if len(before):
            size = self.tree.spec.block
            try:
                ids = self.tree.tokens(before[0] * size, first * size)
                rows[-len(before) :] = ids.reshape(-1, size)
            except DamagedTokens:
                pass  # as if the history began here
        return rows

    def _children(self, level: int, nodes: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """The batch, and which nodes are in it; node ``i`` lies in row ``i % batch``."""
        spec = self.tree.spec
        filled: list[int] = []
        if level == 1:
            rows = np.zeros((self.batch, spec.block), np.int32)
            for first, count in runs(nodes):
                row = first % self.batch
                start = first * spec.block
                try:
                    ids = self.tree.tokens(start, start + count * spec.block)
                except DamagedTokens as error:
                    damaged = {s // spec.block + i for s, e in error.spans
                               for i in range((e - s) // spec.block)}  # fmt: skip
                    self.skipped |= damaged
                    rest = [n for n in range(first, first + count) if n not in damaged]
                    if rest:
                        part, more = self._children(level, np.asarray(rest))
                        rows, filled = rows + part, filled + more
                    continue
                rows[row : row + count] = ids.reshape(count, spec.block)
                filled += range(first, first + count)
            return rows, filled
        below = [
            self.tree.gists(level - 1, first * spec.branch, count * spec.branch)
            for first, count in runs(nodes)
        ]
        shape = (spec.branch, *below[0].shape[1:])
        rows = np.zeros((self.batch, *shape), below[0].dtype)
        for (first, count), gists in zip(runs(nodes), below, strict=True):
            row = first % self.batch
            rows[row : row + count] = gists.reshape(count, *shape)
        return rows, nodes.tolist()
