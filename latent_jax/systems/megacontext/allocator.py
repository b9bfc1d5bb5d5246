"""The focus allocator: greedy, jitted and deterministic.

One iteration takes a signed score per node (positive: worth sharpening, negative: worth blurring)
and does two things.

1. *Fit.* While the context is over its budget, it collapses what scores lowest; nodes that have
   rested go before those that have not. No threshold, cooldown or count stops this, so the context
   fits whenever the history has a tiling that does (`cover_cost`).
2. *Exchange.* At most ``max_actions`` times: the node of highest score that may be expanded and
   can be paid for, by free room and by as few of the lowest-scoring collapses as are needed.
   Nothing is collapsed unless its room is used: an unused entry is worth nothing.

A sibling group scores the mean of its members and is left alone in an exchange while one of them
is itself to be expanded. Ties go to the older node (nearer to the start of the history). Nodes
that change in an iteration do not change again in its exchange.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from latent_jax.core.config import field
from latent_jax.core.errors import ConfigError
from latent_jax.systems.megacontext import tiling as tl
from latent_jax.systems.megacontext.layout import Layout
from latent_jax.systems.megacontext.tiling import COLLAPSED, EXPANDED, Tiling

# Larger than any score and far from overflow when a group of them is summed.
_FAR = 1e30


@dataclasses.dataclass(frozen=True)
class FocusConfig:
    """How eagerly the focus moves."""

    tau_expand: float = field(default=0.2, ge=0, help="a node scores more than this to be expanded")
    tau_collapse: float = field(
        default=0.2, ge=0, help="a block or group scores less than minus this to be collapsed"
    )
    hysteresis: float = field(
        default=0.1, ge=0, help="added to the threshold of an action that undoes the last one"
    )
    max_actions: int = field(default=4, ge=1, help="expands and collapses of one exchange (N_diff)")
    residency: int = field(
        default=3, ge=1, help="iterations that a node stays before an exchange may change it"
    )
    cooldown: int = field(
        default=6, ge=0, help="iterations before an exchange may undo the action that made a node"
    )


class Limits(NamedTuple):
    """The numbers of a `FocusConfig` that compiled code takes as arguments."""

    tau_expand: float
    tau_collapse: float
    hysteresis: float
    residency: int
    cooldown: int


class Trace(NamedTuple):
    """Actions of an iteration in their order, then zeros.

    Attributes:
      kind: +1 expand, -1 collapse, 0 none.
      level: level of the gist that is opened or made.
      index: its index. So an expand and a collapse with the same level and index undo each other.
      score: what decided it, the mean for a group.
      delta: entries added (expand) or, negative, freed (collapse).
      forced: whether it was needed to fit the budget.
      count: actions done; more than the arrays are long if a budget was overrun by more than one
        block, whose last forced actions are then not listed.
    """

    kind: Int[Array, " a"]
    level: Int[Array, " a"]
    index: Int[Array, " a"]
    score: Float[Array, " a"]
    delta: Int[Array, " a"]
    forced: Bool[Array, " a"]
    count: Int[Array, ""]


def trace_length(layout: Layout, max_actions: int) -> int:
    """Actions that one iteration can need when at most one block is over the budget."""
    least = min(int(gain) for gain in layout.collapse_gains[:-1])
    return max_actions + -(-layout.block // least)


def refocus(
    layout: Layout,
    config: FocusConfig,
    budget: int | Int[Array, ""],
    tiling: Tiling,
    scores: Float[Array, " n"],
) -> tuple[Tiling, Trace]:
    """One iteration; compiled once per layout, ``max_actions`` and length of the arrays.

    Args:
      layout: sizes.
      config: thresholds and limits.
      budget: entries of the working context, W.
      tiling: the context, with blocks appended since the last iteration; its arrays are at least
        `Layout.capacity` of the budget long.
      scores: one per node; NaN counts as 0, what the padding holds is not read.

    Raises:
      ConfigError: the arrays are too short for a budget that is a plain number.
    """
    n = tiling.level.shape[0]
    if isinstance(budget, int) and n < layout.capacity(budget):
        raise ConfigError(
            f"arrays of {n} nodes are too short for a context of {budget} entries, which needs "
            f"{layout.capacity(budget)}"
        )
    limits = Limits(*(jnp.asarray(getattr(config, name)) for name in Limits._fields))
    # Weakly typed arrays would be compiled for apart.
    tiling = Tiling(*(jnp.asarray(x, jnp.int32) for x in tiling))
    scores, budget = jnp.asarray(scores, jnp.float32), jnp.asarray(budget, jnp.int32)
    return _refocus(layout, config.max_actions, limits, budget, tiling, scores)


@functools.partial(jax.jit, static_argnames=("layout", "max_actions"))
def _refocus(
    layout: Layout,
    max_actions: int,
    limits: Limits,
    budget: Int[Array, ""],
    tiling: Tiling,
    scores: Float[Array, " n"],
) -> tuple[Tiling, Trace]:
    here = tl.valid(tiling)
    scores = jnp.nan_to_num(scores, nan=0.0, posinf=_FAR, neginf=-_FAR)
    scores = jnp.where(here, jnp.clip(scores, -_FAR, _FAR), 0.0)
    tiling = tiling._replace(age=jnp.where(here, tiling.age + 1, 0))
    length = trace_length(layout, max_actions)
    zeros = jnp.zeros(length, jnp.int32)
    trace = Trace(
        zeros, zeros, zeros, jnp.zeros(length), zeros, jnp.zeros(length, bool), jnp.int32(0)
    )
    tiling, scores, trace = _fit(layout, limits, budget, tiling, scores, trace)
    return _exchange(layout, max_actions, limits, budget, tiling, scores, trace)


def _fit(
    layout: Layout, limits: Limits, budget: Array, tiling: Tiling, scores: Array, trace: Trace
) -> tuple[Tiling, Array, Trace]:
    """Collapses until the budget holds or nothing is left to collapse."""

    def over(state):
        tiling, _, _ = state
        return (tl.cost(layout, tiling) > budget) & tl.legal(layout, tiling).collapse.any()

    def shrink(state):
        tiling, scores, trace = state
        may = tl.legal(layout, tiling).collapse
        rested = may & _rested(layout, limits, tiling)[1]
        pool = jnp.where(rested.any(), rested, may)
        mean = tl.group_mean(layout, tiling, scores)
        at = jnp.argmin(jnp.where(pool, mean, jnp.inf))
        trace = _record(layout, tiling, trace, at[None], mean, COLLAPSED, True, jnp.int32(1))
        chosen = jnp.arange(mean.shape[0]) == at
        after, source = tl.retile(layout, tiling, jnp.zeros_like(chosen), chosen)
        return after, jnp.where(chosen, mean, scores)[source], trace

    return jax.lax.while_loop(over, shrink, (tiling, scores, trace))


def _exchange(
    layout: Layout,
    max_actions: int,
    limits: Limits,
    budget: Array,
    tiling: Tiling,
    scores: Array,
    trace: Trace,
) -> tuple[Tiling, Trace]:
    """Expands what scores highest, paid for by what scores lowest."""
    n, k = scores.shape[0], min(max_actions, scores.shape[0])
    may, (rested, group_rested) = tl.legal(layout, tiling), _rested(layout, limits, tiling)
    undone, group_undone = _undone(layout, tiling)
    margin = limits.hysteresis
    wanted = may.expand & rested & (scores > limits.tau_expand + margin * undone)
    mean = tl.group_mean(layout, tiling, scores)
    given = may.collapse & group_rested & (mean < -(limits.tau_collapse + margin * group_undone))
    given &= ~tl.members(layout, tiling, wanted, False).any(-1)

    # Collapses are only ever taken in this order, so a pointer says which are used. top_k takes
    # the lower index, hence the older node, of equal values.
    order = jax.lax.top_k(jnp.where(given, -mean, -jnp.inf), k)[1]
    offered = jnp.minimum(given.sum(), k)
    freed = tl.by_level(layout.collapse_gains, tiling)[order]
    freed = jnp.where(jnp.arange(k) < offered, freed, 0)
    reach = jnp.concatenate([jnp.zeros(1, freed.dtype), jnp.cumsum(freed)])
    price = tl.by_level(layout.expand_costs, tiling)
    taken = jnp.zeros(n, bool)

    def one(_, state):
        taken, used, left, room, trace = state
        furthest = jnp.minimum(used + jnp.maximum(left - 1, 0), offered)
        payable = price <= room + reach[furthest] - reach[used]
        open_ = wanted & ~taken & payable & (left > 0)
        best = jnp.argmax(jnp.where(open_, scores, -jnp.inf))
        found = open_[best]
        enough = (room + reach - reach[used] >= price[best]) & (jnp.arange(k + 1) >= used)
        to = jnp.where(found, jnp.argmax(enough), used)
        paid = order[jnp.minimum(used + jnp.arange(k), k - 1)]
        trace = _record(layout, tiling, trace, paid, mean, COLLAPSED, False, to - used)
        done = found.astype(jnp.int32)
        trace = _record(layout, tiling, trace, best[None], scores, EXPANDED, False, done)
        room = room + reach[to] - reach[used] - jnp.where(found, price[best], 0)
        return taken.at[best].set(taken[best] | found), to, left - (to - used) - done, room, trace

    room = budget - tl.cost(layout, tiling)
    start = (taken, jnp.int32(0), jnp.int32(max_actions), room, trace)
    taken, used, _, _, trace = jax.lax.fori_loop(0, k, one, start)
    collapsed = (
        jnp.zeros(n, bool).at[jnp.where(jnp.arange(k) < used, order, n)].set(True, mode="drop")
    )
    return tl.retile(layout, tiling, taken, collapsed)[0], trace


def _undone(layout: Layout, tiling: Tiling) -> tuple[Array, Array]:
    """Whether expanding a node, and collapsing what it leads, would undo what made them."""
    opened = tl.members(layout, tiling, tiling.last == EXPANDED, False).any(-1)
    return tiling.last == COLLAPSED, opened


def _rested(layout: Layout, limits: Limits, tiling: Tiling) -> tuple[Array, Array]:
    """Whether residency and cooldown allow expanding a node, and collapsing what it leads."""
    undone, group_undone = _undone(layout, tiling)
    youngest = tl.members(layout, tiling, tiling.age, jnp.iinfo(jnp.int32).max).min(-1)
    wait, long = limits.residency, jnp.maximum(limits.residency, limits.cooldown)
    return (
        tiling.age >= jnp.where(undone, long, wait),
        youngest >= jnp.where(group_undone, long, wait),
    )


def _record(
    layout: Layout,
    tiling: Tiling,
    trace: Trace,
    at: Int[Array, " j"],
    scores: Float[Array, " n"],
    kind: int,
    forced: bool,
    count: Int[Array, ""],
) -> Trace:
    """Appends the first ``count`` of the nodes ``at``; what does not fit is counted only."""
    level, index = tiling.level[at], tiling.index[at]
    if kind == EXPANDED:
        delta = tl.by_level(layout.expand_costs, tiling)[at]
    else:
        delta = -tl.by_level(layout.collapse_gains, tiling)[at]
        level, index = level + 1, jnp.where(level > 0, index // layout.branching, index)
    j = jnp.arange(at.shape[0])
    place = jnp.where(j < count, trace.count + j, trace.kind.shape[0])
    rows = (kind, level, index, scores[at], delta, forced)
    written = (a.at[place].set(row, mode="drop") for a, row in zip(trace, rows, strict=False))
    return Trace(*written, trace.count + count)
