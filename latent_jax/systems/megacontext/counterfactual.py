"""What every focus action would be worth: losses behind contexts that differ in one action.

The entries of a working context do not depend on one another, so all counterfactuals of a snapshot
share one prefix cache: a pool of the context's entries and of what the actions would put in their
place. A counterfactual is a mask over it. Nothing but the tail and the horizon is run again; of
gists that are input embeddings, the pool is too, once for each mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from latent_jax.core.errors import ConfigError
from latent_jax.systems.megacontext import tiling as tl
from latent_jax.systems.megacontext.contexts import Entries, as_prefix, joined
from latent_jax.systems.megacontext.layout import Layout
from latent_jax.systems.megacontext.memory import Memory, Node
from latent_jax.systems.megacontext.positions import entry_offsets
from latent_jax.systems.megacontext.reading import read_on
from latent_jax.systems.megacontext.tiling import COLLAPSED, EXPANDED, Tiling

_legal = jax.jit(tl.legal, static_argnums=0)


class Action(NamedTuple):
    """One legal expand or collapse.

    Attributes:
      at: place in the tiling of the node, or of the first that collapses.
      kind: +1 expand, -1 collapse.
      entries: entries that it adds, or, negative, frees.
      span: tokens that it is about.
      gone: nodes that it takes out.
      made: nodes that it puts in their place.
    """

    at: int
    kind: int
    entries: int
    span: int
    gone: list[Node]
    made: list[Node]


class Measured(NamedTuple):
    """What the actions of a snapshot change, in nats per token of the horizon.

    Attributes:
      nll: loss behind the unchanged context.
      delta_nll: change of the loss by each action; negative is a gain.
      delta_kl: divergence of the predictions after it from those before.
      drop_delta_nll: change of the loss when what the action is about is left out altogether; NaN
        where that was not measured.
    """

    nll: float
    delta_nll: Float[np.ndarray, " a"]
    delta_kl: Float[np.ndarray, " a"]
    drop_delta_nll: Float[np.ndarray, " a"]


def actions(layout: Layout, tiling: Tiling) -> list[Action]:
    """All legal actions, in the order of the history; of one node the expand comes first."""
    may, b, found = _legal(layout, tiling), layout.branching, []
    expand, collapse = np.asarray(may.expand), np.asarray(may.collapse)
    for at, (level, index) in enumerate(tl.nodes(tiling)):
        node, span = (level, index), int(layout.widths[level]) * layout.block
        if expand[at]:
            finer = [(0, index)] if level == 1 else [(level - 1, index * b + i) for i in range(b)]
            cost = int(layout.expand_costs[level])
            found.append(Action(at, EXPANDED, cost, span, [node], finer))
        if collapse[at]:
            group = [(level, index + i) for i in range(b if level else 1)]
            coarser = (level + 1, index // b if level else index)
            freed = int(layout.collapse_gains[level])
            found.append(Action(at, COLLAPSED, -freed, span * len(group), group, [coarser]))
    return found


class Counterfactuals:
    """Measures actions on one memory.

    Args:
      memory: the history with its gists.
      budget: entries of the working context, W; sets the compiled shape.
      rows: contexts that are read at once.

    Raises:
      ConfigError: entries are numbered, and so would stand elsewhere in every counterfactual.
    """

    def __init__(self, memory: Memory, budget: int, rows: int = 8):
        layout, model = memory.model.layout, memory.model
        if model.positions.kind == "ordinal":
            raise ConfigError(
                "model.positions.kind=ordinal: actions are measured on entries that stay where "
                "they are: use original"
            )
        self.memory, self.budget, self.rows = memory, budget, rows
        # What a node takes in a prefix, by level: of gists of heads more than its cost.
        self._wide = np.asarray(
            [len(entry_offsets(model, level)) for level in range(layout.levels + 1)]
        )
        finer = [1, *[layout.branching] * (layout.levels - 1)]
        made = np.asarray([*(n * self._wide[i] for i, n in enumerate(finer)), *self._wide[1:]])
        # Opening an upper gist makes many times what other actions do; all would pay for its room.
        self._most = int(made.max())
        self._few = int(made[made <= max(self._most // 4, made.min())].max())
        self._read = jax.jit(self._branches, static_argnames=("horizon",))

    def measure(
        self, nodes: Sequence[Node], todo: Sequence[Action], ids: Int[np.ndarray, " t"],
        start: int, horizon: int, drops: bool = False, progress: Any = None,
    ) -> Measured:  # fmt: skip
        """Loss and divergence over the last ``horizon`` tokens of ``ids`` for every action.

        Args:
          nodes: the context without its protected tail.
          todo: actions on them.
          ids: the protected tail, then the horizon.
          start: position in the history of the first of them.
          drops: also measure leaving out what each action is about.
          progress: called as progress(done, total) after each batch.
        """
        shared = self.memory.gather(nodes, start)
        stops = np.cumsum([int(self._wide[level]) for level, _ in nodes])
        spans = dict(zip(nodes, zip(np.append(0, stops[:-1]), stops, strict=True), strict=False))
        branches = [(action, True) for action in todo]
        branches += [(action, False) for action in todo] if drops else []
        makes = np.asarray([self._makes(*branch) for branch in branches], int)
        nll, kl = np.zeros((2, len(branches)))
        before, done = float("nan"), 0
        for room, which in self._batches(makes):
            part = [branches[i] for i in which]
            pool, mask = self._pool(shared, spans, part, start, room)
            first_position = self.memory.placement.first(start, len(shared.positions))
            found = self._read(
                self.memory.base, self.memory.lora,
                {name: x[:, None] for name, x in pool.held.items()}, pool.positions,
                mask, np.asarray(ids, np.int32), first_position, horizon=horizon,
            )  # fmt: skip
            losses, divergence = (np.asarray(x, np.float64) for x in found)
            before = float(losses[0])
            nll[which] = losses[1 : len(part) + 1] - before
            kl[which] = divergence[1 : len(part) + 1]
            done += len(part)
            if progress is not None:
                progress(done, len(branches))
        n = len(todo)
        return Measured(before, nll[:n], kl[:n], nll[n:] if drops else np.full(n, np.nan))

    def _makes(self, action: Action, exchange: bool) -> int:
        """Entries that a branch puts into the pool."""
        return sum(int(self._wide[level]) for level, _ in action.made) if exchange else 0

    def _batches(self, makes: Int[np.ndarray, " n"]) -> Iterator[tuple[int, np.ndarray]]:
        """Branches that are read together, with the room for what each makes: of two sizes."""
        light = makes <= self._few
        for room, group in ((self._few, light), (self._most, ~light)):
            which = np.flatnonzero(group)
            for first in range(0, len(which), self.rows):
                yield room, which[first : first + self.rows]
        if not len(makes):  # the context itself
            yield self._few, np.zeros(0, int)

    def _pool(self, shared, spans, part, start, room) -> tuple[Entries, Bool[np.ndarray, "r m"]]:
        """The shared entries, then what each branch makes; row 0 of the mask is unchanged."""
        width = len(shared.positions)
        capacity = self.memory.places(self.budget, width) + self.rows * room
        mask = np.zeros((self.rows + 1, capacity), bool)
        mask[:, :width] = True
        pieces, at = [shared], width
        for row, (action, exchange) in enumerate(part, 1):
            for node in action.gone:
                mask[row, slice(*spans[node])] = False
            if exchange:
                found = self.memory.gather(action.made, start)
                mask[row, at : at + len(found.positions)] = True
                at += len(found.positions)
                pieces.append(found)
        pool = joined(pieces)
        self.memory.check(pool.nodes, pool.positions, start)
        return pool.padded(capacity), mask

    def _branches(
        self, base: Any, lora: Any, held: Any, at: Int[Array, " m"], mask: Bool[Array, "r m"],
        ids: Int[Array, " t"], first: Int[Array, ""], horizon: int,
    ) -> tuple[Float[Array, " r"], Float[Array, " r"]]:  # fmt: skip
        """Loss of every row, and ``KL(row 0 || row)``, means over the horizon."""
        decoder, rows = self.memory.decoder, mask.shape[0]
        prefix = as_prefix(decoder, base, self.memory.sink, held, at[None], mask)
        ids = jnp.broadcast_to(ids, (rows, ids.size))
        where = first + jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        hidden = read_on(decoder, base, self.memory.sink, prefix, ids, where, lora=lora)
        hidden = hidden[:, -horizon - 1 : -1]
        logits = decoder.apply({"params": base}, hidden, method="unembed")
        log = jax.nn.log_softmax(logits)
        nll = -jnp.take_along_axis(log, ids[:, -horizon:, None], axis=-1)[..., 0]
        kl = jnp.sum(jnp.exp(log[:1]) * (log[:1] - log), axis=-1)
        return nll.mean(1), kl.mean(1)
