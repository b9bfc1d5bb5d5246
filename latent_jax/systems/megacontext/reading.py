"""The frozen base encoding a history, and reading on behind entries of mixed detail.

Raw blocks and gists are the same thing to the base: keys and values that it attends to, held
before rotation and placed when they are used. A window of a few blocks is encoded behind the sink
and the blocks that lead to it, so that an entry depends on nothing but a stretch of text before
it: streamed and bulk builds agree, and exchanging an entry of the working context changes no other.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from latent_jax.backbones.decoder import KV, Decoder, DecoderOutput, inverse_frequencies
from latent_jax.backbones.sink import behind, sink_kv
from latent_jax.ops import rope
from latent_jax.systems.megacontext.gist import Gists


def unrotated(
    decoder: Decoder, kv: KV, positions: Int[Array, "b t"], block: int
) -> Gists:
    """A cache cut into blocks, before rotation: ``[l, b * t / block, block, g, d]``."""
    layers, b, t, heads, width = kv.k.shape
    k = rope.rotate_layers(kv.k, -positions, inverse_frequencies(decoder.config))
    shape = (layers, b * t // block, block, heads, width)
    return Gists(k.reshape(shape), kv.v.reshape(shape))


def encode(
    decoder: Decoder,
    params: Any,
    sink: int,
    ids: Int[Array, "b t"],
    block: int,
    window: int,
    lead: int = 0,
) -> tuple[Gists, DecoderOutput]:
    """Raw entries of whole blocks.

    Args:
      ids: histories of whole blocks.
      window: blocks that see one another (causally).
      lead: blocks before a window that it sees, too.

    Returns:
      Entries ``[l, b * blocks, block, g, d]`` in the order of the history, and the base's own
      output over the windows, as rows of ``lead + window`` blocks.
    """
    b, t = ids.shape
    rows = windows(ids, window * block, lead * block)
    found, out = encode_rows(decoder, params, sink, rows, block, lead)
    keep = jax.tree.map(
        lambda v: v.reshape(v.shape[0], b, -1, *v.shape[2:])[:, :, : t // block].reshape(
            v.shape[0], -1, *v.shape[2:]
        ),
        found,
    )
    return keep, out


def windows(ids: Int[Array, "b t"], length: int, lead: int) -> Int[Array, "b*n w"]:
    """Windows of ``length`` tokens, each with the ``lead`` tokens before it; -1 where a text has
    not begun yet, 0 where it is over.
    """
    ids = jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % length)))
    n = ids.shape[1] // length
    ids = jnp.pad(ids, ((0, 0), (lead, 0)), constant_values=-1)
    at = jnp.arange(n)[:, None] * length + jnp.arange(lead + length)
    return ids[:, at].reshape(-1, lead + length)


def row_positions(rows: Int[Array, "r w"]) -> Int[Array, "r w"]:
    """Rotary positions in rows of `windows`: 0 is where the text begins, right behind the sink."""
    return jnp.arange(rows.shape[1]) - (rows < 0).sum(1, keepdims=True)


def encode_rows(
    decoder: Decoder, params: Any, sink: int, rows: Int[Array, "r w"], block: int, lead: int = 0
) -> tuple[Gists, DecoderOutput]:
    """Raw entries of `windows`, ``[l, r * n, block, g, d]``, without the blocks that lead to them,
    and the base's output over the rows.
    """
    x = decoder.apply({"params": params}, jnp.maximum(rows, 0), method="embed")
    # What fills a row up at its end stands where causal attention does not look.
    first = sink_kv(decoder, params, jnp.int32(sink), rows.shape[0])
    where = row_positions(rows)
    out = decoder.apply({"params": params}, x, where, rows >= 0, prefix=first)
    found = unrotated(decoder, out.kv, where, block)
    if not lead:
        return found, out
    shape = (rows.shape[0], rows.shape[1] // block)
    later = (
        x.reshape(x.shape[0], *shape, *x.shape[2:])[:, :, lead:] for x in found
    )
    return Gists(*(x.reshape(x.shape[0], -1, *x.shape[3:]) for x in later)), out


def place(
    decoder: Decoder, entries: Gists, positions: Int[Array, "b m"], mask: Bool[Array, "b m"],
    bias: Float[Array, "l n s g"] | None = None,
) -> KV:  # fmt: skip
    """Entries ``[l, n, s, g, d]`` with ``n * s == b * m``, as a prefix at rotary positions.

    Args:
      bias: of each entry in each head.
    """
    b, m = positions.shape
    layers, _, _, heads, width = entries.k.shape
    shape = (layers, b, m, heads, width)
    k = rope.rotate_layers(
        entries.k.reshape(shape), positions, inverse_frequencies(decoder.config)
    )
    bias = None if bias is None else bias.reshape(shape[:-1])
    return KV(k, entries.v.reshape(shape), mask, bias)


def read_on(
    decoder: Decoder,
    params: Any,
    sink: int,
    entries: KV | None,
    ids: Int[Array, "b t"],
    positions: Int[Array, "b t"],
    attention_mask: Bool[Array, "b t t"] | None = None,
    lora: Any = None,
) -> Float[Array, "b t d"]:
    """Hidden states of tokens that follow the sink and placed entries.

    Args:
      entries: a prefix; its mask may say for each token what it sees.
      attention_mask: among the tokens themselves; causal by default.
      lora: deltas of the base where it reads these tokens; see `base_lora`.
    """
    b, t = ids.shape
    first = sink_kv(decoder, params, jnp.int32(sink), b)
    if entries is not None and entries.mask.ndim == 3:
        first = first._replace(mask=jnp.ones((b, t, 1), bool))
    prefix = behind(first, entries)
    x = decoder.apply({"params": params}, ids, method="embed")
    return decoder.apply(
        {"params": params}, x, positions, attention_mask=attention_mask, prefix=prefix, lora=lora
    ).hidden


def who_sees_what(
    replaced: Bool[Array, "b n"], block: int, chunk: int
) -> tuple[Bool[Array, "b t n"], Bool[Array, "b t t"]]:
    """Masks of a training row in which every token is behind the gists of its own past.

    The row is read in chunks. A token sees the raw tokens of its own chunk; of a block ``j`` in an
    earlier one it sees the gist if ``replaced[j]``, else the raw tokens. Nothing raw leaks past a
    gist, for the chunk's other tokens saw no more.

    Args:
      replaced: blocks that are gists to later chunks.
      block: tokens of a block.
      chunk: blocks of a chunk.

    Returns:
      Which gists and which raw tokens each token sees.
    """
    n = replaced.shape[1]
    where = jnp.arange(n * block) // block
    earlier = jnp.arange(n)[None] < (where // chunk * chunk)[:, None]
    gists = replaced[:, None, :] & earlier[None]
    causal = jnp.tril(jnp.ones((n * block, n * block), bool))
    return gists, causal[None] & ~gists[:, :, where]
