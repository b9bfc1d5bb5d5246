"""Latents made of the text's own entries, of which every head keeps as many as it needs.

``M`` latents have room for as many keys and values as ``M`` tokens have in all heads of all layers;
how the heads share it is `latent_jax.backbones.head_budgets`'s. A few texts tell how much each head
looks for; one factor per head can be trained on top of that (`soften`), for not every head's
attention matters alike. A latent is a stretch of the packed entries and stands for no span of its
own, so a wire is read as a whole. In the reader every head has as many places as the text has
tokens, most of them hidden: what is saved is what is stored and sent.
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
from latent_jax.ops.attention import MASKED
from latent_jax.systems.latentwire.pool import num_latents

#: Of `soften`, in logarithms of worth.
TEMPERATURE = 0.15


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
    n = max(1, total // num_latents(segment, ratio))
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


def soften(
    body: Decoder,
    frozen: Any,
    factor: Float[Array, "l g"],
    ids: Int[Array, "b t"],
    mask: Bool[Array, "b t"],
    ratio: float,
    sink: Int[Array, ""] | None,
) -> KV:
    """The whole cache of texts, each entry weighed by how likely `encode` is to keep it.

    What is kept has no gradient. Here an entry has the weight ``sigmoid((log(worth x factor) -
    threshold) / TEMPERATURE)``, and each text's threshold is where the weights add up to its
    budget: a head that takes more takes it from the others, in value and in gradient.

    Args:
      body: the frozen LLM.
      frozen: its parameters.
      factor: logarithm of what each head's worths are multiplied by.
      ids: right-padded texts.
      mask: which tokens are real.
      ratio: tokens per latent.
      sink: token before a text.
    """
    cache, score = jax.lax.stop_gradient(head_budgets.worth(body, frozen, ids, mask, sink))
    real = mask[None, :, :, None]
    room = jnp.ceil(mask.sum(-1) / ratio - 1e-6) * factor.size
    value = jnp.log(score + 1e-9) + factor[:, None, None, :]

    def excess(threshold):
        weight = jax.nn.sigmoid((value - threshold[None, :, None, None]) / TEMPERATURE) * real
        return weight.sum((0, 2, 3)) - room, weight

    def halve(bounds, _):
        low, high = bounds
        middle = (low + high) / 2
        over = excess(middle)[0] > 0
        return (jnp.where(over, middle, low), jnp.where(over, high, middle)), None

    bounds = jnp.full(len(ids), -30.0), jnp.full(len(ids), 10.0)
    threshold = jax.lax.stop_gradient(sum(jax.lax.scan(halve, bounds, None, length=30)[0]) / 2)
    # A Newton step that moves nothing has the gradient of the threshold.
    over, weight = excess(threshold)
    slope = jax.lax.stop_gradient((weight * (1 - weight)).sum((0, 2, 3)) / TEMPERATURE)
    threshold = threshold + (over - jax.lax.stop_gradient(over)) / jnp.maximum(slope, 1e-6)
    bias = jax.nn.log_sigmoid((value - threshold[None, :, None, None]) / TEMPERATURE)
    return KV(cache.k, cache.v, mask, jnp.where(real, bias, MASKED))


def folded(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters with the trained factors made part of the profile.

    Wires are read by whoever has the same profile to the last bit; what is multiplied once and
    stored is the same everywhere.
    """
    if "factor" not in params:
        return dict(params)
    factor = np.asarray(params["factor"], np.float32)
    profile = np.asarray(params["profile"], np.float32) * np.exp(factor)[..., None]
    return {**params, "profile": jnp.asarray(profile), "factor": jnp.zeros_like(factor)}


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
