"""Gists of the text's own keys and values, of which every head keeps as many as it needs.

A gist of ``s`` slots has room for as many numbers as ``s`` tokens have in all heads of all layers.
Which entries of a block fill it, and with what values and weights, follows by least squares from
what readers ask: the block's own tokens read a second time behind it, and queries of other texts
that are kept for it. How many entries each head has is the same for every block, so that a gist
is nothing but numbers; a few texts tell it. Nothing is trained.

No gist depends on what comes after its block: the second reading of a block sees the text up to
its end, and streamed and bulk builds agree.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from latent_jax.backbones import head_budgets, head_entries
from latent_jax.backbones.attention_probe import queries, stream_power
from latent_jax.backbones.config import DecoderConfig
from latent_jax.backbones.decoder import Decoder, inverse_frequencies
from latent_jax.backbones.sink import behind, sink_kv
from latent_jax.ops import rope
from latent_jax.ops.attention import MASKED
from latent_jax.ops.subsets import refitted, removal_order, ridged
from latent_jax.systems.megacontext.config import ModelConfig
from latent_jax.systems.megacontext.records import record_width


class Spread(NamedTuple):
    """Gists as a reader attends to them: ``block`` places in every head, most of them hidden.

    Keys are rotated as from the node's first token.
    """

    k: Float[Array, "l n s g d"]
    v: Float[Array, "l n s g d"]
    bias: Float[Array, "l n s g"]


class _Twice(NamedTuple):
    """Windows read once, and keys and queries of the second reading of their blocks."""

    k: Float[Array, "l r t g d"]
    v: Float[Array, "l r t g d"]
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
        self.base, self.block = base, config.layout.block
        self.slots, self.width = config.layout.slots[0], record_width(base)
        entry = 2 * base.head_dim + 1  # key, value, bias
        most = base.num_layers * base.num_kv_heads * self.block
        self.room = min(self.slots * self.width // entry, most)
        waves = jnp.asarray(inverse_frequencies(base))
        self.waves = jnp.broadcast_to(waves, (base.num_layers, waves.shape[-1]))

    def empty(self) -> dict[str, Array]:
        """Parameters before `calibrate`: no queries of others, all heads alike."""
        r, m = self.base, self.config.gist.queries
        layers, heads, groups, d = r.num_layers, r.num_heads, r.num_kv_heads, r.head_dim
        return {
            "query": jnp.zeros((layers, m, heads, d)),
            "normaliser": jnp.zeros((layers, m, heads)),
            "metric": jnp.broadcast_to(jnp.eye(d), (layers, groups, d, d)),
            "mass": jnp.ones((layers, groups)),
            "profile": jnp.ones((layers, groups, self.block)),
        }

    def counts(self, params: Any) -> Int[Array, "l g"]:
        """Entries of every head in any gist."""
        tokens, room = jnp.asarray([self.block]), jnp.asarray([self.room])
        return head_budgets.counts(params["profile"], tokens, room, self.block, first=False)[0]

    def make(self, params: Any, base: Any, ids: Int[Array, "b t"]) -> Float[Array, "n s w"]:
        """Records of the gists of whole blocks; windows begin at the rows' first tokens."""
        rows = self._windows(ids)
        entries, order, _ = self._entries(params, base, rows)
        count = self.counts(params)
        count = jnp.broadcast_to(count, (entries.shape[1], *count.shape))
        packed = head_budgets.pack(entries, order, count, self.room)
        packed = packed.reshape(len(packed), -1)
        packed = jnp.pad(packed, ((0, 0), (0, self.slots * self.width - packed.shape[1])))
        n, of_each = ids.shape[1] // self.block, rows.shape[0] // ids.shape[0]
        packed = packed.reshape(ids.shape[0], of_each * self.config.gist.window, self.slots, -1)
        return packed[:, :n].reshape(-1, self.slots, self.width)

    def spread(self, params: Any, records: Float[Array, "n s w"]) -> Spread:
        """Places of every head in some gists."""
        n, d = len(records), self.base.head_dim
        entry = 2 * d + 1
        packed = jnp.asarray(records, jnp.float32).reshape(n, -1)[:, : self.room * entry]
        count = self.counts(params)
        count = jnp.broadcast_to(count, (n, *count.shape))
        rows, used = head_budgets.unpack(
            packed.reshape(n, self.room, entry), count, self.block
        )
        bias = jnp.where(used, rows[..., -1], MASKED)
        return Spread(rows[..., :d], rows[..., d:-1], bias)

    def _windows(self, ids: Int[Array, "b t"]) -> Int[Array, "r w"]:
        length = self.config.gist.window * self.block
        return jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % length))).reshape(-1, length)

    def _entries(self, params, base, rows):
        """All entries of windows as they would be kept, ``[l, n, block, g, 2d + 1]``, the order in
        which they are packed, and what leaving each rank out costs, ``[l, n, g, block]``.
        """
        size, options = self.block, self.config.gist

        def layer(x):
            waves, seen, sink, p, count = x
            # Rotated as from the block's first token.
            at = jnp.broadcast_to(jnp.arange(rows.shape[1]) // size * size, rows.shape)
            keys = self._cut(rope.rotate(seen.k, -at, waves))
            values = self._cut(seen.v)
            pairs = self._others(waves, keys, p["query"], p["normaliser"])
            pairs = pairs + options.again * self._again(seen, sink)
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
        return jax.lax.map(layer, (self.waves, seen, sink, params, self.counts(params)))

    def _cut(self, x: Float[Array, "r t g d"]) -> Float[Array, "n g s d"]:
        return x.reshape(-1, self.block, *x.shape[2:]).swapaxes(1, 2).astype(jnp.float32)

    def _read_twice(self, base, rows):
        """Windows as they are read, and every block once more, right behind its own end."""
        (r, t), size = rows.shape, self.block
        sink = sink_kv(self.decoder, base, jnp.int32(self.sink), r)
        x = self.decoder.apply({"params": base}, rows, method="embed")
        kv = self.decoder.apply({"params": base}, x, prefix=sink).kv
        block, where = jnp.arange(t) // size, jnp.broadcast_to(jnp.arange(t), rows.shape)
        seen = jnp.pad(block[:, None] >= block, ((0, 0), (1, 0)), constant_values=True)
        prefix = behind(sink, kv)._replace(mask=jnp.broadcast_to(seen, (r, t, t + 1)))
        among = (block[:, None] == block) & (where[0][:, None] >= where[0])
        q, own = queries(
            self.decoder, base, x, where + size, kv.mask, where, prefix,
            jnp.broadcast_to(among, (r, t, t)),
        )  # fmt: skip
        return _Twice(kv.k, kv.v, own.k, q), sink.k[:, 0, 0]

    def _scaled(self, q: Float[Array, "*n h d"]) -> Float[Array, "*n g x d"]:
        r = self.base
        scale = r.head_dim**-0.5 if r.query_scale is None else r.query_scale
        shape = (r.num_kv_heads, r.num_heads // r.num_kv_heads, r.head_dim)
        return (q.astype(jnp.float32) * scale).reshape(*q.shape[:-2], *shape)

    def _again(self, seen: _Twice, sink: Float[Array, "g d"]) -> Float[Array, "n g s s"]:
        """Products of the attention that a block's entries get from its own second reading."""
        q, size = self._scaled(seen.q), self.block
        r, t, heads, each, _ = q.shape
        block = jnp.arange(t) // size

        def cut(x):  # r t ... -> r n s ...
            return x.reshape(r, -1, size, *x.shape[2:])

        def total(logits, visible):
            return jax.nn.logsumexp(jnp.where(visible, logits, MASKED), axis=-1)

        every = jnp.einsum("rtgxd,rsgd->rgxts", q, seen.k)
        before = total(every, block[:, None] >= block)
        first = jnp.einsum("rtgxd,gd->rgxt", q, sink)
        within = jnp.einsum("rntgxd,rnsgd->rgxnts", cut(q), cut(seen.own))
        same = total(within, jnp.tril(jnp.ones((size, size), bool))).reshape(first.shape)
        norm = jnp.logaddexp(jnp.logaddexp(before, first), same)
        logits = jnp.einsum("rntgxd,rnsgd->rngxts", cut(q), cut(seen.k))
        norm = norm.reshape(r, heads, each, -1, size).transpose(0, 3, 1, 2, 4)
        p = jnp.exp(logits - norm[..., None])
        pairs = jnp.einsum("rngxti,rngxtj->rngij", p, p) / (each * size)
        return pairs.reshape(-1, *pairs.shape[2:])

    def _others(self, waves, keys, asked, normaliser):
        """The same from queries of other texts, each with what it attended to there."""
        m, reach = asked.shape[0], self.config.gist.reach
        at = self.block + jnp.arange(m) * reach // m
        q = self._scaled(rope.rotate(asked[None], at[None], waves)[0])
        logits = jnp.einsum("mgxd,ngsd->ngxms", q, keys)
        theirs = normaliser.reshape(q.shape[:-1]).transpose(1, 2, 0)
        norm = jnp.logaddexp(jax.nn.logsumexp(logits, axis=-1), theirs)
        p = jnp.exp(logits - norm[..., None])
        return jnp.einsum("ngxmi,ngxmj->ngij", p, p) / (m * q.shape[2])


def calibrate(
    gists: HeadGists, base: Any, rows: Int[np.ndarray, "n t"], batch: int = 4
) -> dict[str, Array]:
    """Parameters of `HeadGists` from whole windows of texts.

    The first half of the rows lends its queries; on the second half it is measured what each rank
    of each head is worth: the error of the layer's output without it, over the power of the stream
    that the output is added to.

    Args:
      gists: what they are for.
      base: parameters of the frozen base.
      rows: at least two windows.
      batch: rows at once.
    """
    half, params = len(rows) // 2, gists.empty()
    ask = jax.jit(_asked, static_argnums=0)
    m = params["query"].shape[1]
    at = np.linspace(rows.shape[1] // 8, rows.shape[1] - 1, -(-m // half)).astype(int)
    asked = [ask(gists, base, rows[i : i + 1], at) for i in range(half)]
    pick = np.random.default_rng(0).permutation(half * len(at))[:m]  # no text at one distance
    joined = [jnp.concatenate(x, axis=1)[:, pick] for x in zip(*asked, strict=True)]
    params |= {"query": joined[0], "normaliser": joined[1]}
    params["metric"] = head_entries.output_metric(base, gists.base)

    @jax.jit
    def values(base, metric, ids):
        sink = sink_kv(gists.decoder, base, jnp.int32(gists.sink), len(ids))
        x = gists.decoder.apply({"params": base}, ids, method="embed")
        v = gists.decoder.apply({"params": base}, x, prefix=sink).kv.v.astype(jnp.float32)
        size = jnp.einsum("lbtgd,lgde,lbtge->lg", v, metric, v) / ids.size
        return size, stream_power(gists.decoder, base, x, sink)

    @jax.jit
    def measured(params, base, ids):
        return gists._entries(params, base, ids)[2].mean(1)

    later = [rows[i : i + batch] for i in range(half, len(rows), batch)]
    stats = [values(base, params["metric"], part) for part in later]
    share = np.asarray([len(part) for part in later]) / (len(rows) - half)
    params["mass"], power = (
        sum(w * x for w, x in zip(share, y, strict=True)) for y in zip(*stats, strict=True)
    )
    # The geometric mean with the attention (`head_entries.worth`) was tried and is no better here.
    costs = sum(w * measured(params, base, part) for w, part in zip(share, later, strict=True))
    return params | {"profile": costs / power[:, None, None]}


def _asked(gists, base, ids, at):
    """Queries of a text before rotation, at some places, and what each attended to in all."""
    r, (b, t) = gists.base, ids.shape
    sink = sink_kv(gists.decoder, base, jnp.int32(gists.sink), b)
    x = gists.decoder.apply({"params": base}, ids, method="embed")
    where, here = jnp.broadcast_to(jnp.arange(t), ids.shape), jnp.asarray(at)[None]
    mask = jnp.ones(ids.shape, bool)
    q, own = queries(gists.decoder, base, x, where, mask, here, sink)
    keys = jnp.concatenate([sink.k, own.k], axis=2)
    visible = jnp.pad(here[..., None] >= where[:, None], ((0, 0), (0, 0), (1, 0)),
                      constant_values=True)  # fmt: skip

    def layer(pair):
        logits = jnp.einsum("bmgxd,bsgd->bmgxs", gists._scaled(pair[0]), pair[1])
        logits = jnp.where(visible[:, :, None, None], logits, MASKED)
        return jax.nn.logsumexp(logits, axis=-1)[0].reshape(len(at), r.num_heads)

    normaliser = jax.lax.map(layer, (q, keys))
    return rope.rotate_layers(q, -here, gists.waves)[:, 0], normaliser
