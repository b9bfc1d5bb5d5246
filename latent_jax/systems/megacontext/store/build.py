"""Making the gists that are pending."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from latent_jax.core.errors import StoreError
from latent_jax.systems.megacontext.store.tokens import runs
from latent_jax.systems.megacontext.store.tree import DamagedGists, GistTree, State

# (level, children) -> gists [batch, slots, width]; children are tokens [batch, block] for level 1,
# else gists of the level below [batch, branch, slots, width].
GistFn = Callable[[int, np.ndarray], Any]


class Built(NamedTuple):
    """What `build` did.

    Attributes:
      nodes: gists made, per level, partial ones among them.
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
    breaks: Sequence[int] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Built:
    """Makes every pending gist whose children are there, level by level.

    Call it after each `append` to stream (one gist per whole block and one per `branch` of them:
    33 for 1024 tokens), or once at the end: the gists are the same bit for bit for the same
    `batch`. For that the batch has one size, filled with zeros, and a node always lies in the same
    row of it; a `gist_fn` must not let one row see another. A higher level is made from the level
    below as it is stored, rounded.

    A damaged block of tokens has no gist. What is made beside one, or above one, is stored as
    partial (`State`): of use, and made again once the tokens can be read. A block is encoded behind
    what follows the last damaged one before it; above, the nearest sound child stands in for one
    that is not there.

    Nothing is flushed here.

    Args:
      tree: open for writing, with its version set.
      gist_fn: see `GistFn`; called with NumPy arrays.
      batch: rows of one call. 1 wastes nothing when streaming, more is faster in bulk.
      neighbours: a batch of level 1 also holds the tokens of the blocks before those to be made,
        from the batch's first row on, so that a block can be encoded behind them.
      lead: rows of tokens in front of a batch of level 1, the blocks before its first one. With
        neighbours, -1 stands in all blocks that a block to be made must not be read behind: those
        before the history, before a break, and up to a damaged one.
      top: highest level to make; all that the history has by default.
      limit: make at most this many, to spread the work after a change of version.
      under: ``(level, first, count)``: only these nodes and what lies below them.
      breaks: blocks at which another text begins, of which no block before tells anything; first
        ones of a batch.
      progress: called with (level, nodes made) after each call.

    Raises:
      StoreError: no version, not writable, a result of the wrong shape or not finite, or a disk
        that is full or fails again and again.
    """
    if batch < 1:
        raise StoreError(f"build: batch={batch}; at least 1")
    if inside := [b for b in breaks if b % batch]:
        raise StoreError(f"build: a text begins at block {inside[0]}, within a batch of {batch}")
    if not tree.version:
        raise StoreError(f"{tree.path}: gists need a version; call set_version first")
    highest = tree.levels if under is None else under[0]
    top = highest if top is None else min(top, highest)
    work = _Work(tree, gist_fn, batch, neighbours, lead, top, under, limit, sorted(breaks))
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
    return Built(work.made, work.calls, sorted(work.lost))


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
        breaks: list[int],
    ):
        self.tree, self.gist_fn, self.batch = tree, gist_fn, batch
        self.neighbours, self.lead, self.breaks = neighbours, lead, breaks
        self.top, self.under, self.limit = top, under, limit
        self.made: dict[int, int] = {}
        self.calls = 0
        self.lost: set[int] = set()  # blocks whose tokens are damaged

    def level(self, level: int) -> Iterator[int]:
        """Makes the gists of one level; yields how many after each call."""
        nodes = self._nodes(level)
        if self.limit is not None:
            nodes = nodes[: max(self.limit - sum(self.made.values()), 0)]
        if not len(nodes):
            return
        starts = np.flatnonzero(np.diff(nodes // self.batch, prepend=-1))
        for group in np.split(nodes, starts[1:]):
            for children, made, sound in self._batches(level, group):
                gists = np.asarray(self.gist_fn(level, children))
                self.calls += 1
                if len(gists) != self.batch:
                    raise StoreError(
                        f"the gist function returned shape {gists.shape} for a batch of "
                        f"{self.batch}"
                    )
                for partial, which in ((False, made[sound]), (True, made[~sound])):
                    for first, count in runs(which):
                        row = first % self.batch
                        self.tree.write(level, first, gists[row : row + count], partial)
                self.made[level] = self.made.get(level, 0) + len(made)
                yield len(made)

    def _nodes(self, level: int) -> Int[np.ndarray, " n"]:
        """What is pending and can be made."""
        nodes = self.tree.pending(level)
        if not len(nodes):
            return nodes
        if self.under is not None:
            top, first, count = self.under
            width = self.tree.spec.branch ** (top - level)
            nodes = nodes[(nodes >= first * width) & (nodes < (first + count) * width)]
        if level == 1 or not len(nodes):
            return nodes
        there, sound = self._below(level, nodes)
        branch = self.tree.spec.branch
        gone = np.zeros(there.shape, bool)
        for at, child in np.argwhere(~there).tolist():
            gone[at, child] = self.tree.lost(level - 1, int(nodes[at]) * branch + child)
        # What is partial already would only be made of the same once more.
        new = sound.all(1) | (self._state(level, nodes) != State.PARTIAL)
        return nodes[(there | gone).all(1) & ~gone.all(1) & new]

    def _state(self, level: int, nodes: np.ndarray) -> np.ndarray:
        return np.concatenate([self.tree.state(level, *run) for run in runs(nodes)])

    def _below(
        self, level: int, nodes: np.ndarray
    ) -> tuple[Bool[np.ndarray, "n branch"], Bool[np.ndarray, "n branch"]]:
        """Which children of some nodes have a gist, and which one of sound tokens."""
        branch = self.tree.spec.branch
        states = [
            self.tree.state(level - 1, first * branch, count * branch).reshape(count, branch)
            for first, count in runs(nodes)
        ]
        states = np.concatenate(states)
        return states >= State.PARTIAL, states == State.CURRENT

    def _batches(
        self, level: int, group: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray, Bool[np.ndarray, " n"]]]:
        """What the gist function is called with, the nodes that it makes, and which are sound;
        node ``i`` lies in row ``i % batch``.
        """
        if level > 1:
            yield self._gists(level, group)
        elif not self.neighbours:
            yield from self._alone(group)
        else:
            yield from self._beside(group)

    def _alone(self, group: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Blocks that know of nothing else."""
        size = self.tree.spec.block
        rows = np.zeros((self.batch, size), np.int32)
        for first, count in runs(group):
            ids, damaged = self.tree.readable(first * size, (first + count) * size)
            self.lost |= set(damaged)
            rows[first % self.batch :][:count] = np.maximum(ids, 0).reshape(count, size)
        made = group[~np.isin(group, list(self.lost))]
        if len(made):
            yield rows, made, np.ones(len(made), bool)

    def _beside(self, group: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Blocks behind those before them, as far back as these belong to them and can be read."""
        size, at = self.tree.spec.block, int(group[0]) // self.batch * self.batch
        begin, stop = max(at - self.lead, 0), int(group[-1]) + 1
        ids, damaged = self.tree.readable(begin * size, stop * size)
        self.lost |= set(damaged) & set(group.tolist())
        last = -1 if not (old := [b for b in self.breaks if b <= at]) else old[-1] - 1
        group = group[~np.isin(group, damaged)]
        # The damaged block that each is read behind; what stands before it is left out.
        holes = np.asarray([max([d for d in damaged if d < node], default=-1) for node in group])
        holes = np.where(holes <= last, -1, holes).astype(int)
        state = self._state(1, group) if len(group) else group
        new = (holes < 0) | (state != State.PARTIAL)
        group, holes = group[new], holes[new]
        for hole in np.unique(holes):
            part, cut = group[holes == hole], max(int(hole), last) + 1
            rows = np.zeros((self.lead + self.batch, size), np.int32)
            rows[: self.lead] = -1
            end = int(part[-1]) + 1  # as many rows as there were when the last one was new
            row = self.lead + begin - at
            rows[row : row + end - begin] = ids[: (end - begin) * size].reshape(-1, size)
            rows[: max(self.lead + cut - at, 0)] = -1
            yield rows, part, np.full(len(part), hole < 0)

    def _gists(self, level: int, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Groups of gists; the nearest sound sibling stands in for one that is not there."""
        branch = self.tree.spec.branch
        there, sound = self._below(level, nodes)
        rows = None
        for node, mine in zip(nodes.tolist(), there, strict=True):
            held = np.flatnonzero(mine)
            near = held[np.abs(held[None] - np.arange(branch)[:, None]).argmin(1)]
            first = node * branch
            if mine.all():
                below = self.tree.gists(level - 1, first, branch)
            else:
                below = np.stack([self.tree.gists(level - 1, first + i, 1)[0] for i in near])
            if rows is None:
                rows = np.zeros((self.batch, *below.shape), below.dtype)
            rows[node % self.batch] = below
        return rows, nodes, sound.all(1)
