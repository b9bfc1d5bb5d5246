"""A stored history as the base sees it: entries of any nodes, placed for a cursor.

The tokens and gists lie in a `GistTree`; raw blocks are encoded from their tokens when they are
asked for, a window at a time, and kept for a while. No entry depends on the others in the context,
so that exchanging one costs its own encoding and nothing else.
"""

from __future__ import annotations

import copy
import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from latent_jax.backbones import Backbone, Outline
from latent_jax.backbones.cross_entropy import token_cross_entropy
from latent_jax.backbones.sink import sink_token
from latent_jax.core import trees
from latent_jax.core.errors import StoreError
from latent_jax.systems.megacontext.attention import node_attention
from latent_jax.systems.megacontext.config import ModelConfig
from latent_jax.systems.megacontext.focus import Lens
from latent_jax.systems.megacontext.gist import GistNet, Gists, entry_offsets, grouped
from latent_jax.systems.megacontext.head_gists import HeadGists
from latent_jax.systems.megacontext.lens import TAIL_GISTS
from latent_jax.systems.megacontext.reading import encode_rows, place, read_on
from latent_jax.systems.megacontext.records import from_records, record_width, to_records
from latent_jax.systems.megacontext.sight import Look, Node, Sight, lens_net
from latent_jax.systems.megacontext.store import GistTree, Stretch, TreeSpec, build


class Entries(NamedTuple):
    """Entries of some nodes side by side, before rotation.

    Attributes:
      k: keys, and values ``v``.
      positions: rotary positions for the cursor that they were gathered for.
      bias: what each head adds to its logits; none: nothing.
    """

    k: Float[np.ndarray, "l m g d"]
    v: Float[np.ndarray, "l m g d"]
    positions: Int[np.ndarray, " m"]
    bias: Float[np.ndarray, "l m g"] | None = None

    def padded(self, capacity: int) -> Entries:
        """The same with zeros up to a length, so that one shape is compiled."""
        room = capacity - len(self.positions)
        k, v = (np.pad(x, [(0, 0), (0, room), (0, 0), (0, 0)]) for x in (self.k, self.v))
        bias = None if self.bias is None else np.pad(self.bias, [(0, 0), (0, room), (0, 0)])
        return Entries(k, v, np.pad(self.positions, (0, room)), bias)


def joined(parts: Sequence[Entries]) -> Entries:
    """Entries after one another."""
    k, v = (np.concatenate([getattr(x, name) for x in parts], axis=1) for name in "kv")
    bias = None
    if parts[0].bias is not None:
        bias = np.concatenate([x.bias for x in parts], axis=1)
    return Entries(k, v, np.concatenate([x.positions for x in parts]), bias)


class Memory:
    """A tree, the frozen base that reads it, and the GistNet (or `HeadGists`) that writes it.

    Args:
      backbone: the base.
      model: layout and GistNet options; the layout must be the tree's.
      params: trained parameters of the GistNet.
      tree: the history.
      windows: encoded windows of raw blocks that are kept.
      lens: trained parameters of the LensNet, if there are.
    """

    def __init__(
        self, backbone: Backbone, model: ModelConfig, params: Any, tree: GistTree,
        windows: int = 16, lens: Any = None,
    ):  # fmt: skip
        self.backbone, self.model, self.params, self.tree = backbone, model, params, tree
        self.decoder, self.base = backbone.decoder, backbone.params
        self.sink = sink_token(backbone.tokenizer)
        self.net = GistNet(model, backbone.config)
        self.heads = None
        if model.gist.kind == "heads":
            self.heads = HeadGists(model, backbone.decoder, self.sink)
            self._spread = jax.jit(self.heads.spread, static_argnames=("level",))
        self.lens: Lens | None = None
        if lens is not None:
            counts = None if self.heads is None else self.heads.all_counts(params)
            sight = Sight(tree, Look(backbone.config, model.lens, counts))
            self.lens = Lens(lens_net(model.lens, model.layout), lens, sight)
        # By window and where the history ended in it: a window that has grown is another.
        self._kept: OrderedDict[tuple[int, int], Gists] = OrderedDict()
        self._windows = windows
        self._encode = jax.jit(self._encode_window)
        self._make = jax.jit(self._gists, static_argnames=("level",))
        self._nll = jax.jit(self._losses)
        self._attention = jax.jit(self._node_attention, static_argnames=("nodes", "watched"))
        self._full = jax.jit(self._full_loss, static_argnames=("horizon",))

    @classmethod
    def open(
        cls,
        path: str | Path,
        backbone: Backbone,
        model: ModelConfig,
        params: Any,
        version: str,
        writable: bool = False,
        lens: Any = None,
    ) -> Memory:
        """Opens a store, or makes it if it is to be written.

        Args:
          version: digest of ``params``; gists of others are stale.
          lens: as in the constructor.

        Raises:
          StoreError: there is none, or it belongs to another base, tokenizer or layout, or its
            gists were made by another GistNet and it is not open for writing.
        """
        spec = spec_fields(backbone, model)
        if writable and not GistTree.exists(path):
            tree = GistTree.create(path, TreeSpec(**spec))
        else:
            tree = GistTree.open(path, writable, **spec)
        if writable:
            try:
                tree.set_version(version)
            except StoreError:
                tree.close(discard=True)
                raise
        elif tree.version != version:
            tree.close()
            raise StoreError(
                f"{path}: its gists are of version {tree.version or 'none'}, this run's are "
                f"{version}: run `latent-jax mega ingest` with this run first"
            )
        return cls(backbone, model, params, tree, lens=lens)

    def stretch(self, first: int) -> Memory:
        """The same memory, its history beginning at a later block; see `Stretch`."""
        other = copy.copy(self)
        other.tree = Stretch(self.tree, first, self.model.layout.levels)
        other._kept = OrderedDict()
        if self.lens is not None:
            sight = Sight(other.tree, self.lens.sight.look)
            other.lens = self.lens._replace(sight=sight)
        return other

    def __enter__(self) -> Memory:
        self.tree.__enter__()
        return self

    def __exit__(self, *problem: Any) -> None:
        self.tree.__exit__(*problem)

    @property
    def far(self) -> int:
        """Tokens before the cursor beyond which distance is not told apart: what the base was
        trained on, less room for what follows the cursor.
        """
        return self.backbone.config.max_position * 7 // 8

    def _encode_window(self, base: Any, row: Int[Array, "1 t"]) -> Gists:
        block, lead = self.model.layout.block, self.model.gist.lead
        return encode_rows(self.decoder, base, self.sink, row, block, lead)[0]

    def _gists(self, base: Any, params: Any, below: Any, level: int) -> Float[Array, "n s w"]:
        layout = self.model.layout
        if self.heads is not None and level == 1:
            return self.heads.of_rows(params, base, below.reshape(1, -1))
        if self.heads is not None:
            return self.heads.merge(params, below, level)
        if level == 1:
            below = self._encode_window(base, below.reshape(1, -1))
        else:
            children = below.reshape(-1, *below.shape[2:])
            below = grouped(from_records(children, self.backbone.config), layout.branching)
        return to_records(self.net.apply({"params": params}, below, level))

    def build(self, progress: Any = None) -> dict[int, int]:
        """Makes every gist that is missing or of another version; returns how many per level.

        Raises:
          StoreError: the tree is not open for writing.
        """
        layout = self.model.layout

        def make(level: int, children: np.ndarray) -> np.ndarray:
            if level == 1 or self.heads is None:
                return np.asarray(self._make(self.base, self.params, children, level))
            # One by one, and only those that are there: a node takes seconds.
            shape = (1, layout.slots[level - 1], children.shape[-1])
            made = [
                self._make(self.base, self.params, one[None], level) if one.any()
                else np.zeros(shape, np.float32) for one in children
            ]  # fmt: skip
            return np.concatenate(made)

        found = build(
            self.tree, make, batch=self.model.gist.window, neighbours=True,
            lead=self.model.gist.lead, top=layout.levels, progress=progress,
        )  # fmt: skip
        return found.nodes

    def prompt_gists(
        self, asked: Int[np.ndarray, " q"], stop: int | None = None
    ) -> Float[np.ndarray, "k s w"]:
        """Records of gists of a prompt that follows the history, cut from its end backwards.

        The first block is filled up with the end of the history.

        Args:
          asked: tokens of the prompt.
          stop: where the history ends, in tokens.
        """
        size, stop = self.model.layout.block, len(self.tree) if stop is None else stop
        count = min(-(-len(asked) // size), TAIL_GISTS, (stop + len(asked)) // size)
        before = max(count * size - len(asked), 0)
        rows = np.zeros(((lead := self.model.gist.lead) + TAIL_GISTS, size), np.int32)
        rows[:lead] = self._leading(stop - before)
        ids = np.concatenate([self.tree.tokens(stop - before, stop), asked])
        rows[lead : lead + count] = ids[len(ids) - count * size :].reshape(count, size)
        return np.asarray(self._make(self.base, self.params, rows, 1))[:count]

    def _leading(self, stop: int) -> Int[np.ndarray, "lead block"]:
        """Tokens of the blocks that lead to a place; -1 before the history begins."""
        size, lead = self.model.layout.block, self.model.gist.lead
        found = self.tree.tokens(max(stop - lead * size, 0), stop)
        return np.pad(found, (lead * size - len(found), 0), constant_values=-1).reshape(lead, size)

    def raw(self, block: int) -> Gists:
        """Entries of one block of tokens, ``[l, 1, block, g, d]``, encoded behind the blocks of its
        window that come before it.
        """
        window, size = self.model.gist.window, self.model.layout.block
        number, inside = divmod(block, window)
        start = number * window * size
        stop = min(start + window * size, len(self.tree))
        if (number, stop) not in self._kept:
            before = self._leading(start).reshape(-1)
            row = np.zeros((1, len(before) + window * size), np.int32)
            row[0, : len(before)] = before
            row[0, len(before) : len(before) + stop - start] = self.tree.tokens(start, stop)
            self._kept[number, stop] = jax.tree.map(np.asarray, self._encode(self.base, row))
            while len(self._kept) > self._windows:
                self._kept.popitem(last=False)
        self._kept.move_to_end((number, stop))
        return Gists(*(x[:, inside : inside + 1] for x in self._kept[number, stop]))

    def forget(self) -> None:
        """Drops the encoded windows that were kept."""
        self._kept.clear()

    def gather(self, nodes: Sequence[Node], cursor: int) -> Entries:
        """Entries of nodes, in their order.

        Args:
          nodes: ``(level, index)``; level 0 is a raw block.
          cursor: position of the next token, in tokens of the history.
        """
        layout, base = self.model.layout, self.backbone.config
        empty = np.zeros((base.num_layers, 0, base.num_kv_heads, base.head_dim), np.float32)
        parts, places = [(empty, empty, empty[..., 0])], [np.zeros(0, int)]
        for level, index in nodes:
            if level == 0:
                found = self.raw(index)
            elif self.heads is not None:
                found = self._spread(self.params, self.tree.gists(level, index, 1), level)
            else:
                found = from_records(self.tree.gists(level, index, 1), base)
            k, v, *bias = (np.asarray(x)[:, 0] for x in found)
            parts.append((k, v, *bias) if bias else (k, v, np.zeros(k.shape[:-1], k.dtype)))
            start = index * int(layout.widths[level]) * layout.block
            places.append(start + entry_offsets(self.model, level))
        k, v, bias = (np.concatenate(x, axis=1) for x in zip(*parts, strict=True))
        at = self.positions(np.concatenate(places), cursor)
        return Entries(k, v, at, None if self.heads is None else bias)

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
        if self.heads is not None:
            return capacity * -(-max(most, 1) // capacity)
        if most > capacity:
            raise StoreError(f"a context of {most} entries does not fit {capacity}")
        return capacity

    def positions(self, at: Int[np.ndarray, " m"], cursor: int) -> Int[np.ndarray, " m"]:
        """Rotary positions: where the text stood, unless that is farther back than `far`; then all
        that is farther stands there together and the cursor at `far`.
        """
        return np.maximum(np.asarray(at) - max(cursor - self.far, 0), 0)

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
        sizes = [len(c.positions) for c in contexts]
        capacity = self.places(capacity, max(sizes))
        padded = [c.padded(capacity) for c in contexts]
        k, v = (np.stack([getattr(c, name) for c in padded], 1) for name in "kv")
        bias = None if self.heads is None else np.stack([c.bias for c in padded], 1)
        at = np.stack([c.positions for c in padded])
        mask = np.arange(capacity)[None] < np.asarray(sizes)[:, None]
        first = int(self.positions(np.asarray([start]), start)[0])
        return np.asarray(self._nll(self.base, Gists(k, v), at, mask, rows, first, bias))

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
        entries = self.gather(nodes, start)
        places = self.places(capacity, len(entries.positions))
        widths = [len(entry_offsets(self.model, level)) for level, _ in nodes]
        owner = np.repeat(np.arange(len(nodes)), widths)
        owner = np.pad(owner, (0, places - len(owner)), constant_values=count)
        full, mask = entries.padded(places), np.arange(places)[None] < len(entries.positions)
        first = int(self.positions(np.asarray([start]), start)[0])
        return np.asarray(
            self._attention(
                self.base, full.k, full.v, full.positions, mask, full.bias, owner, ids, first,
                nodes=count, watched=watched,
            )
        )  # fmt: skip

    def _node_attention(self, base, k, v, at, mask, bias, owner, ids, first, nodes, watched):
        bias = None if bias is None else bias[:, None]
        placed = place(self.decoder, Gists(k[:, None], v[:, None]), at[None], mask, bias)
        return node_attention(
            self.decoder, base, self.sink, placed, owner, nodes, ids, first, watched
        )

    def full_loss(self, stop: int, horizon: int) -> float:
        """Mean loss of the last ``horizon`` tokens before ``stop``, everything before them raw and
        in one sequence.

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

    def _losses(self, base, entries, at, mask, ids, first, bias=None):
        placed = place(self.decoder, entries, at, mask, bias)
        where = first + jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        hidden = read_on(self.decoder, base, self.sink, placed, ids, where)
        nll, _ = token_cross_entropy(self.decoder, base, hidden[:, :-1], ids[:, 1:])
        return nll


def spec_fields(model: Backbone | Outline, config: ModelConfig) -> dict[str, Any]:
    """What the stores of a base and layout are, but for the dtype: fields of `TreeSpec`."""
    layout = config.layout
    return {
        "vocab_size": model.config.vocab_size,
        "width": record_width(model.config),
        "slots": layout.slots,
        "tokenizer": model.tokenizer.sha256,
        "base": model.sha256,
        "block": layout.block,
        "branch": layout.branching,
    }


def digest(params: Any) -> str:
    """Names a GistNet by its weights: 16 hexadecimal digits of their SHA-256."""
    found = hashlib.sha256()
    for name, leaf in sorted(trees.flatten(params).items()):
        found.update(name.encode())
        found.update(np.ascontiguousarray(leaf, np.float32).tobytes())
    return found.hexdigest()[:16]
