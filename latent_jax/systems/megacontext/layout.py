"""Sizes of the working context: what a node of each level covers and costs."""

from __future__ import annotations

import dataclasses

import numpy as np

from latent_jax.core.config import field
from latent_jax.core.errors import ConfigError

_NODE = 2048  # positions over which the children of a node begin, at most


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a node covers and what it costs."""

    block: int = field(default=32, ge=2, help="tokens of a raw block, which is what it costs")
    branching: int = field(default=32, ge=2, help="gists under a gist of the next level")
    slots: tuple[int, ...] = field(
        default=(1, 16), ge=1, help="entries that a gist costs, by level from 1 to the top"
    )
    protected: int = field(default=4, ge=1, help="newest blocks that always stay raw")

    def __post_init__(self) -> None:
        if not self.slots:
            raise ConfigError("slots is empty: give the entries of a level 1 gist at least")
        whole = self.block
        for level, cost in enumerate(self.slots, 1):
            if not 1 <= cost < whole:
                below = "a raw block" if level == 1 else f"{self.branching} gists below"
                raise ConfigError(
                    f"slots={self.slots}: a gist of level {level} costs {cost} entries and "
                    f"replaces {below} at {whole}; it must cost at least 1 and less than that"
                )
            whole = self.branching * cost
        if self.branching ** (self.levels - 1) >= 2**31:
            raise ConfigError(
                f"slots={self.slots}: {self.levels} levels of {self.branching} are more blocks "
                "than an int32 counts; use fewer levels"
            )

    @property
    def levels(self) -> int:
        """The top level."""
        return len(self.slots)

    @property
    def widths(self) -> np.ndarray:
        """Blocks under a node, by level."""
        return np.array([1, *(self.branching**i for i in range(self.levels))], np.int32)

    @property
    def costs(self) -> np.ndarray:
        """Entries of a node, by level."""
        return np.array([self.block, *self.slots], np.int32)

    @property
    def expand_costs(self) -> np.ndarray:
        """Entries that expanding a node adds, by its level; 0 at level 0."""
        costs = self.costs
        children = [0, 1, *[self.branching] * (self.levels - 1)]
        below = np.array([0, *costs[:-1]], np.int32)
        return np.where(np.arange(len(costs)) > 0, children * below - costs, 0).astype(np.int32)

    @property
    def collapse_gains(self) -> np.ndarray:
        """Entries that collapsing a block or a sibling group frees, by its level; 0 at the top."""
        return np.append(self.expand_costs[1:], np.int32(0))

    def apart(self, level: int) -> int:
        """Positions between the children of a node of an upper level: their tokens, if not many.

        A node of the third level spans more tokens than a base has positions. Behind the farthest
        that it looks all text stands together, so the children of wide nodes do too, in order.

        Example:
          >>> layout = Layout(block=32, branching=32, slots=(4, 4, 4, 4))
          >>> [layout.apart(level) for level in (2, 3, 4)], layout.room(2), layout.room(4)
          ([32, 64, 64], 1024, 4992)
        """
        return min(self.block * int(self.widths[level - 1]), _NODE // self.branching)

    def room(self, level: int) -> int:
        """Positions that a node of gists of single heads' entries takes."""
        if level < 2:
            return self.block
        return self.room(level - 1) + (self.branching - 1) * self.apart(level)

    def capacity(self, budget: int) -> int:
        """Nodes that can be needed at once: a context of ``budget`` entries and one more block."""
        return budget // int(self.costs.min()) + 1


def cover_cost(layout: Layout, history, top: int):
    """Entries of ``history`` blocks with every node at level ``top``, or as near as it gets.

    What is too short for a node of that level at the end is covered by the levels below, and the
    protected tail is raw. Works on integers and on traced values.
    """
    protected = history - (history - layout.protected) * (history > layout.protected)
    rest, total = history - protected, protected * layout.block
    for level in range(top, -1, -1):
        width = int(layout.widths[level])
        total = total + rest // width * int(layout.costs[level])
        rest = rest % width
    return total


def least_cost(layout: Layout, history: int, budget: int) -> int:
    """Entries of a history at its coarsest.

    Raises:
      ConfigError: a working context of ``budget`` entries cannot hold them, or its protected tail.
    """
    needed = layout.protected * layout.block
    if budget < needed:
        raise ConfigError(
            f"the working context of {budget} entries is smaller than its protected tail of "
            f"{layout.protected} blocks ({needed} entries): raise W or lower protected"
        )
    least = int(cover_cost(layout, history, layout.levels))
    if budget < least:
        raise ConfigError(
            f"a history of {history} blocks needs {least} entries at its coarsest and the working "
            f"context has {budget}: raise W, lower protected, or add a level to slots="
            f"{layout.slots}"
        )
    return least


def roomy(layout: Layout, blocks: int, budget: int) -> Layout:
    """The layout with as many further levels as let half of W hold a history at its coarsest."""
    while int(cover_cost(layout, blocks, layout.levels)) > budget // 2:
        layout = dataclasses.replace(layout, slots=(*layout.slots, layout.slots[-1]))
        if layout.widths[-1] > blocks:
            break
    return layout
