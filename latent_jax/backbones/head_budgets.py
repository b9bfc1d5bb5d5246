"""How many of a text's entries each attention head needs, and which.

Attention heads differ: a few find single tokens anywhere in a text ("retrieval heads", Wu et al.
2024), most look at a handful of tokens whatever the text. A cache that keeps equally many entries
for every head starves the former and wastes room on the latter. Here all heads of all layers share
one budget (within a layer: Ada-KV, Feng et al. 2024). An entry's worth is the root mean square of
the attention that it gets when the text is read a second time, behind itself: what a head needs to
say the text again is what it needs of it ("repeat-prefill" queries, Zweiger et al. 2026,
arXiv:2602.16284).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from latent_jax.backbones.attention_probe import attention_mass, queries
from latent_jax.backbones.decoder import KV, Decoder
from latent_jax.backbones.sink import behind, sink_kv
from latent_jax.ops.attention import MASKED

#: Points at which a head's profile is kept, over the ranks of its entries from first to last.
POINTS = 64


def worth(
    decoder: Decoder,
    params: Any,
    ids: Int[Array, "b t"],
    mask: Bool[Array, "b t"],
    sink: Int[Array, ""] | None = None,
) -> tuple[KV, Float[Array, "l b t g"]]:
    """The cache of right-padded texts, and what each entry of it is worth to each head.

    Args:
      decoder: the frozen LLM.
      params: its parameters.
      ids: texts.
      mask: which tokens are real.
      sink: token before the text.

    Returns:
      The text's entries alone, and the root mean square over the repeated text's tokens of the
      attention that each gets, of all that the tokens see.
    """
    b, t = ids.shape
    first = None if sink is None else sink_kv(decoder, params, sink, b)
    x = decoder.apply({"params": params}, ids, method="embed")
    cache = decoder.apply({"params": params}, x, mask=mask, prefix=first).kv
    seen = behind(first, cache)
    places = jnp.broadcast_to(jnp.arange(t), (b, t))
    q, own = queries(
        decoder, params, x, mask.sum(-1, keepdims=True) + places, mask, places, seen
    )
    causal = jnp.tril(jnp.ones((t, t), bool))[None] & mask[:, None]
    before = jnp.broadcast_to(seen.mask[:, None], (b, t, seen.mask.shape[1]))
    visible = jnp.concatenate([before, causal], axis=-1) & mask[:, :, None]
    keys = jnp.concatenate([seen.k, own.k], axis=2)
    end = seen.mask.shape[1]  # behind the text come its repetition's own keys
    power = attention_mass(q, keys, visible, power=2)[:, :, end - t : end]
    heads = decoder.config.num_heads // decoder.config.num_kv_heads
    count = jnp.maximum(mask.sum(-1), 1)[None, :, None, None] * heads
    return cache, jnp.where(mask[None, :, :, None], jnp.sqrt(power / count), 0.0)


def profile(
    score: Float[Array, "l b t g"], mask: Bool[Array, "b t"]
) -> Float[Array, "l g p"]:
    """Mean worth of a head's entries by rank, first to last, at `POINTS` shares of the text."""
    count = mask.sum(-1)
    ranked = -jnp.sort(-jnp.where(mask[None, :, :, None], score, 0.0), axis=2)
    rank = (2 * jnp.arange(POINTS) + 1) * count[:, None] // (2 * POINTS)
    found = jnp.take_along_axis(ranked, rank[None, :, :, None], axis=2)
    return jnp.moveaxis(found.mean(1), 1, 2)


def counts(
    profile: Float[Array, "l g p"],
    tokens: Int[Array, " b"],
    total: Int[Array, " b"],
    places: int,
    first: bool = True,
) -> Int[Array, "b l g"]:
    """Entries of every head: ``total`` in all, at most ``tokens`` each, the same for any content.

    Those ranks get a place that are worth most. Worths are looked up and compared, never computed
    with: whoever packs and whoever unpacks must come to the same.

    Args:
      profile: of `profile`.
      tokens: length of each text, at most ``places``.
      total: entries of all heads together.
      places: static bound of a head's entries.
      first: every head has its first entry, whatever that is worth.
    """
    layers, heads, points = profile.shape
    falling = jax.lax.cummin(profile, axis=2).reshape(-1, points)
    rank = jnp.arange(places)

    def one(n, room):
        at = (2 * rank + 1) * points // (2 * jnp.maximum(n, 1))
        value = falling[:, jnp.minimum(at, points - 1)]
        if first:
            value = jnp.where(rank == 0, jnp.inf, value)
        real = jnp.broadcast_to(rank < n, value.shape).reshape(-1)
        value = jnp.where(real, value.reshape(-1), -jnp.inf)
        # Stable: of equal ones the earlier rank, so that each head's places are its first ranks.
        order = jnp.argsort(-value, stable=True)
        taken = jnp.zeros(value.shape, bool).at[order].set(jnp.arange(value.size) < room)
        return (taken & real).reshape(layers, heads, places).sum(-1)

    return jax.vmap(one)(tokens, total)


def best(
    score: Float[Array, "l b t g"], mask: Bool[Array, "b t"], count: Int[Array, "b l g"]
) -> Int[Array, "l b t g"]:
    """Token numbers of each head's ``count`` best entries, first and in the text's order; after
    them the others.
    """
    t = score.shape[2]
    place = jnp.arange(t)[None, None, :, None]
    value = jnp.where(mask[None, :, :, None], score, -jnp.inf)
    rank = jnp.argsort(jnp.argsort(-value, axis=2, stable=True), axis=2)
    kept = rank < count.transpose(1, 0, 2)[:, :, None]
    return jnp.argsort(jnp.where(kept, place, t + place), axis=2)


def pack(
    kv: KV, order: Int[Array, "l b t g"], count: Int[Array, "b l g"], room: int
) -> Float[Array, "b n 2d"]:
    """The kept entries of all heads in one row of ``room``, head by head; zeros after them."""
    return pack_rows(jnp.concatenate([kv.k, kv.v], axis=-1), order, count, room)


def pack_rows(
    rows: Float[Array, "l b t g e"],
    order: Int[Array, "l b t g"],
    count: Int[Array, "b l g"],
    room: int,
) -> Float[Array, "b n e"]:
    """`pack` of entries of any numbers."""
    layers, b, t, heads, width = rows.shape
    rows = jnp.take_along_axis(rows, order[..., None], axis=2)
    rows = rows.transpose(1, 0, 3, 2, 4).reshape(b, layers * heads * t, width)
    flat = count.reshape(b, -1)
    ends = jnp.cumsum(flat, axis=1)
    place = jnp.arange(room)
    head = jax.vmap(lambda e: jnp.searchsorted(e, place, side="right"))(ends)
    head = jnp.minimum(head, flat.shape[1] - 1)
    inside = place - jnp.take_along_axis(ends - flat, head, axis=1)
    there = place < ends[:, -1:]
    source = jnp.where(there, head * t + inside, 0)
    return jnp.where(there[..., None], jnp.take_along_axis(rows, source[..., None], axis=1), 0)


def unpack(
    packed: Float[Array, "b n 2d"], count: Int[Array, "b l g"], places: int
) -> KV:
    """Inverse of `pack`: every head in ``places``, of which a bias hides those it does not use."""
    rows, used = unpack_rows(packed, count, places)
    k, v = jnp.split(rows, 2, axis=-1)
    return KV(k, v, used.any((0, 3)), jnp.where(used, 0.0, MASKED))


def unpack_rows(
    packed: Float[Array, "b n e"], count: Int[Array, "b l g"], places: int
) -> tuple[Float[Array, "l b p g e"], Bool[Array, "l b p g"]]:
    """Inverse of `pack_rows`, and which places a head uses."""
    b, layers, heads = count.shape
    flat = count.reshape(b, -1)
    begin = jnp.cumsum(flat, axis=1) - flat
    place = jnp.arange(places)
    used = place < flat[..., None]
    source = jnp.where(used, begin[..., None] + place, 0).reshape(b, -1)
    rows = jnp.take_along_axis(packed, source[..., None], axis=1)
    rows = rows.reshape(b, layers, heads, places, -1).transpose(1, 0, 3, 2, 4)
    return rows, used.reshape(b, layers, heads, places).transpose(0, 1, 3, 2).swapaxes(0, 1)
