"""The working context on the device: entries of nodes in a padded prefix, edited where they change.

No entry of kinds reads and heads depends on another, so what an edit costs is the encoding of the
nodes that come in and a scatter of their entries; where in the context it is does not matter, and
nothing that stays is computed again. The keys of all entries are rotated anew when live tokens are
read behind them (one multiplication each): beyond `Memory.far` every edit moves them all. Gists
that are input embeddings see one another, and the base reads all of them again.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from latent_jax.systems.megacontext.contexts import Held
from latent_jax.systems.megacontext.memory import Memory
from latent_jax.systems.megacontext.positions import entry_offsets
from latent_jax.systems.megacontext.sight import Node


class Edit(NamedTuple):
    """What changed.

    Attributes:
      first: share of the context's entries before the first that is new or comes after one that is
        gone, in the order of the history; 1 if none is.
      entries: entries that were written.
    """

    first: float
    entries: int


class WorkingContext:
    """Entries of at most so many, in places that stay theirs.

    Attributes:
      held: what `contexts.Entries` hold, ``[l, 1, places, ...]``; zeros where nothing is.
      nodes: in the order of the history.

    Args:
      memory: the history.
      capacity: entries of the compiled shape, W; more places where heads differ (`Memory.places`),
        which may grow by whole capacities and is then compiled again.
    """

    def __init__(self, memory: Memory, capacity: int):
        self.memory, self.capacity = memory, capacity
        model = memory.model
        levels = range(model.layout.levels + 1)
        self._offsets = [entry_offsets(model, level) for level in levels]
        self._chunk = max(map(len, self._offsets))  # entries that are written at once
        self.nodes: list[Node] = []
        self._slots: dict[Node, Int[np.ndarray, " n"]] = {}
        self.held: Held = {}
        self._where, self._there = np.zeros(0, int), np.zeros(0, bool)

    def edit(self, nodes: Sequence[Node], cursor: int) -> Edit:
        """Takes out what is no longer there and puts in what is new.

        Args:
          nodes: the context from now on, in the order of the history.
          cursor: position of the first live token.

        Raises:
          StoreError: it does not fit, or gists of a node are not there.
        """
        new = [node for node in nodes if node not in self._slots]
        found = self.memory.gather(new, cursor)  # before anything changes
        gone = set(self._slots) - set(nodes)
        first = self._first(nodes)
        for node in gone:
            self._there[self._slots.pop(node)] = False
        total = sum(len(self._offsets[level]) for level, _ in nodes)
        self._grow(self.memory.places(self.capacity, total), found.held)
        free, at = np.flatnonzero(~self._there), 0
        block = self.memory.model.layout.block
        for level, index in new:
            offsets = self._offsets[level]
            slots = free[at : at + len(offsets)]
            width = int(self.memory.model.layout.widths[level])
            self._where[slots] = index * width * block + offsets
            self._there[slots] = True
            self._slots[level, index], at = slots, at + len(offsets)
        self._write(free[:at], found.held)
        self.nodes = list(nodes)
        return Edit(first, at)

    def placed(
        self, cursor: int
    ) -> tuple[Int[np.ndarray, "1 places"], Bool[np.ndarray, "1 places"]]:
        """Rotary positions of all places for live tokens that begin at a cursor, and which hold
        an entry.
        """
        at = np.zeros(len(self._where), int)
        at[self._there] = self.memory.placement.rotary(self._where[self._there], cursor)
        return at[None].astype(np.int32), self._there[None].copy()

    def __len__(self) -> int:
        """Entries."""
        return int(self._there.sum())

    def standing(self, cursor: int) -> tuple[list[Node], Int[np.ndarray, " m"]]:
        """The nodes, and the rotary positions of their entries, in the order of the history."""
        slots = [self._slots[node] for node in self.nodes]
        order = np.concatenate([np.zeros(0, int), *slots])
        return self.nodes, self.placed(cursor)[0][0, order]

    def _first(self, nodes: Sequence[Node]) -> float:
        """See `Edit`."""
        same = 0
        for old, now in zip(self.nodes, nodes, strict=False):
            if old != now:
                break
            same += 1
        sizes = [len(self._offsets[level]) for level, _ in nodes]
        return sum(sizes[:same]) / max(sum(sizes), 1)

    def _grow(self, places: int, like: Held) -> None:
        """Makes room."""
        more = places - len(self._there)
        if more <= 0:
            return
        self._where, self._there = np.pad(self._where, (0, more)), np.pad(self._there, (0, more))
        for name, x in like.items():
            room = jnp.zeros((x.shape[0], 1, more, *x.shape[2:]), x.dtype)
            before = self.held.get(name)
            self.held[name] = room if before is None else jnp.concatenate([before, room], axis=2)

    def _write(self, slots: Int[np.ndarray, " m"], held: Held) -> None:
        """Scatters entries to their places, so many at a time."""
        for start in range(0, len(slots), self._chunk):
            part = slots[start : start + self._chunk]
            room = self._chunk - len(part)
            # What is beyond the places is dropped.
            part = np.pad(part, (0, room), constant_values=len(self._there))
            new = {
                name: np.pad(
                    x[:, start : start + self._chunk],
                    [(0, 0), (0, room), *[(0, 0)] * (x.ndim - 2)],
                )
                for name, x in held.items()
            }
            self.held = _scatter(self.held, part, new)


@functools.partial(jax.jit, donate_argnames="held")
def _scatter(held: Held, slots: Int[np.ndarray, " m"], new: Held) -> Held:
    return {name: x.at[:, 0, slots].set(new[name], mode="drop") for name, x in held.items()}
