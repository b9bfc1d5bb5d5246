"""Measuring the actions of working contexts along a stored history: what a lens learns from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from latent_jax.core.config import field
from latent_jax.core.errors import ConfigError
from latent_jax.systems.megacontext import labels
from latent_jax.systems.megacontext import tiling as tl
from latent_jax.systems.megacontext.config import MEASURED, POLICIES
from latent_jax.systems.megacontext.counterfactual import Counterfactuals, actions
from latent_jax.systems.megacontext.layout import Layout, cover_cost
from latent_jax.systems.megacontext.memory import Memory
from latent_jax.systems.megacontext.runtime import Runtime, RuntimeConfig

_STEPS = 16  # a snapshot is taken after 1 to so many focus iterations


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


def label(
    memory: Memory, config: LabelConfig, progress: Callable[[int, int], None] | None = None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Measures snapshots on the way of some policies through a history.

    A place has between ``history - step + 1`` and ``history`` blocks before it, where a step is
    the least stretch of whole nodes of the top level and whole windows of the encoder: the history
    must begin with one, and places fall anywhere. The provenance has both as ``history_blocks``.

    Args:
      memory: the history with all its gists.
      config: which contexts.
      progress: called as progress(snapshots done, snapshots).

    Returns:
      Rows and provenance for `labels.write`.

    Raises:
      ConfigError: the history is too short for the places, or W too small.
    """
    layout, size = memory.model.layout, memory.model.layout.block
    # Stretches begin where nodes of the top and windows of the encoder do.
    step = math.lcm(int(layout.widths[-1]), memory.model.gist.window)
    history = config.history or _roomy(layout, config.budget, step)
    tl.start(layout, history, config.budget)  # says at once if W is too small
    ends = np.arange(history, len(memory.tree) // size - config.horizon + 1)
    firsts = -(-(ends - history) // step) * step
    ends = ends[ends - firsts > layout.protected]  # something must stand before the tail
    if len(ends) < config.places:
        raise ConfigError(
            f"{memory.tree.path}: {len(memory.tree) // size} blocks have {len(ends)} places with "
            f"at most {history} blocks of history, of which {step} may be missing, and "
            f"{config.horizon} to predict, and {config.places} are wanted: ingest more text, lower "
            "--places, or give --history another number"
        )
    rng = np.random.default_rng(config.seed)
    places = np.sort(rng.choice(ends, config.places, replace=False))
    movers = [Runtime(memory, RuntimeConfig(config.budget, name)) for name in config.policies]
    counterfactuals = Counterfactuals(memory, config.budget)
    found: list[dict[str, Any]] = []
    here: Memory | None = None
    for number, end in enumerate(places.tolist()):
        first = -(-(end - history) // step) * step
        cursor = end - first
        if here is None or first != here.tree.first:  # its encoded windows serve several places
            here = memory.stretch(first)
        mover, start = movers[number % len(movers)], (cursor - layout.protected) * size
        mover.look_at(here)
        counterfactuals.memory = here
        live = here.tree.tokens(start, (cursor + config.horizon) * size)
        tiling = mover.settle(
            live[: layout.protected * size], cursor, seed=int(rng.integers(1 << 30)),
            iterations=int(rng.integers(1, _STEPS + 1)),
        )  # fmt: skip
        todo = actions(layout, tiling)
        if config.actions is not None and config.actions < len(todo):
            chosen = np.sort(rng.choice(len(todo), config.actions, replace=False))
            todo = [todo[i] for i in chosen]
        horizon = config.horizon * size
        measured = counterfactuals.measure(
            mover.nodes(tiling)[0], todo, live, start, horizon, config.drops
        )
        found += labels.rows(
            number, first, cursor, config.budget, mover.config.policy, horizon,
            tl.nodes(tiling), todo, measured,
        )  # fmt: skip
        if progress is not None:
            progress(number + 1, len(places))
    tokens = int(places[-1] + config.horizon) * size
    return found, {
        "store": str(memory.tree.path.resolve()), "tokens": tokens,
        "history": labels.history_digest(memory.tree, tokens), "gists": memory.tree.version,
        "base": memory.backbone.sha256, "budget": config.budget, "horizon": config.horizon,
        "history_blocks": [history - step + 1, history],
        "policies": list(config.policies), "seed": config.seed,
    }  # fmt: skip


def _roomy(layout: Layout, budget: int, step: int) -> int:
    """The longest history of whole steps that takes half of the budget at its coarsest."""
    steps = 1
    while int(cover_cost(layout, (steps + 1) * step, layout.levels)) <= budget // 2:
        steps += 1
    return steps * step
