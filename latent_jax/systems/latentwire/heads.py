"""Latents made of the text's own entries, of which every head keeps as many as it needs.

``M`` latents have room for as many keys and values as ``M`` tokens have in all heads of all layers;
how the heads share it is `latent_jax.backbones.head_budgets`'s. Nothing of it is trained: a few
texts tell how much each head looks for. A latent is a stretch of the packed entries and stands for
no span of its own, so a wire is read as a whole. In the reader every head has as many places as the
text has tokens, most of them hidden: what is saved is what is stored and sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from latent_jax.backbones import head_budgets
from latent_jax.backbones.config import DecoderConfig
from latent_jax.backbones.decoder import KV, Decoder, inverse_frequencies
from latent_jax.ops import rope


def encode(
    body: Decoder,
    frozen: Any,
    profile: Float[Array, "l g p"],
    ids: Int[Array, "b t"],
    mask: Bool[Array, "b t"],
    valid: Bool[Array, "b m"],
    sink: Int[Array, ""] | None,
) -> Float[Array, "b m z"]:
    """Packed entries of one segment each; keys are rotated as from the segment's first token."""
    cache, score = head_budgets.worth(body, frozen, ids, mask, sink)
    (b, m), each = valid.shape, profile.shape[0] * profile.shape[1]
    count = head_budgets.counts(profile, mask.sum(-1), valid.sum(-1) * each, ids.shape[1])
    order = head_budgets.best(score, mask, count)
    packed = head_budgets.pack(cache, order, count, m * each)
    return jax.lax.stop_gradient(packed.reshape(b, m, -1))


def decode(
    reader: DecoderConfig, profile: Float[Array, "l g p"], wire: Any, segment: int, ratio: float
) -> KV:
    """The entries of all segments of a wire, as a prefix."""
    b, total, _ = wire.z.shape
    each = int(np.ceil(segment / ratio - 1e-9))
    n = max(1, total // each)
    m = total // n
    # As many tokens as that many latents can stand for.
    places = min(segment, int(np.floor(m * ratio + 1e-6)))
    begin = jnp.arange(n) * segment
    tokens = jnp.clip(wire.length[:, None] - begin, 0, segment).reshape(-1)
    room = wire.mask.reshape(b * n, m).sum(-1) * reader.num_layers * reader.num_kv_heads
    count = head_budgets.counts(profile, tokens, room, places)
    kv = head_budgets.unpack(wire.z.reshape(b * n, -1, 2 * reader.head_dim), count, places)
    where = jnp.broadcast_to(jnp.tile(begin, b)[:, None], (b * n, places))
    k = rope.rotate_layers(kv.k, where, jnp.asarray(inverse_frequencies(reader)))

    def joined(x):
        return x.reshape(x.shape[0], b, n * places, *x.shape[3:])

    return KV(joined(k), joined(kv.v), kv.mask.reshape(b, -1), joined(kv.bias))


def calibrate(
    body: Decoder, frozen: Any, batches: Iterable[Mapping[str, Any]], sink: int | None, most: int
) -> Float[Array, "l g p"]:
    """The profile of `encode`: what the ranks of each head's entries are worth in some texts.

    Args:
      body: the frozen LLM.
      frozen: its parameters.
      batches: with ``context`` and ``context_mask``.
      sink: token before a text.
      most: how many texts to take.
    """
    first = None if sink is None else jnp.int32(sink)

    @jax.jit
    def one(frozen, ids, mask):
        return head_budgets.profile(head_budgets.worth(body, frozen, ids, mask, first)[1], mask)

    total, texts = 0.0, 0
    for batch in batches:
        ids, mask = jnp.asarray(batch["context"]), jnp.asarray(batch["context_mask"])
        total, texts = total + len(ids) * one(frozen, ids, mask), texts + len(ids)
        if texts >= most:
            break
    return total / texts
