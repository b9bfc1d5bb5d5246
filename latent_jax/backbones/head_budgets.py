"""How many of a text's entries each attention head keeps, and how they are laid out.

Attention heads differ: a few find single tokens anywhere in a text ("retrieval heads", Wu et al.
2024), most look at a handful of tokens whatever the text. A cache that keeps equally many entries
for every head starves the former and wastes room on the latter. Here all heads of all layers share
one budget (within a layer: Ada-KV, Feng et al. 2024). What an entry is worth is
`latent_jax.backbones.head_entries`'s.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

#: Points at which a head's profile is kept, over the ranks of its entries from first to last.
POINTS = 64


def profile(
    worth: Float[Array, "l b g t"], mask: Bool[Array, "b t"]
) -> Float[Array, "l g p"]:
    """Mean worth of a head's ranks, first to last, at `POINTS` shares of the text."""
    count = mask.sum(-1)
    rank = (2 * jnp.arange(POINTS) + 1) * count[:, None] // (2 * POINTS)
    return jnp.take_along_axis(worth, rank[None, :, None], axis=3).mean(1)


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


def kept_first(kept: Bool[Array, "l b t g"]) -> Int[Array, "l b t g"]:
    """Token numbers of each head's kept entries in the text's order; after them the others."""
    t = kept.shape[2]
    place = jnp.arange(t)[None, None, :, None]
    return jnp.argsort(jnp.where(kept, place, t + place), axis=2)


def pack(
    rows: Float[Array, "l b t g e"],
    order: Int[Array, "l b t g"],
    count: Int[Array, "b l g"],
    room: int,
) -> Float[Array, "b n e"]:
    """The kept entries of all heads in one row of ``room``, head by head; zeros after them.

    Args:
      rows: numbers of every entry.
      order: of `kept_first`.
      count: of `counts`.
      room: entries of a row.
    """
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
    packed: Float[Array, "b n e"], count: Int[Array, "b l g"], places: int
) -> tuple[Float[Array, "l b p g e"], Bool[Array, "l b p g"]]:
    """Inverse of `pack`, and which places a head uses."""
    b, layers, heads = count.shape
    flat = count.reshape(b, -1)
    begin = jnp.cumsum(flat, axis=1) - flat
    place = jnp.arange(places)
    used = place < flat[..., None]
    source = jnp.where(used, begin[..., None] + place, 0).reshape(b, -1)
    rows = jnp.take_along_axis(packed, source[..., None], axis=1)
    rows = rows.reshape(b, layers, heads, places, -1).transpose(1, 0, 3, 2, 4)
    return rows, used.reshape(b, layers, heads, places).transpose(0, 1, 3, 2).swapaxes(0, 1)
