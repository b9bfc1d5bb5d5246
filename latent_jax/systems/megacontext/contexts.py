"""Entries of a working context, and what the frozen base attends to of them.

Entries are keys and values that do not depend on one another, or input embeddings that go through
the base in their order. Either way a context is a `KV` that the base reads on behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from latent_jax.backbones.decoder import KV, Decoder
from latent_jax.backbones.sink import sink_kv
from latent_jax.systems.megacontext.gist import Gists
from latent_jax.systems.megacontext.reading import place
from latent_jax.systems.megacontext.sight import Node

Held = dict[str, Any]


class Entries(NamedTuple):
    """Entries of some nodes side by side.

    Attributes:
      held: arrays whose axis 1 counts the entries. Keys ``k`` and values ``v`` before rotation,
        ``[l, m, g, d]``, and ``bias``, ``[l, m, g]``, of what each head adds to its logits; or
        input embeddings ``x``, ``[1, m, d]``, and ``at``, ``[1, m]``, where in the history each
        stands: it attends to those that stand no later.
      positions: rotary positions for the cursor that they were gathered for.
      nodes: level and index of what they are of, in their order.
    """

    held: Held
    positions: Int[np.ndarray, " m"]
    nodes: tuple[Node, ...]

    def padded(self, capacity: int) -> Entries:
        """The same with zeros up to a length, so that one shape is compiled."""
        room = capacity - len(self.positions)
        held = {
            name: np.pad(x, [(0, 0), (0, room), *[(0, 0)] * (x.ndim - 2)])
            for name, x in self.held.items()
        }
        return Entries(held, np.pad(self.positions, (0, room)), self.nodes)


def joined(parts: Sequence[Entries]) -> Entries:
    """Entries after one another."""
    held = {
        name: np.concatenate([part.held[name] for part in parts], axis=1) for name in parts[0].held
    }
    positions = np.concatenate([part.positions for part in parts])
    return Entries(held, positions, tuple(node for part in parts for node in part.nodes))


def stacked(
    contexts: Sequence[Entries], capacity: int
) -> tuple[Held, Int[np.ndarray, "b m"], Bool[np.ndarray, "b m"]]:
    """Contexts as the rows of a batch: what they hold (rows on axis 1), positions, which are
    there.
    """
    padded = [context.padded(capacity) for context in contexts]
    held = {name: np.stack([c.held[name] for c in padded], 1) for name in padded[0].held}
    sizes = np.asarray([len(c.positions) for c in contexts])
    there = np.arange(capacity) < sizes[:, None]
    return held, np.stack([c.positions for c in padded]), there


def as_prefix(
    decoder: Decoder, base: Any, sink: int, held: Held, at: Int[Array, "r m"],
    mask: Bool[Array, "b m"],
) -> KV:  # fmt: skip
    """Contexts as keys and values.

    Args:
      held: see `Entries`, with rows on axis 1: as many as in ``mask``, or one that all share.
      at: rotary positions, likewise.
      mask: which entries each context has.
    """
    b, m = mask.shape
    wide = lambda x, axis: jnp.broadcast_to(  # noqa: E731
        x, (*x.shape[:axis], b, *x.shape[axis + 1 :])
    )
    if "x" not in held:
        bias = held.get("bias")
        there = jnp.ones(at.shape, bool)
        placed = place(decoder, Gists(held["k"], held["v"]), at, there, bias)
        bias = None if bias is None else wide(placed.bias, 1)
        return KV(wide(placed.k, 1), wide(placed.v, 1), mask, bias)
    x, order = wide(held["x"], 1)[0], wide(held["at"], 1)[0]
    return pass_through(decoder, base, sink, x, wide(at, 0), order, mask)


def pass_through(
    decoder: Decoder, base: Any, sink: int, x: Float[Array, "b m d"], at: Int[Array, "b m"],
    order: Int[Array, "b m"], mask: Bool[Array, "b m"],
) -> KV:  # fmt: skip
    """Input embeddings through the base behind the sink, each in view of those that stand no later.

    Args:
      at: rotary positions.
      order: where in the history each stands, of which rotary positions may not tell all.
      mask: which entries there are.
    """
    sees = (order[:, :, None] >= order[:, None]) & mask[:, None]
    first = sink_kv(decoder, base, jnp.int32(sink), x.shape[0])
    x = x.astype(base["embed"].dtype)
    return decoder.apply({"params": base}, x, at, mask, sees, first).kv
