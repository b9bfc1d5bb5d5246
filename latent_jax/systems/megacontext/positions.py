"""Where entries stand: the one place that maps nodes and the cursor to rotary positions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Int

from latent_jax.backbones.config import DecoderConfig
from latent_jax.systems.megacontext.layout import Layout
from latent_jax.systems.megacontext.model_config import ModelConfig


def slot_offsets(layout: Layout, level: int, place: str = "centre") -> np.ndarray:
    """Rotary position of each slot of a node relative to the node's first token.

    A slot stands in the middle (or at the start) of its even share of the span; raw tokens stand
    where they stand.

    Example:
      >>> slot_offsets(Layout(slots=(4,)), 1).tolist()
      [3, 11, 19, 27]
    """
    if level == 0:
        return np.arange(layout.block)
    slots = layout.slots[level - 1]
    stretch = layout.block * int(layout.widths[level]) / slots
    shift = (stretch - 1) / 2 if place == "centre" else 0.0
    return np.floor(np.arange(slots) * stretch + shift).astype(int)


def head_places(config: ModelConfig, level: int) -> int:
    """The most entries that a head has in a gist of ``kind`` heads."""
    layout = config.layout
    if level == 1:
        return layout.block
    return min(config.gist.places, layout.branching * head_places(config, level - 1))


def entry_offsets(config: ModelConfig, level: int) -> np.ndarray:
    """`slot_offsets` of what is read of a node: of ``kind`` heads a place for each of the most
    entries that a head may have, with keys that are rotated as from the node's first token.
    """
    if level and config.gist.kind == "heads":
        return np.zeros(head_places(config, level), int)
    return slot_offsets(config.layout, level, config.gist.place)


def slot_positions(
    config: ModelConfig, level: int, nodes: Int[Array, " n"]
) -> Int[Array, " m"]:
    """Rotary positions of all entries of some nodes of one level, where their text stood."""
    layout = config.layout
    span = layout.block * int(layout.widths[level])
    return (nodes[:, None] * span + entry_offsets(config, level)).reshape(-1)


def text_places(config: ModelConfig, nodes: Sequence[tuple[int, int]]) -> Int[np.ndarray, " m"]:
    """Where in the history, in tokens, the entries of some nodes stand, in their order."""
    layout = config.layout
    found = [np.zeros(0, int)]
    for level, index in nodes:
        start = index * int(layout.widths[level]) * layout.block
        found.append(start + entry_offsets(config, level))
    return np.concatenate(found)


def farthest(base: DecoderConfig) -> int:
    """Tokens before the cursor beyond which distance is not told apart: what the base was trained
    on, less room for what follows the cursor.
    """
    return base.max_position * 7 // 8


def rotary(at: Int[np.ndarray, " m"], cursor: int, far: int) -> Int[np.ndarray, " m"]:
    """Rotary positions: where the text stood, unless that is farther back than ``far``; then all
    that is farther stands there together and the cursor at ``far``.

    Args:
      at: places in the history, in tokens.
      cursor: position in the history of the next token.
      far: see `farthest`.
    """
    return np.maximum(np.asarray(at) - max(cursor - far, 0), 0)


def first_live(cursor: int, far: int) -> int:
    """Rotary position of the token at the cursor."""
    return min(cursor, far)
