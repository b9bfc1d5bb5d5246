"""Which working contexts are labelled, and where in a history they lie."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from latent_jax.core.config import field
from latent_jax.core.errors import ConfigError
from latent_jax.systems.megacontext.layout import Layout, cover_cost, least_cost
from latent_jax.systems.megacontext.policy_names import MEASURED, POLICIES


@dataclass(frozen=True)
class LabelConfig:
    """Which contexts are labelled."""

    budget: int = field(default=512, ge=1, help="entries of the working context, W")
    places: int = field(default=64, ge=1, help="snapshots")
    horizon: int = field(default=2, ge=1, help="blocks that are predicted")
    history: int | None = field(
        default=None, ge=2,
        help="most blocks of history before a place, which begins with a node of the top and a "
        "window of the encoder; none: what half of W holds at its coarsest",
    )  # fmt: skip
    policies: tuple[str, ...] = field(
        default=("recency", "bm25", "random"), help="which move the focus there, in turn"
    )
    actions: int | None = field(default=None, ge=1, help="measured per snapshot; none: all")
    drops: bool = field(default=True, help="also measure leaving each span out altogether")
    seed: int = field(default=0, ge=0, help="draws places, iterations and actions")

    def validate(self) -> None:
        """Refuses policies that no runtime can use."""
        unknown = [p for p in self.policies if p not in POLICIES or p == MEASURED]
        if unknown or not self.policies:
            usable = ", ".join(p for p in POLICIES if p != MEASURED)
            raise ConfigError(f"policies: {', '.join(unknown) or 'none given'}; usable: {usable}")


def labelled_blocks(
    layout: Layout, window: int, config: LabelConfig, blocks: int, where: str, remedy: str
) -> tuple[int, int, Int[np.ndarray, " n"]]:
    """Places of a history whose contexts can be labelled.

    Args:
      layout: of the tree.
      window: blocks that the base encodes together.
      config: which contexts.
      blocks: of the history.
      where: names the history in an error.
      remedy: what gives more of it.

    Returns:
      Blocks between the beginnings of stretches (where nodes of the top and windows of the encoder
      begin), the longest history of a place, and the places, in blocks.

    Raises:
      ConfigError: the history is too short for the places, or W too small.
    """
    step = math.lcm(int(layout.widths[-1]), window)
    history = config.history or _longest(layout, config.budget, step)
    least_cost(layout, history, config.budget)
    ends = np.arange(history, blocks - config.horizon + 1)
    firsts = -(-(ends - history) // step) * step
    ends = ends[ends - firsts > layout.protected]  # something must stand before the tail
    if len(ends) < config.places:
        raise ConfigError(
            f"{where}: {blocks} blocks have {len(ends)} places with at most {history} blocks of "
            f"history, of which {step} may be missing, and {config.horizon} to predict, and "
            f"{config.places} are wanted: {remedy}, lower --places, or give --history another "
            "number"
        )
    return step, history, ends


def _longest(layout: Layout, budget: int, step: int) -> int:
    """The longest history of whole steps that takes half of the budget at its coarsest."""
    steps = 1
    while int(cover_cost(layout, (steps + 1) * step, layout.levels)) <= budget // 2:
        steps += 1
    return steps * step
