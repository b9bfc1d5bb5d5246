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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from latent_jax.backbones import Backbone, Outline
from latent_jax.backbones.sink import sink_token
from latent_jax.core import trees
from latent_jax.core.errors import StoreError
from latent_jax.systems.megacontext.behind import Behind
from latent_jax.systems.megacontext.contexts import Entries, Held
from latent_jax.systems.megacontext.embedding_gists import EmbeddingGists
from latent_jax.systems.megacontext.focus import Lens
from latent_jax.systems.megacontext.gist import GistNet, Gists, damped, grouped
from latent_jax.systems.megacontext.head_gists import HeadGists
from latent_jax.systems.megacontext.lens import TAIL_GISTS
from latent_jax.systems.megacontext.matcher import Finder
from latent_jax.systems.megacontext.model_config import GistConfig, ModelConfig
from latent_jax.systems.megacontext.positions import Placement, text_places
from latent_jax.systems.megacontext.reading import encode_rows
from latent_jax.systems.megacontext.records import from_records, record_width, to_records
from latent_jax.systems.megacontext.sight import Look, Node, Sight, lens_net
from latent_jax.systems.megacontext.store import GistTree, Overlay, Stretch, TreeSpec, build


class Memory(Behind):
    """A tree, the frozen base that reads it, and the GistNet (or `HeadGists`) that writes it.

    Args:
      backbone: the base.
      model: layout and GistNet options; the layout must be the tree's.
      params: trained parameters of the GistNet.
      tree: the history.
      windows: encoded windows of raw blocks that are kept.
      lens: trained parameters of the LensNet, if there are.
      matcher: trained parameters of the matcher, if there are.
      kept: where the matcher's vectors are kept; see `matcher.Finder`.
      lora: deltas of the base where it reads on behind a context (`base_lora.deltas`), if any.
    """

    def __init__(
        self, backbone: Backbone, model: ModelConfig, params: Any, tree: GistTree,
        windows: int = 16, lens: Any = None, matcher: Any = None, kept: str | Path | None = None,
        lora: Any = None,
    ):  # fmt: skip
        self.backbone, self.model, self.params, self.tree = backbone, model, params, tree
        self.lora = lora
        self.damaged: list[int] = []
        self.decoder, self.base = backbone.decoder, backbone.params
        self.sink = sink_token(backbone.tokenizer)
        self.placement = Placement(model, backbone.config)
        self.net = GistNet(model, backbone.config)
        self.heads = self.embeddings = None
        if model.gist.kind == "heads":
            self.heads = HeadGists(model, backbone.decoder, self.sink)
            self._spread = jax.jit(self.heads.spread, static_argnames=("level",))
        elif model.gist.kind == "embeddings":
            self.embeddings = EmbeddingGists(model, backbone.decoder, self.sink)
        self.finder: Finder | None = None
        if matcher is not None:
            self.finder = Finder(backbone, model.matcher, model.layout.block, matcher, kept)
        self.lens: Lens | None = None
        if lens is not None:
            counts = None if self.heads is None else self.heads.all_counts(params)
            sight = Sight(tree, Look(backbone.config, model.lens, counts))
            self.lens = Lens(lens_net(model.lens, model.layout), lens, sight)
        # By window, where the history ended in it (one that has grown is another), and the damaged
        # block that it is read behind.
        self._kept: OrderedDict[tuple[int, int, int], Gists] = OrderedDict()
        self._windows = windows
        self._encode = jax.jit(self._encode_window)
        self._make = jax.jit(self._gists, static_argnames=("level",))
        self._compiled()

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
        matcher: Any = None,
        lora: Any = None,
        append: bool = False,
    ) -> Memory:
        """Opens a store, or makes it if it is to be written.

        Args:
          version: digest of ``params``; gists of others are stale.
          lens: as in the constructor.
          matcher: as in the constructor; its vectors are kept beside the store.
          lora: as in the constructor.
          append: open it for writing, but as one that is read: there and of this version.

        Raises:
          StoreError: there is none, or it belongs to another base, tokenizer or layout, or its
            gists were made by another GistNet and it is not open for writing.
        """
        spec = spec_fields(backbone, model)
        if writable and not GistTree.exists(path):
            tree = GistTree.create(path, TreeSpec(**spec))
        else:
            tree = GistTree.open(path, writable or append, **spec)
        if writable:
            try:
                tree.set_version(version)
            except StoreError:
                tree.close(discard=True)
                raise
        elif tree.version != version:
            tree.close(discard=True)
            raise StoreError(
                f"{path}: its gists are of version {tree.version or 'none'}, this run's are "
                f"{version}: run `latent-jax mega ingest` with this run first"
            )
        return cls(
            backbone, model, params, tree, lens=lens, matcher=matcher, kept=path, lora=lora
        )

    def stretch(self, first: int) -> Memory:
        """The same memory, its history beginning at a later block; see `Stretch`."""
        return self._over(Stretch(self.tree, first, self.model.layout.levels))

    def grown(self) -> Memory:
        """The same memory, whose history goes on without the store's; see `Overlay`."""
        return self._over(Overlay(self.tree))

    def _over(self, tree: Any) -> Memory:
        """The same memory of another tree."""
        other = copy.copy(self)
        other.tree, other._kept = tree, OrderedDict()
        if self.lens is not None:
            other.lens = self.lens._replace(sight=Sight(tree, self.lens.sight.look))
        return other

    def __enter__(self) -> Memory:
        self.tree.__enter__()
        return self

    def __exit__(self, *problem: Any) -> None:
        self.tree.__exit__(*problem)

    @property
    def reader(self) -> str:
        """Names what reads behind contexts; see `reader_version`."""
        return reader_version(self.lora)

    @property
    def far(self) -> int:
        """Tokens before the cursor beyond which distance is not told apart (`positions`)."""
        return self.placement.far

    def _encode_window(self, base: Any, row: Int[Array, "1 t"]) -> Gists:
        block, lead = self.model.layout.block, self.model.gist.lead
        return encode_rows(self.decoder, base, self.sink, row, block, lead)[0]

    def _gists(self, base: Any, params: Any, below: Any, level: int) -> Float[Array, "n s w"]:
        layout = self.model.layout
        if self.heads is not None and level == 1:
            return self.heads.of_rows(params, base, below.reshape(1, -1))
        if self.heads is not None:
            return self.heads.merge(params, below, level)
        if self.embeddings is not None and level == 1:
            return self.embeddings.make(params, base, jnp.maximum(below.reshape(1, -1), 0))
        if self.embeddings is not None:
            return self.embeddings.merge(params, base, below, level)
        if level == 1:
            below = self._encode_window(base, below.reshape(1, -1))
        else:
            children = below.reshape(-1, *below.shape[2:])
            below = grouped(from_records(children, self.backbone.config), layout.branching)
        return to_records(self.net.apply({"params": params}, below, level))

    def build(
        self, progress: Any = None, breaks: Sequence[int] = (), alike: bool = False
    ) -> dict[int, int]:
        """Makes every gist that is missing or of another version; returns how many per level.

        Blocks whose tokens are damaged, so that they have none, are ``damaged`` from then on.

        Args:
          progress: called as progress(level, nodes made).
          breaks: first blocks of texts that know nothing of what stands before them, as when
            several stand in one tree (`stretch`); they must begin windows.
          alike: much of the history stands in it more than once. What has been made is kept in
            memory by what it was made of, and made once.

        Raises:
          StoreError: the tree is not open for writing.
        """
        layout = self.model.layout
        kept: dict[tuple[int, bytes], np.ndarray] = {}

        def made(level: int, children: np.ndarray) -> np.ndarray:
            key = level, hashlib.sha256(np.ascontiguousarray(children)).digest()
            if key in kept:
                return kept[key]
            found = np.asarray(self._make(self.base, self.params, children, level))
            if alike:
                kept[key] = found
            return found

        def make(level: int, children: np.ndarray) -> np.ndarray:
            if level == 1 or self.model.gist.kind == "reads":
                return made(level, children)
            # One by one, and only those that are there: a node takes seconds.
            shape = (1, layout.slots[level - 1], children.shape[-1])
            return np.concatenate([
                made(level, one[None]) if one.any() else np.zeros(shape, np.float32)
                for one in children
            ])  # fmt: skip

        found = build(
            self.tree, make, batch=self.model.gist.window, neighbours=True,
            lead=self.model.gist.lead, top=layout.levels, breaks=breaks, progress=progress,
        )  # fmt: skip
        self.damaged = found.skipped
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
        lead = self.model.gist.lead
        rows = np.zeros((lead + TAIL_GISTS, size), np.int32)
        begin = max(stop - before - lead * size, 0)
        ids = np.concatenate([self._sound(begin, stop), asked])[-(lead + count) * size :]
        room = (lead + count) * size - len(ids)
        rows[: lead + count] = np.pad(ids, (room, 0), constant_values=-1).reshape(-1, size)
        return np.asarray(self._make(self.base, self.params, rows, 1))[:count]

    def _sound(self, start: int, stop: int) -> Int[np.ndarray, " n"]:
        """Tokens, with -1 up to the last of those that are damaged."""
        ids, damaged = self.tree.readable(start, stop)
        if damaged:
            ids[: (damaged[-1] + 1) * self.model.layout.block - start] = -1
        return ids

    def raw(self, block: int) -> Gists:
        """Entries of one block of tokens, ``[l, 1, block, g, d]``, encoded behind the blocks of its
        window that come before it, as far back as they can be read.

        Raises:
          DamagedTokens: the block cannot.
        """
        window, size, lead = self.model.gist.window, self.model.layout.block, self.model.gist.lead
        number, inside = divmod(block, window)
        start = number * window * size
        begin, stop = max(start - lead * size, 0), min(start + window * size, len(self.tree))
        ids, damaged = self.tree.readable(begin, stop)
        if block in damaged:
            self.tree.tokens(block * size, (block + 1) * size)  # says so
        hole = max((d for d in damaged if d < block), default=-1)
        key = number, stop, hole
        if key not in self._kept:
            row = np.zeros((1, (lead + window) * size), np.int32)
            row[:, : lead * size] = -1
            at = lead * size - (start - begin)
            row[0, at : at + len(ids)] = np.maximum(ids, 0)
            row[0, : max(at + (hole + 1) * size - begin, 0) if hole >= 0 else 0] = -1
            self._kept[key] = jax.tree.map(np.asarray, self._encode(self.base, row))
            while len(self._kept) > self._windows:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return Gists(*(x[:, inside : inside + 1] for x in self._kept[key]))

    def sound(self, nodes: Sequence[Node]) -> list[Node]:
        """Nodes as they can be read: in the place of a raw block whose tokens are damaged stands
        its gist, if there is one, and what has neither is left out.

        What is found damaged is in ``tree.damaged`` from then on.
        """
        size, found = self.model.layout.block, []
        for level, index in nodes:
            if not level and self.tree.readable(index * size, (index + 1) * size)[1]:
                level = 1
            if not level or not self.tree.lost(level, index):
                found.append((level, index))
        return found

    def live(self, start: int) -> tuple[Int[np.ndarray, " t"], int]:
        """Tokens from a block on that can be read to the history's end, and where they begin."""
        ids = self._sound(start, len(self.tree))
        skipped = int((ids < 0).sum())
        return ids[skipped:], start + skipped

    def forget(self) -> None:
        """Drops the encoded windows that were kept."""
        self._kept.clear()

    def gather(self, nodes: Sequence[Node], cursor: int) -> Entries:
        """Entries of nodes, in their order.

        Args:
          nodes: ``(level, index)``; level 0 is a raw block.
          cursor: position of the next token, in tokens of the history.
        """
        base = self.backbone.config
        at = text_places(self.model, nodes)
        positions = self.placement.rotary(at, cursor)
        if self.embeddings is not None:
            return Entries(self._embedded(nodes, at), positions, tuple(nodes))
        empty = np.zeros((base.num_layers, 0, base.num_kv_heads, base.head_dim), np.float32)
        parts = [(empty, empty, empty[..., 0])]
        for level, index in nodes:
            if level == 0:
                found = self.raw(index)
            elif self.heads is not None:
                found = self._spread(self.params, self.tree.gists(level, index, 1), level)
            else:
                found = from_records(self.tree.gists(level, index, 1), base)
                found = damped(self.model, base, found, level)
            k, v, *bias = (np.asarray(x)[:, 0] for x in found)
            parts.append((k, v, *bias) if bias else (k, v, np.zeros(k.shape[:-1], k.dtype)))
        k, v, bias = (np.concatenate(x, axis=1) for x in zip(*parts, strict=True))
        held = {"k": k, "v": v} if self.heads is None else {"k": k, "v": v, "bias": bias}
        return Entries(held, positions, tuple(nodes))

    def _embedded(self, nodes: Sequence[Node], at: Int[np.ndarray, " m"]) -> Held:
        """Input embeddings of nodes, whose entries stand at some places of the history."""
        size = self.model.layout.block
        parts = [np.zeros((0, self.backbone.config.hidden_size), np.float32)]
        for level, index in nodes:
            if level:
                parts.append(np.asarray(self.tree.gists(level, index, 1)[0], np.float32))
            else:
                ids = self.tree.tokens(index * size, (index + 1) * size)
                parts.append(np.asarray(self.backbone.embed(ids[None])[0], np.float32))
        return {"x": np.concatenate(parts)[None], "at": at[None].astype(np.int32)}


def spec_fields(model: Backbone | Outline, config: ModelConfig) -> dict[str, Any]:
    """What the stores of a base and layout are, but for the dtype: fields of `TreeSpec`."""
    layout = config.layout
    return {
        "vocab_size": model.config.vocab_size,
        "width": record_width(model.config, config.gist.kind),
        "slots": layout.slots,
        "tokenizer": model.tokenizer.sha256,
        "base": model.sha256,
        "block": layout.block,
        "branch": layout.branching,
    }


def reader_version(lora: Any) -> str:
    """Names what reads behind contexts: ``frozen``, the base as it is, or its deltas' digest."""
    return "frozen" if lora is None else digest(lora)


def digest(params: Any, gist: GistConfig | None = None) -> str:
    """Names what makes gists: 16 hexadecimal digits of the SHA-256 of its weights.

    Args:
      params: of the GistNet.
      gist: its configuration, of which the text that the encoder sees with a block counts too.
    """
    found = hashlib.sha256()
    if gist is not None:
        found.update(f"window={gist.window} lead={gist.lead} ".encode())
    for name, leaf in sorted(trees.flatten(params).items()):
        found.update(name.encode())
        found.update(np.ascontiguousarray(leaf, np.float32).tobytes())
    return found.hexdigest()[:16]
