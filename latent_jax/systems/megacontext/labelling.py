"""Measuring the actions of working contexts along a stored history: what a lens learns from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from latent_jax.systems.megacontext import labels
from latent_jax.systems.megacontext import tiling as tl
from latent_jax.systems.megacontext.counterfactual import Counterfactuals, actions
from latent_jax.systems.megacontext.label_config import LabelConfig, labelled_blocks
from latent_jax.systems.megacontext.memory import Memory
from latent_jax.systems.megacontext.runtime import Runtime, RuntimeConfig

_STEPS = 16  # a snapshot is taken after 1 to so many focus iterations


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
    step, history, ends = labelled_blocks(
        layout, memory.model.gist.window, config, len(memory.tree) // size, str(memory.tree.path),
        "ingest more text",
    )  # fmt: skip
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
        "base": memory.backbone.sha256, "reader": memory.reader,
        "budget": config.budget, "horizon": config.horizon,
        "history_blocks": [history - step + 1, history],
        "policies": list(config.policies), "seed": config.seed,
    }  # fmt: skip
