"""The working context: a contiguous tiling of the history by nodes of mixed levels of detail.

The history is cut into blocks of ``block`` tokens. A node of level 0 is one block as raw tokens. A
node ``(level, index)`` with level at least 1 is a gist of the blocks
``[index * w, (index + 1) * w)`` with ``w = branching ** (level - 1)``: one block at level 1, then
``branching`` times as many per level. A tiling holds nodes in the order of the history, each block
under exactly one of them, in arrays of a static length, so that everything here can be jitted and
mapped. The tokens after the last whole block are not in it: whoever runs the model keeps room for
them.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from latent_jax.core.errors import ConfigError
from latent_jax.systems.megacontext.layout import Layout, least_cost

EXPANDED, COLLAPSED = 1, -1


class Tiling(NamedTuple):
    """Nodes in the order of the history, padded; padding has level -1 and zeros.

    Attributes:
      level: level of detail, 0 is raw.
      index: place among the nodes of its level.
      age: focus iterations since the node came into the context.
      last: the action that made it: +1 expand, -1 collapse, 0 neither.
      count: how many nodes there are.
    """

    level: Int[Array, " n"]
    index: Int[Array, " n"]
    age: Int[Array, " n"]
    last: Int[Array, " n"]
    count: Int[Array, ""]


class Legal(NamedTuple):
    """What may be done, by position; a sibling group is named by its first node."""

    expand: Bool[Array, " n"]
    collapse: Bool[Array, " n"]


class Check(NamedTuple):
    """Invariants of a tiling; each is true of every tiling that the functions here make."""

    covered: Bool[Array, ""]
    levels: Bool[Array, ""]
    tail: Bool[Array, ""]
    padding: Bool[Array, ""]
    budget: Bool[Array, ""]

    @property
    def ok(self) -> Bool[Array, ""]:
        """Whether all hold."""
        return self.covered & self.levels & self.tail & self.padding & self.budget


def valid(tiling: Tiling) -> Bool[Array, " n"]:
    """Which places hold a node."""
    return jnp.arange(tiling.level.shape[0]) < tiling.count


def nodes(tiling: Tiling) -> list[tuple[int, int]]:
    """Level and index of every node, in the order of the history."""
    count = int(tiling.count)
    rows = (np.asarray(x)[:count].tolist() for x in (tiling.level, tiling.index))
    return list(zip(*rows, strict=True))


def by_level(table: np.ndarray, tiling: Tiling) -> Int[Array, " n"]:
    """Looks each node's level up in a table; 0 in the padding."""
    return jnp.where(valid(tiling), jnp.asarray(table)[jnp.maximum(tiling.level, 0)], 0)


def spans(layout: Layout, tiling: Tiling) -> tuple[Int[Array, " n"], Int[Array, " n"]]:
    """First and one past the last block of each node; both are the history's end in the padding."""
    width = by_level(layout.widths, tiling)
    start = tiling.index * width
    end = jnp.max(start + width, initial=0)
    return jnp.where(valid(tiling), start, end), jnp.where(valid(tiling), start + width, end)


def blocks(layout: Layout, tiling: Tiling) -> Int[Array, ""]:
    """Blocks of the history."""
    return by_level(layout.widths, tiling).sum()


def cost(layout: Layout, tiling: Tiling) -> Int[Array, ""]:
    """Entries of the working context."""
    return by_level(layout.costs, tiling).sum()


def tail(layout: Layout, tiling: Tiling) -> Bool[Array, " n"]:
    """Which nodes are the protected blocks."""
    start, _ = spans(layout, tiling)
    return valid(tiling) & (start >= blocks(layout, tiling) - layout.protected)


def legal(layout: Layout, tiling: Tiling) -> Legal:
    """What may be done.

    No raw block is expanded. What collapses is a raw block outside the protected tail, or all
    ``branching`` children of one node below the top level: a group with a child missing or at
    another level is never touched.
    """
    level, index, b = tiling.level, tiling.index, layout.branching
    here = valid(tiling)
    raw = (level == 0) & ~tail(layout, tiling)
    # The places of a contiguous tiling follow from its levels: b of one level are b neighbours.
    alike = (members(layout, tiling, level, -1) == level[:, None]).all(-1)
    group = (level >= 1) & (level < layout.levels) & (index % b == 0) & alike
    return Legal(here & (level >= 1), here & (raw | group))


def members(layout: Layout, tiling: Tiling, values: Array, fill: float | int | bool) -> Array:
    """What collapses together with each leader, ``[n, branching]``; a raw block is alone."""
    at = jnp.arange(values.shape[0])[:, None] + jnp.arange(layout.branching)
    group = values.at[at].get(mode="fill", fill_value=fill)
    alone = (tiling.level == 0)[:, None] & (jnp.arange(layout.branching) > 0)
    return jnp.where(alone, jnp.asarray(fill, values.dtype), group)


def group_mean(layout: Layout, tiling: Tiling, values: Float[Array, " n"]) -> Float[Array, " n"]:
    """Mean over what collapses together, at its leader; meaningless where none may collapse."""
    size = jnp.where(tiling.level == 0, 1.0, float(layout.branching))
    return members(layout, tiling, values, 0.0).sum(-1) / size


def retile(
    layout: Layout, tiling: Tiling, expand: Bool[Array, " n"], collapse: Bool[Array, " n"]
) -> tuple[Tiling, Int[Array, " n"]]:
    """Expands and collapses many nodes at once.

    Args:
      layout: sizes.
      tiling: what is there.
      expand: nodes that become their children (level 1: the raw block).
      collapse: raw blocks that become their gist, and leaders of sibling groups that become their
        parent. Both must be legal, no node may be in two actions, and the result must fit the
        arrays.

    Returns:
      The new tiling (changed nodes have age 0), and where in the old one each node comes from.
    """
    b, n, level = layout.branching, tiling.level.shape[0], tiling.level
    groups = jnp.cumsum(collapse & (level >= 1))
    inside = groups - jnp.pad(groups, (b, 0))[:n] > 0
    children = jnp.where(level > 1, b, 1)
    made = jnp.where(expand, children, jnp.where(inside & ~collapse, 0, 1))
    made = jnp.where(valid(tiling), made, 0)
    stops = jnp.cumsum(made)
    source = jnp.repeat(jnp.arange(n), made, total_repeat_length=n)
    child = jnp.arange(n) - (stops - made)[source]
    change = jnp.where(expand, EXPANDED, jnp.where(collapse, COLLAPSED, 0))[source]
    old, index = level[source], tiling.index[source]
    finer = jnp.where(old > 1, index * b + child, index)
    coarser = jnp.where(old > 0, index // b, index)
    out = Tiling(
        old - change,
        jnp.where(change == EXPANDED, finer, jnp.where(change == COLLAPSED, coarser, index)),
        jnp.where(change == 0, tiling.age[source], 0),
        jnp.where(change == 0, tiling.last[source], change),
        stops[-1].astype(tiling.count.dtype),
    )
    return _blank(out), source


def expand(layout: Layout, tiling: Tiling, at: int | Int[Array, ""]) -> Tiling:
    """Replaces the gist at a position by its children, or at level 1 by its raw block."""
    there = jnp.arange(tiling.level.shape[0]) == at
    return retile(layout, tiling, there, jnp.zeros_like(there))[0]


def collapse(layout: Layout, tiling: Tiling, at: int | Int[Array, ""]) -> Tiling:
    """Replaces a raw block by its gist, or the sibling group led from a position by its parent."""
    there = jnp.arange(tiling.level.shape[0]) == at
    return retile(layout, tiling, jnp.zeros_like(there), there)[0]


def append(layout: Layout, tiling: Tiling) -> Tiling:
    """Adds the next block, raw; the oldest protected one loses its protection.

    The arrays must have a place left, as those of `Layout.capacity` do whenever the context fits
    its budget; without one, `check` fails from then on.
    """
    at = tiling.count
    return Tiling(
        tiling.level.at[at].set(0, mode="drop"),
        tiling.index.at[at].set(blocks(layout, tiling), mode="drop"),
        tiling.age.at[at].set(0, mode="drop"),
        tiling.last.at[at].set(0, mode="drop"),
        at + 1,
    )


def check(
    layout: Layout,
    tiling: Tiling,
    history: int | Int[Array, ""],
    budget: int | Int[Array, ""] | None = None,
) -> Check:
    """Tests the invariants.

    Args:
      layout: sizes.
      tiling: what is tested.
      history: blocks that must be covered.
      budget: entries that must not be exceeded, if given.
    """
    here, (start, stop) = valid(tiling), spans(layout, tiling)
    follows = start[1:] == stop[:-1]
    n, level = tiling.level.shape[0], tiling.level
    blank = (level == -1) & (tiling.index == 0) & (tiling.age == 0) & (tiling.last == 0)
    return Check(
        (start[0] == 0) & (follows | ~here[1:]).all() & (blocks(layout, tiling) == history),
        (~here | ((level >= 0) & (level <= layout.levels))).all(),
        (~here | (stop <= history - layout.protected) | (level == 0)).all(),
        (here | blank).all() & (tiling.count >= 0) & (tiling.count <= n),
        jnp.asarray(True) if budget is None else cost(layout, tiling) <= budget,
    )


def start(
    layout: Layout, history: int, budget: int, capacity: int | None = None, coarse: bool = False
) -> Tiling:
    """A tiling for a history of any length: the protected tail raw, the far past as coarse as it
    gets, and what is left of the budget spent on detail from the tail backwards.

    Detail never increases with distance, except where the end of the history is too short for a
    coarser node.

    Args:
      layout: sizes.
      history: blocks.
      budget: entries of the working context, W.
      capacity: length of the arrays; `Layout.capacity` by default.
      coarse: spend nothing of what is left.

    Raises:
      ConfigError: W is smaller than the protected tail, or than the coarsest tiling, or the arrays
        are too short for W.
    """
    least = least_cost(layout, history, budget)
    capacity = layout.capacity(budget) if capacity is None else capacity
    if capacity < layout.capacity(budget):
        raise ConfigError(
            f"arrays of {capacity} nodes are too short for a context of {budget} entries, which "
            f"needs {layout.capacity(budget)}"
        )
    nodes = coarsest(layout, history)
    if not coarse:
        nodes = _refined(layout, nodes, budget - least)
    count = len(nodes)
    level, index = np.full(capacity, -1, np.int32), np.zeros(capacity, np.int32)
    if nodes:
        level[:count], index[:count] = np.array(nodes, np.int32).T
    zeros = jnp.zeros(capacity, jnp.int32)
    return Tiling(jnp.asarray(level), jnp.asarray(index), zeros, zeros, jnp.int32(count))


def coarsest(layout: Layout, history: int) -> list[tuple[int, int]]:
    """Level and index of the nodes that cover a history at the least cost, its tail raw."""
    at, end = 0, max(history - layout.protected, 0)
    nodes = []
    for level in range(layout.levels, 0, -1):
        width = int(layout.widths[level])
        stop = end // width
        nodes += [(level, index) for index in range(at // width, stop)]
        at = stop * width
    return nodes + [(0, index) for index in range(end, history)]


def _refined(layout: Layout, nodes: list[tuple[int, int]], room: int) -> list[tuple[int, int]]:
    """Expands from the newest node backwards while there is room, never finer than nearer ones."""
    todo, done, finest = list(nodes), [], 0
    while todo:
        level, index = todo.pop()
        price = int(layout.expand_costs[level])
        if level > finest and price <= room:
            room -= price
            first = index * layout.branching
            todo += (
                [(0, index)] if level == 1
                else [(level - 1, first + i) for i in range(layout.branching)]
            )  # fmt: skip
        else:
            finest = max(finest, level)
            done.append((level, index))
    return done[::-1]


def _blank(tiling: Tiling) -> Tiling:
    """Makes the padding canonical, so that equal tilings are equal arrays."""
    here = valid(tiling)
    return Tiling(
        jnp.where(here, tiling.level, -1),
        *(jnp.where(here, x, 0) for x in (tiling.index, tiling.age, tiling.last)),
        tiling.count,
    )
