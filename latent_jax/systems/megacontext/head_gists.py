"""Gists of the text's own keys and values, of which every head keeps as many as it needs.

A gist of ``s`` slots has room for as many numbers as ``s`` tokens have in all heads of all layers.
Which entries of a block fill it, and with what values and weights, follows by least squares from
what readers ask: the block's own tokens read a second time behind it, and queries of other texts
that are kept for it. How many entries each head has is the same for every block, so that a gist
is nothing but numbers; a few texts tell it. Nothing is trained.

No gist depends on what comes after its block: the second reading of a block sees the text up to
its end, and streamed and bulk builds agree. A gist of the upper levels is made of the entries of
the gists below it, in the same way and with the queries of other texts alone (`head_merge`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from latent_jax.backbones import head_budgets, head_entries
from latent_jax.backbones.attention_probe import queries
from latent_jax.backbones.config import DecoderConfig
from latent_jax.backbones.decoder import Decoder, inverse_frequencies
from latent_jax.backbones.sink import behind, sink_kv
from latent_jax.ops import rope
from latent_jax.ops.attention import MASKED
from latent_jax.ops.subsets import refitted, removal_order, ridged
from latent_jax.systems.megacontext.head_merge import merged
from latent_jax.systems.megacontext.model_config import ModelConfig
from latent_jax.systems.megacontext.positions import head_places
from latent_jax.systems.megacontext.reading import row_positions, windows
from latent_jax.systems.megacontext.records import record_width


class Spread(NamedTuple):
    """Gists as a reader attends to them: equally many places in every head, most of them hidden.

    Keys are rotated as from the node's first token.
    """

    k: Float[Array, "l n s g d"]
    v: Float[Array, "l n s g d"]
    bias: Float[Array, "l n s g"]


class _Twice(NamedTuple):
    """Rows read once, and keys and queries of the second reading of their windows' blocks."""

    k: Float[Array, "l r w g d"]
    v: Float[Array, "l r w g d"]
    own: Float[Array, "l r t g d"]
    q: Float[Array, "l r t h d"]


class HeadGists:
    """Makes gists and reads them.

    Args:
      config: layout and options.
      decoder: the frozen base.
      sink: token before every window.
    """

    def __init__(self, config: ModelConfig, decoder: Decoder, sink: int):
        self.config, self.decoder, self.sink = config, decoder, sink
        base: DecoderConfig = decoder.config
        self.base, self.block, self.lead = base, config.layout.block, config.gist.lead
        self.width = record_width(base)
        waves = jnp.asarray(inverse_frequencies(base))
        self.waves = jnp.broadcast_to(waves, (base.num_layers, waves.shape[-1]))

    def places(self, level: int) -> int:
        """The most entries that a head has in a gist of a level."""
        return head_places(self.config, level)

    def slots(self, level: int) -> int:
        """What a gist of a level costs."""
        return self.config.layout.slots[level - 1]

    def room(self, level: int) -> int:
        """Entries of all heads of a gist: as many as its slots hold."""
        entry = 2 * self.base.head_dim + 1  # key, value, bias
        most = self.base.num_layers * self.base.num_kv_heads * self.places(level)
        return min(self.slots(level) * self.width // entry, most)

    def empty(self) -> dict[str, Any]:
        """Parameters before `calibrate`: no queries of others, all heads alike."""
        r, m = self.base, self.config.gist.queries
        layers, heads, groups, d = r.num_layers, r.num_heads, r.num_kv_heads, r.head_dim
        return {
            "query": jnp.zeros((layers, m, heads, d)),
            "normaliser": jnp.zeros((layers, m, heads)),
            "metric": jnp.broadcast_to(jnp.eye(d), (layers, groups, d, d)),
            "mass": jnp.ones((layers, groups)),
            "profile": {
                f"level_{level}": jnp.ones((layers, groups, self.places(level)))
                for level in range(1, self.config.layout.levels + 1)
            },
        }

    def counts(self, params: Any, level: int = 1) -> Int[Array, "l g"]:
        """Entries of every head in any gist of a level."""
        profile, places = params["profile"][f"level_{level}"], self.places(level)
        tokens, room = jnp.asarray([places]), jnp.asarray([self.room(level)])
        return head_budgets.counts(profile, tokens, room, places, first=False)[0]

    def all_counts(self, params: Any) -> dict[int, np.ndarray]:
        """`counts` by level."""
        levels = range(1, self.config.layout.levels + 1)
        return {level: np.asarray(self.counts(params, level)) for level in levels}

    def make(self, params: Any, base: Any, ids: Int[Array, "b t"]) -> Float[Array, "n s w"]:
        """Records of the gists of whole blocks; windows begin at the rows' first tokens."""
        length = self.config.gist.window * self.block
        packed = self.of_rows(params, base, windows(ids, length, self.lead * self.block))
        packed = packed.reshape(ids.shape[0], -1, *packed.shape[1:])
        packed = packed[:, : ids.shape[1] // self.block]
        return packed.reshape(-1, *packed.shape[2:])

    def of_rows(
        self, params: Any, base: Any, rows: Int[Array, "r w"]
    ) -> Float[Array, "n s w"]:
        """The same of rows that begin with the blocks that lead to a window (`reading.windows`)."""
        entries, order, _ = self.entries(params, base, rows)
        return self._packed(params, entries, order, 1)

    def merge(
        self, params: Any, below: Float[Array, "n branch s w"], level: int
    ) -> Float[Array, "n s w"]:
        """Records of gists of a level from 2 up, of the records of what lies below each."""
        entries, order, _ = self.over(params, below, level)
        return self._packed(params, entries, order, level)

    def build(
        self, params: Any, base: Any, ids: Int[Array, "b t"], level: int
    ) -> Float[Array, "n s w"]:
        """Records of a level from texts of whole nodes of it."""
        found = self.make(params, base, ids)
        for upper in range(2, level + 1):
            below = found.reshape(-1, self.config.layout.branching, *found.shape[1:])
            # One at a time: all entries of what lies below are compared with one another.
            found = jax.lax.map(lambda x, at=upper: self.merge(params, x[None], at)[0], below)
        return found

    def spread(
        self, params: Any, records: Float[Array, "n s w"], level: int = 1
    ) -> Spread:
        """Places of every head in some gists."""
        n, d, room = len(records), self.base.head_dim, self.room(level)
        entry = 2 * d + 1
        packed = jnp.asarray(records, jnp.float32).reshape(n, -1)[:, : room * entry]
        count = self.counts(params, level)
        count = jnp.broadcast_to(count, (n, *count.shape))
        rows, used = head_budgets.unpack(
            packed.reshape(n, room, entry), count, self.places(level)
        )
        bias = jnp.where(used, rows[..., -1], MASKED)
        return Spread(rows[..., :d], rows[..., d:-1], bias)

    def _packed(self, params, entries, order, level):
        """The kept ones of entries ``[l, n, t, g, e]`` as records."""
        count = self.counts(params, level)
        count = jnp.broadcast_to(count, (entries.shape[1], *count.shape))
        packed = head_budgets.pack(entries, order, count, self.room(level))
        packed = packed.reshape(len(packed), -1)
        slots = self.slots(level)
        packed = jnp.pad(packed, ((0, 0), (0, slots * self.width - packed.shape[1])))
        return packed.reshape(-1, slots, self.width)

    def over(self, params, below, level):
        """Of nodes of an upper level what `entries` gives of windows, over the places of a few
        more than may be kept.
        """
        layout, (n, branch) = self.config.layout, below.shape[:2]
        flat = below.reshape(n * branch, *below.shape[2:])
        found = self.spread(params, flat, level - 1)
        at = jnp.tile(jnp.arange(branch) * layout.apart(level), n)[:, None]
        at = jnp.broadcast_to(at, found.k.shape[1:3])
        found = found._replace(k=rope.rotate_layers(found.k, at, self.waves))
        found = Spread(*(x.reshape(x.shape[0], n, -1, *x.shape[3:]) for x in found))
        m = params["query"].shape[1]
        where = layout.room(level) + jnp.arange(m) * self.config.gist.reach // m

        def layer(x):
            waves, k, v, bias, p, count = x
            asked = self.scaled(rope.rotate(p["query"][None], where[None], waves)[0])
            theirs = p["normaliser"].reshape(asked.shape[:-1])
            own = (jnp.moveaxis(y, 2, 1) for y in (k, v, bias))  # n g c ...
            return merged(
                *own, asked, theirs, p["metric"], p["mass"], count, self.places(level),
                self.config.gist.ridge,
            )  # fmt: skip

        by_layer = self.waves, *found, _asking(params), self.counts(params, level)
        return jax.lax.map(layer, by_layer)

    def entries(self, params, base, rows):
        """All entries of windows as they would be kept, ``[l, n, block, g, 2d + 1]``, the order in
        which they are packed, and what leaving each rank out costs, ``[l, n, g, block]``; ``rows``
        are as of `reading.windows`.
        """
        size, options, lead = self.block, self.config.gist, self.lead * self.block

        # Text begins where a block does, so this is the place of each block's first token.
        at = row_positions(rows)[:, lead:] // size * size

        def layer(x):
            waves, seen, sink, p, count = x
            keys = self._cut(rope.rotate(seen.k[:, lead:], -at, waves))
            values = self._cut(seen.v[:, lead:])
            pairs = self._others(waves, keys, p["query"], p["normaliser"])
            pairs = pairs + options.again * self._again(seen, sink, rows >= 0)
            gram = ridged(pairs, options.ridge)
            wanted = jnp.einsum("ngid,gde,ngje->ngij", values, p["metric"], values)
            rank, cost = removal_order(gram, wanted + p["mass"][:, None, None])
            kept = rank < count[:, None]
            ones = jnp.ones((*values.shape[:-1], 1))
            fit = refitted(gram, jnp.concatenate([values, ones], axis=-1), kept)
            weight = jnp.clip(fit[..., -1:], head_entries.LEAST, head_entries.MOST)
            new = jnp.concatenate([keys, fit[..., :-1] / weight, jnp.log(weight)], axis=-1)
            place = jnp.arange(size)
            order = jnp.argsort(jnp.where(kept, place, size + place), axis=-1)
            return new.swapaxes(1, 2), order.swapaxes(1, 2), cost

        seen, sink = self._read_twice(base, rows)
        by_layer = self.waves, seen, sink, _asking(params), self.counts(params)
        return jax.lax.map(layer, by_layer)

    def _cut(self, x: Float[Array, "r t g d"]) -> Float[Array, "n g s d"]:
        return x.reshape(-1, self.block, *x.shape[2:]).swapaxes(1, 2).astype(jnp.float32)

    def _read_twice(self, base, rows):
        """Windows as they are read, and every block once more, right behind its own end."""
        (r, t), size, lead = rows.shape, self.block, self.lead * self.block
        sink, real = sink_kv(self.decoder, base, jnp.int32(self.sink), r), rows >= 0
        x = self.decoder.apply({"params": base}, jnp.maximum(rows, 0), method="embed")
        where = row_positions(rows)
        kv = self.decoder.apply({"params": base}, x, where, real, prefix=sink).kv
        block, order = jnp.arange(t) // size, jnp.arange(t - lead)
        later = block[lead:, None]
        seen = (later >= block) & real[:, None]
        seen = jnp.pad(seen, ((0, 0), (0, 0), (1, 0)), constant_values=True)
        prefix = behind(sink, kv)._replace(mask=seen)
        among = (later == block[lead:]) & (order[:, None] >= order)
        q, own = queries(
            self.decoder, base, x[:, lead:], where[:, lead:] + size, real[:, lead:],
            jnp.broadcast_to(order, (r, t - lead)), prefix,
            jnp.broadcast_to(among, (r, t - lead, t - lead)),
        )  # fmt: skip
        return _Twice(kv.k, kv.v, own.k, q), sink.k[:, 0, 0]

    def scaled(self, q: Float[Array, "*n h d"]) -> Float[Array, "*n g x d"]:
        """Queries as their products with keys are taken, by head of the keys."""
        r = self.base
        scale = r.head_dim**-0.5 if r.query_scale is None else r.query_scale
        shape = (r.num_kv_heads, r.num_heads // r.num_kv_heads, r.head_dim)
        return (q.astype(jnp.float32) * scale).reshape(*q.shape[:-2], *shape)

    def _again(
        self, seen: _Twice, sink: Float[Array, "g d"], real: Bool[Array, "r w"]
    ) -> Float[Array, "n g s s"]:
        """Products of the attention that a block's entries get from its own second reading."""
        q, size, lead = self.scaled(seen.q), self.block, self.lead * self.block
        r, t, heads, each, _ = q.shape
        block = jnp.arange(real.shape[1]) // size
        earlier = (block[lead:, None] >= block) & real[:, None, None, None]

        def cut(x):  # r t ... -> r n s ...
            return x.reshape(r, -1, size, *x.shape[2:])

        def total(logits, visible):
            return jax.nn.logsumexp(jnp.where(visible, logits, MASKED), axis=-1)

        every = jnp.einsum("rtgxd,rsgd->rgxts", q, seen.k)
        before = total(every, earlier)
        first = jnp.einsum("rtgxd,gd->rgxt", q, sink)
        within = jnp.einsum("rntgxd,rnsgd->rgxnts", cut(q), cut(seen.own))
        same = total(within, jnp.tril(jnp.ones((size, size), bool))).reshape(first.shape)
        norm = jnp.logaddexp(jnp.logaddexp(before, first), same)
        logits = jnp.einsum("rntgxd,rnsgd->rngxts", cut(q), cut(seen.k[:, lead:]))
        norm = norm.reshape(r, heads, each, -1, size).transpose(0, 3, 1, 2, 4)
        p = jnp.exp(logits - norm[..., None])
        pairs = jnp.einsum("rngxti,rngxtj->rngij", p, p) / (each * size)
        return pairs.reshape(-1, *pairs.shape[2:])

    def _others(self, waves, keys, asked, normaliser):
        """The same from queries of other texts, each with what it attended to there."""
        m, reach = asked.shape[0], self.config.gist.reach
        at = self.block + jnp.arange(m) * reach // m
        q = self.scaled(rope.rotate(asked[None], at[None], waves)[0])
        logits = jnp.einsum("mgxd,ngsd->ngxms", q, keys)
        theirs = normaliser.reshape(q.shape[:-1]).transpose(1, 2, 0)
        norm = jnp.logaddexp(jax.nn.logsumexp(logits, axis=-1), theirs)
        p = jnp.exp(logits - norm[..., None])
        return jnp.einsum("ngxmi,ngxmj->ngij", p, p) / (m * q.shape[2])


def _asking(params: Any) -> dict[str, Array]:
    """What has an axis of layers and is not a profile."""
    return {name: leaf for name, leaf in params.items() if name != "profile"}
