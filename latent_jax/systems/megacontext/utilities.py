"""From measured actions to one signed label per node: is detail worth more here than elsewhere?

An action's *value* is what an entry of detail earns there: the loss that expanding saves, or that
collapsing costs, divided by the entries that it moves. (The specification divides by the width of
the span; between levels the budget is counted in entries, and at one level the two are
proportional.) At the *price* of an entry, what is worth expanding asks for as much as what is worth
collapsing offers; a node's utility is its value above that price. So utilities balance the budget,
and unlike raw losses they change sign between what should be sharper and what should be coarser.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from latent_jax.systems.megacontext.counterfactual import Action
from latent_jax.systems.megacontext.layout import Layout

_HALVINGS = 60


def values(todo: Sequence[Action], delta_nll: Float[np.ndarray, " a"]) -> Float[np.ndarray, " a"]:
    """Nats per token of the horizon that an entry of detail earns, by action."""
    entries = np.asarray([action.entries for action in todo], np.float64)
    return -np.asarray(delta_nll, np.float64) / entries


def price(value: Float[np.ndarray, " a"], entries: Float[np.ndarray, " a"]) -> float:
    """The value at which asked and offered entries balance; 0 without both kinds of actions.

    Solves ``sum(relu(v - p) * e) = sum(relu(p - v) * -e)``, expands (``e > 0``) on the left and
    collapses (``e < 0``) on the right; the left falls with ``p`` and the right rises.

    Example:
      >>> price(np.array([3.0, 1.0]), np.array([2.0, -2.0]))
      2.0
    """
    value, entries = np.asarray(value, np.float64), np.asarray(entries, np.float64)
    if not ((entries > 0).any() and (entries < 0).any()):
        return 0.0
    low, high = float(value.min()), float(value.max())
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        above = np.maximum((value - middle) * np.sign(entries), 0)
        if float((above * entries).sum()) > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def utilities(
    layout: Layout, nodes: int, todo: Sequence[Action], delta_nll: Float[np.ndarray, " a"]
) -> tuple[Float[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Utility of each node, and where one was measured; a mean where there are two actions.

    All members of a sibling group share the value of collapsing it.

    Args:
      layout: sizes.
      nodes: length of the result, the places of the tiling.
      todo: measured actions.
      delta_nll: change of the loss by each.
    """
    total, count = np.zeros(nodes), np.zeros(nodes)
    value = values(todo, delta_nll)
    above = value - price(value, np.asarray([action.entries for action in todo]))
    for action, worth in zip(todo, above, strict=True):
        here = slice(action.at, action.at + len(action.gone))
        total[here] += worth
        count[here] += 1
    return (total / np.maximum(count, 1)).astype(np.float32), count > 0
