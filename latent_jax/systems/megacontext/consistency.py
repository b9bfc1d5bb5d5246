"""Do entries stand where their text did? A check beside whatever places them, in every evaluation.

Written from the definition and not from `positions`: a raw token stands at its own place, a slot of
a gist in the middle of its even share of the span, the entries of a gist of single heads' entries
from the first token of the span on and not beyond its end. What is compared is the distance to the
cursor, which is what rotary attention sees; beyond ``far`` all text is that far.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from latent_jax.systems.megacontext.model_config import ModelConfig
from latent_jax.systems.megacontext.positions import head_places


@dataclasses.dataclass
class Checked:
    """Entries that were looked at, and how many of them stood elsewhere."""

    entries: int = 0
    inconsistent: int = 0

    def add(self, wrong: np.ndarray) -> None:
        """Counts entries of one context."""
        self.entries += wrong.size
        self.inconsistent += int(wrong.sum())


def inconsistent(
    config: ModelConfig, nodes: Sequence[tuple[int, int]], positions: Int[np.ndarray, " m"],
    cursor: int, first: int, far: int, slots: bool = False,
) -> np.ndarray:  # fmt: skip
    """Which entries of a context do not stand where their span says.

    Args:
      nodes: level and index, in the order of the entries.
      positions: rotary positions of the entries.
      cursor: place in the history of the first token that is read behind them.
      first: its rotary position.
      far: tokens beyond which distance is not told apart.
      slots: gists have slots, whatever their kind is.

    Returns:
      Booleans ``[m]``; all true if the number of entries is not that of the nodes.
    """
    if config.positions.kind == "ordinal":  # by definition; there are as many as stand before
        count = sum(
            head_places(config, level) if config.gist.kind == "heads" and level and not slots
            else int(config.layout.costs[level]) for level, _ in nodes
        )  # fmt: skip
        same = np.asarray(positions) == np.arange(len(positions))
        return ~(same & (count == len(positions) == first))
    spans = [_span(config, level, index, slots) for level, index in nodes]
    low = np.concatenate([np.zeros(0), *(span[0] for span in spans)])
    high = np.concatenate([np.zeros(0), *(span[1] for span in spans)])
    if len(low) != len(positions):
        return np.ones(len(positions), bool)
    distance = first - np.asarray(positions)
    # What stands first in its room is the farthest; no number is neither.
    nearest, farthest = np.minimum(cursor - high, far), np.minimum(cursor - low, far)
    return ~((distance >= nearest) & (distance <= farthest))


def _span(
    config: ModelConfig, level: int, index: int, slots: bool
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """The first and the last place in the history that each entry of a node may have."""
    layout = config.layout
    size = layout.block * int(layout.widths[level])
    start = index * size
    if level == 0:
        at = start + np.arange(size, dtype=float)
        return at, at
    if config.gist.kind == "heads" and not slots:
        # Keys are rotated on from the first token, by as much as the node has room for.
        inside = layout.room(level) <= size
        at = np.full(head_places(config, level), start if inside else np.nan)
        return at, at
    share = size / layout.slots[level - 1]
    middle = start + np.arange(layout.slots[level - 1]) * share
    middle += (share - 1) / 2 if config.gist.place == "centre" else 0
    return np.floor(middle), middle
