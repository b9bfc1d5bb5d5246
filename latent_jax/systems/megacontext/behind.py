"""What a stored history is read for: losses, attention and prefixes behind working contexts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from latent_jax.backbones import Backbone
from latent_jax.backbones.cross_entropy import token_cross_entropy
from latent_jax.backbones.decoder import KV, Decoder
from latent_jax.backbones.generate import Begun, generate_ids, go_on, prefill
from latent_jax.backbones.sink import behind, sink_kv
from latent_jax.core.errors import ConfigError, StoreError
from latent_jax.nn.lora import merged
from latent_jax.systems.megacontext.attention import node_attention
from latent_jax.systems.megacontext.consistency import Checked, inconsistent
from latent_jax.systems.megacontext.contexts import Entries, as_prefix, stacked
from latent_jax.systems.megacontext.model_config import ModelConfig
from latent_jax.systems.megacontext.positions import Placement, entry_offsets
from latent_jax.systems.megacontext.reading import read_on
from latent_jax.systems.megacontext.sight import Node

# Prompts are padded to multiples of this, so that few lengths are compiled.
PROMPT = 64


class Behind:
    """Mixed into `memory.Memory`; needs its ``backbone``, ``model``, ``lora``, ``tree``, ``sink``,
    ``gather``, ``far`` and ``placement``.

    Attributes:
      checked: entries that were read, and how many stood elsewhere than their text.
    """

    backbone: Backbone
    model: ModelConfig
    decoder: Decoder
    base: Any
    lora: Any
    sink: int
    tree: Any
    far: int
    placement: Placement
    checked: Checked

    def _compiled(self) -> None:
        """Sets up what is compiled once."""
        self._merged: Any = None
        self.checked = Checked()
        self._nll = jax.jit(self._losses)
        self._prefix = jax.jit(self._as_prefix)
        self._attention = jax.jit(self._node_attention, static_argnames=("nodes", "watched"))
        self._full = jax.jit(self._full_loss, static_argnames=("horizon",))
        self._begin = jax.jit(self._read_live, static_argnames=("room",))

    def check(
        self, nodes: Sequence[Node], positions: Int[np.ndarray, " m"], cursor: int
    ) -> None:
        """Counts entries that do not stand where their text did (`consistency`) in ``checked``.

        Args:
          nodes: what is read, in the order of the entries.
          positions: their rotary positions.
          cursor: place in the history of the first token behind them.
        """
        first = self.placement.first(cursor, len(positions))
        self.checked.add(inconsistent(self.model, nodes, positions, cursor, first, self.far))

    def places(self, capacity: int, most: int) -> int:
        """Length of the compiled shape for contexts of ``capacity`` entries.

        A gist of single heads' entries takes as many places as its block has tokens, whatever it
        costs: the shape then grows by whole capacities, so that few are compiled.

        Args:
          capacity: entries that were asked for.
          most: places of the longest context.

        Raises:
          StoreError: a context does not fit.
        """
        if self.model.gist.kind == "heads":
            return capacity * -(-max(most, 1) // capacity)
        if most > capacity:
            raise StoreError(f"a context of {most} entries does not fit {capacity}")
        return capacity

    def prefix(self, entries: Entries, capacity: int) -> KV:
        """One context as the base attends to it, padded to ``capacity`` (more where heads differ;
        see `places`).
        """
        held, at, mask = stacked([entries], self.places(capacity, len(entries.positions)))
        return self._prefix(self.base, held, at, mask)

    def continued(
        self, entries: Entries | None, live: Int[np.ndarray, " t"], start: int, capacity: int,
        max_new_tokens: int,
    ) -> str:  # fmt: skip
        """What the base says, greedily, after tokens that follow a context.

        Args:
          entries: the context; none: nothing but the tokens.
          live: tokens.
          start: position of the first of them in the history.
          capacity: entries of the compiled shape.
          max_new_tokens: at most so many.

        Raises:
          ConfigError: more than the base has positions for.
        """
        count = 0 if entries is None else len(entries.positions)
        self.check_room(start, len(live), max_new_tokens, count)
        first = sink_kv(self.decoder, self.base, jnp.int32(self.sink), 1)
        if entries is not None:
            self.check(entries.nodes, entries.positions, start)
            first = behind(first, self.prefix(entries, capacity))
        tokenizer, room = self.backbone.tokenizer, -len(live) % PROMPT
        row, mask = np.pad(live, (room, 0))[None], np.arange(len(live) + room)[None] >= room
        out = generate_ids(
            self.decoder, self._reading(), self.backbone.embed(row), mask,
            max_new_tokens=max_new_tokens, prefix=first,
            start=self.placement.first(start, count),
            stop_ids=tokenizer.stop_ids,
        )  # fmt: skip
        return tokenizer.decode(np.asarray(out.tokens)[0, : int(out.lengths[0])])

    def _reading(self) -> Any:
        """The base's parameters where it reads on, with the deltas that it has there."""
        if self.lora is None:
            return self.base
        if self._merged is None:
            self._merged = merged(self.base, self.lora)
        return self._merged

    def begin(
        self, context: Any, live: Int[np.ndarray, " t"], start: int, width: int, room: int
    ) -> Begun:
        """Reads live tokens behind a context: what follows can be decoded (`generate.go_on`).

        Args:
          context: what they stand behind, a `WorkingContext`.
          live: tokens.
          start: position of the first of them in the history.
          width: tokens of the compiled shape.
          room: free entries for what follows.
        """
        self.check(*context.standing(start), start)
        gap = width - len(live)
        row, mask = np.pad(live, (gap, 0))[None], np.arange(width)[None] >= gap
        where = np.asarray([self.placement.first(start, len(context))])
        return self._begin(
            self.base, self._reading(), context.held, *context.placed(start), row, mask, where,
            room=room,
        )  # fmt: skip

    def decode(self, begun: Begun, room: int, limit: int) -> tuple[list[int], bool]:
        """Greedy tokens behind what was read, without the one that ends a text, and whether there
        was one.
        """
        stops = self.backbone.tokenizer.stop_ids
        out = go_on(self.decoder, self._reading(), begun, room, limit, stops)
        ids, stopped = np.asarray(out.tokens)[0, : int(out.lengths[0])].tolist(), bool(out.stopped)
        return ids[: len(ids) - stopped], stopped

    def _read_live(self, base, reading, held, at, there, row, mask, where, room):
        prefix = behind(
            sink_kv(self.decoder, base, jnp.int32(self.sink), 1),
            self._as_prefix(base, held, at, there),
        )
        x = self.decoder.apply({"params": base}, row, method="embed")
        return Begun(*prefill(self.decoder, reading, x, mask, where, prefix, room))

    def check_room(self, start: int, live: int, new: int, entries: int) -> None:
        """Refuses text whose last token would stand where the base has no position any more.

        How many entries stand before it matters only if these are numbered: others stand where
        their text did.

        Args:
          start: position in the history of the first live token.
          live: tokens from there on.
          new: tokens that follow them.
          entries: of the context, at most.

        Raises:
          ConfigError: too many.
        """
        most = self.backbone.config.max_position
        first = self.placement.first(start, entries)
        if first + live + new > most:
            raise ConfigError(
                f"{live} live tokens from rotary position {first} on and {new} new ones do not fit "
                f"the base's {most} positions: ask for fewer, or ask less"
            )

    def _as_prefix(self, base, held, at, mask):
        return as_prefix(self.decoder, base, self.sink, held, at, mask)

    def losses(
        self, contexts: Sequence[Entries], ids: Int[np.ndarray, " t"], start: int, horizon: int,
        capacity: int,
    ) -> Float[np.ndarray, " b"]:  # fmt: skip
        """Mean loss of the last ``horizon`` tokens of ``ids`` behind each context, nats per token.

        Args:
          contexts: what stands for everything before ``start``.
          ids: tokens from ``start`` on: the tail, then the horizon.
          start: position of the first of them in the history.
          horizon: how many of the last ones are predicted.
          capacity: entries of the compiled shape; no context has more.

        Raises:
          StoreError: a context has more entries.
        """
        rows = np.broadcast_to(np.asarray(ids, np.int32), (len(contexts), len(ids)))
        return self.token_losses(contexts, rows, start, capacity)[:, -horizon:].mean(1)

    def token_losses(
        self, contexts: Sequence[Entries], rows: Int[np.ndarray, "b t"], start: int, capacity: int
    ) -> Float[np.ndarray, "b t-1"]:
        """Loss of every token but the first of each row behind its context, nats; see `losses`."""
        most = max(len(c.positions) for c in contexts)
        for one in {id(c): c for c in contexts}.values():
            self.check(one.nodes, one.positions, start)
        held, at, mask = stacked(contexts, self.places(capacity, most))
        first = [[self.placement.first(start, len(c.positions))] for c in contexts]
        first = np.asarray(first, np.int32)
        return np.asarray(self._nll(self.base, self.lora, held, at, mask, rows, first))

    def attention(
        self, nodes: Sequence[Node], ids: Int[np.ndarray, " t"], start: int, watched: int,
        capacity: int, count: int,
    ) -> Float[np.ndarray, " n"]:  # fmt: skip
        """What the last tokens attend to in each node; see `attention.node_attention`.

        Args:
          nodes: of a context; what is not among them gets 0.
          ids: tokens that follow it, in multiples of a block so that few lengths are compiled.
          start: position of the first of them in the history.
          watched: how many of the last ones are asked.
          capacity: entries of the compiled shape.
          count: nodes of the compiled shape.
        """
        readable = [(i, node) for i, one in enumerate(nodes) for node in self.sound([one])]
        entries = self.gather([node for _, node in readable], start)
        self.check(entries.nodes, entries.positions, start)
        places = self.places(capacity, len(entries.positions))
        widths = [len(entry_offsets(self.model, level)) for _, (level, _) in readable]
        owner = np.repeat(np.asarray([i for i, _ in readable], int), widths)
        owner = np.pad(owner, (0, places - len(owner)), constant_values=count)
        held, at, mask = stacked([entries], places)
        first = self.placement.first(start, len(entries.positions))
        return np.asarray(
            self._attention(
                self.base, held, at, mask, owner, ids, first, nodes=count, watched=watched
            )
        )

    def _node_attention(self, base, held, at, mask, owner, ids, first, nodes, watched):
        placed = self._as_prefix(base, held, at, mask)
        return node_attention(
            self.decoder, base, self.sink, placed, owner, nodes, ids, first, watched
        )

    def full_loss(self, stop: int, horizon: int) -> float:
        """Mean loss of the last ``horizon`` tokens before ``stop``, everything before them raw and
        in one sequence, read by the base as it is.

        Raises:
          StoreError: that is longer than the base can read.
        """
        if stop > self.backbone.config.max_position:
            raise StoreError(
                f"{stop} tokens do not fit the base's {self.backbone.config.max_position}: leave "
                "out the arm full"
            )
        return float(self._full(self.base, self.tree.tokens(0, stop)[None], horizon))

    def _full_loss(self, base, ids, horizon):
        where = jnp.arange(ids.shape[1])[None]
        hidden = read_on(self.decoder, base, self.sink, None, ids, where)[:, -horizon - 1 : -1]
        nll, _ = token_cross_entropy(self.decoder, base, hidden, ids[:, -horizon:])
        return nll.mean()

    def _losses(self, base, lora, held, at, mask, ids, first):
        placed = self._as_prefix(base, held, at, mask)
        where = first + jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        hidden = read_on(self.decoder, base, self.sink, placed, ids, where, lora=lora)
        nll, _ = token_cross_entropy(self.decoder, base, hidden[:, :-1], ids[:, 1:])
        return nll
