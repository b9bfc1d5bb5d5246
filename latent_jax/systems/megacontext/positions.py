"""Where entries stand: the one place that maps nodes and the cursor to rotary positions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Float, Int

from latent_jax.backbones.config import DecoderConfig
from latent_jax.backbones.decoder import inverse_frequencies
from latent_jax.core.errors import ConfigError
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


class Placement:
    """Maps places in the history to rotary positions, for a cursor.

    By default text stands where it stood, unless that is farther back than ``far``; then all that
    is farther stands there together and the cursor at ``far``. With ``ordinal`` positions entries
    are numbered in the order of the history instead, and the cursor follows the last.

    Attributes:
      far: tokens before the cursor beyond which distance is not told apart.

    Args:
      config: the model.
      base: the frozen base.

    Raises:
      ConfigError: ``model.positions.far`` leaves the base no room for what follows the cursor.
    """

    def __init__(self, config: ModelConfig, base: DecoderConfig):
        most = base.max_position * 7 // 8  # what the base was trained on, less room for the rest
        far = config.positions.far
        if far is not None and far > most:
            raise ConfigError(
                f"model.positions.far={far}: the base has {base.max_position} positions and needs "
                f"some for what follows the cursor: use at most {most}"
            )
        self.ordinal = config.positions.kind == "ordinal"
        self.far = most if far is None else far

    def rotary(self, at: Int[np.ndarray, " m"], cursor: int) -> Int[np.ndarray, " m"]:
        """Rotary positions of all entries of a context.

        Args:
          at: their places in the history, in tokens; no two of a context alike if ordinal.
          cursor: place of the first token that is read behind them.
        """
        at = np.asarray(at)
        if self.ordinal:
            return np.argsort(np.argsort(at, kind="stable"), kind="stable")
        return np.maximum(at - max(cursor - self.far, 0), 0)

    def first(self, cursor: int, entries: int) -> int:
        """Rotary position of the token at the cursor, behind so many entries."""
        return entries if self.ordinal else min(cursor, self.far)


def damping(
    config: ModelConfig, base: DecoderConfig, level: int
) -> Float[np.ndarray, "l d"]:
    """What the keys of a level's slots are multiplied with when they are damped: by layer (one row
    if all are alike) and dimension.

    A slot stands for its stretch of ``w`` tokens, not for a point. The expectation of a rotation by
    ``theta * p`` over Gaussian places ``p`` of mean ``c`` and variance ``s^2`` is the rotation by
    ``theta * c`` times ``exp(-theta^2 s^2 / 2)``, and even places in a stretch have
    ``s^2 = (w^2 - 1) / 12``. So planes that turn often within the stretch say nothing of where in
    it the slot is (integrated positional encoding, Barron et al. 2021, "Mip-NeRF", eq. 9 to 14).
    """
    layout = config.layout
    stretch = layout.block * int(layout.widths[level]) / layout.slots[level - 1]
    theta = np.atleast_2d(inverse_frequencies(base)).astype(np.float64)
    kept = np.exp(-(theta**2) * (stretch**2 - 1) / 24)
    return np.concatenate([kept, kept], axis=-1).astype(np.float32)
