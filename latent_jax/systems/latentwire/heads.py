"""Latents made of the text's own entries, of which every head keeps as many as it needs.

``M`` latents have room for as many numbers as ``M`` tokens have in all heads of all layers. Which
entries fill it, and what they say for those left out, is `latent_jax.backbones.head_entries`'s; how
the heads share it `head_budgets`'s. A few texts tell what the ranks of each head are worth; one
factor per head can be trained on top of that (`soften`). A latent is a stretch of the packed
entries and stands for no span of its own, so a wire is read as a whole. In the reader every head
has as many places as any may fill (`EncoderConfig.places`), most of them hidden: what is saved is
foremost what is stored and sent.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from latent_jax.backbones import head_budgets, head_entries
from latent_jax.backbones.config import DecoderConfig
from latent_jax.backbones.decoder import KV, Decoder, inverse_frequencies
from latent_jax.backbones.sink import behind
from latent_jax.ops import rope
from latent_jax.ops.attention import MASKED
from latent_jax.systems.latentwire.pool import num_latents, real_slots

#: Of `soften`, in logarithms of worth.
TEMPERATURE = 0.15


class Calibration(NamedTuple):
    """What a few texts tell about the heads of an LLM; whoever reads a wire needs the same.

    Attributes:
      profile: what the ranks of each head's entries are worth (`head_budgets.counts`).
      centre: mean of each head's keys and values, one behind the other.
      spread: their standard deviation.
    """

    profile: Float[Array, "l g p"]
    centre: Float[Array, "l g e"]
    spread: Float[Array, "l g e"]

    @staticmethod
    def blank(config: DecoderConfig) -> Calibration:
        """All heads alike, numbers as they are."""
        heads = config.num_layers, config.num_kv_heads
        shape = (*heads, 2 * config.head_dim)
        return Calibration(
            jnp.ones((*heads, head_budgets.POINTS)), jnp.zeros(shape), jnp.ones(shape)
        )


def room(latents: Int[Array, " b"], config: DecoderConfig) -> Int[Array, " b"]:
    """Entries, each a key, a value and a weight, that some latents have place for."""
    return latents * config.kv_floats_per_token // (2 * config.head_dim + 1)


def encode(
    body: Decoder,
    frozen: Any,
    known: Calibration,
    ids: Int[Array, "b t"],
    mask: Bool[Array, "b t"],
    valid: Bool[Array, "b m"],
    sink: Int[Array, ""] | None,
    most: int | None = None,
) -> Float[Array, "b m z"]:
    """Packed entries of one segment each; keys are rotated as from the segment's first token.

    Args:
      most: entries of one head; none: all.
    """
    c, (b, m) = body.config, valid.shape
    total, places = room(valid.sum(-1), c), min(ids.shape[1], most or ids.shape[1])
    count = head_budgets.counts(known.profile, mask.sum(-1), total, places)
    kv = head_entries.entries(body, frozen, ids, mask, sink, count).kv
    order = head_budgets.kept_first(kv.bias > MASKED)
    # A common size of all channels: integer wires have few steps, and keys have channels that
    # are many times as large as the others.
    rows = jnp.concatenate([kv.k, kv.v], axis=-1).astype(jnp.float32)
    rows = (rows - _heads(known.centre)) / _heads(known.spread)
    rows = jnp.concatenate([rows, kv.bias[..., None]], axis=-1)
    packed = head_budgets.pack(rows, order, count, int(room(m, c))).reshape(b, -1)
    packed = jnp.pad(packed, [(0, 0), (0, m * c.kv_floats_per_token - packed.shape[1])])
    return jax.lax.stop_gradient(packed.reshape(b, m, -1))


def decode(
    reader: DecoderConfig, known: Calibration, wire: Any, segment: int, ratio: float,
    most: int | None = None,
) -> KV:  # fmt: skip
    """The entries of all segments of a wire, as a prefix; ``most`` is that of `encode`."""
    b, total, _ = wire.z.shape
    n = max(1, total // num_latents(segment, ratio))
    m, d = total // n, reader.head_dim
    # As many tokens as that many latents can stand for.
    places = min(segment, int(np.floor(m * ratio + 1e-6)))
    places = min(places, most or places)
    begin = jnp.arange(n) * segment
    tokens = jnp.clip(wire.length[:, None] - begin, 0, segment).reshape(-1)
    held = room(wire.mask.reshape(b * n, m).sum(-1), reader)
    count = head_budgets.counts(known.profile, tokens, held, places)
    packed = wire.z.reshape(b * n, -1)[:, : int(room(m, reader)) * (2 * d + 1)]
    rows, used = head_budgets.unpack(packed.reshape(b * n, -1, 2 * d + 1), count, places)
    k, v = jnp.split(rows[..., :-1] * _heads(known.spread) + _heads(known.centre), 2, axis=-1)
    where = jnp.broadcast_to(jnp.tile(begin, b)[:, None], (b * n, places))
    k = rope.rotate_layers(k, where, jnp.asarray(inverse_frequencies(reader)))
    bias = jnp.where(used, rows[..., -1], MASKED)

    def joined(x):
        return x.reshape(x.shape[0], b, n * places, *x.shape[3:])

    return KV(joined(k), joined(v), joined(used.any((0, 3))[None])[0], joined(bias))


def _heads(x: Float[Array, "l g e"]) -> Float[Array, "l 1 1 g e"]:
    return x[:, None, None]


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
    found = jax.lax.stop_gradient(head_entries.entries(body, frozen, ids, mask, sink))
    cache, real = found.kv, mask[None, :, :, None]
    # As `counts` takes it: no rank is worth more than one before it.
    ranked = jax.lax.cummin(found.worth, axis=3)
    worth = jnp.take_along_axis(ranked, found.rank, axis=3).swapaxes(2, 3)
    budget = room(real_slots(mask.sum(-1), mask.shape[1], ratio).sum(-1), body.config)
    value = jnp.log(worth + 1e-9) + factor[:, None, None, :]

    def excess(threshold):
        weight = jax.nn.sigmoid((value - threshold[None, :, None, None]) / TEMPERATURE) * real
        return weight.sum((0, 2, 3)) - budget, weight

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


def asked(
    reader: DecoderConfig,
    known: Calibration,
    rows: Float[Array, "l n g e"],
    given: Any,
    wanted: Bool[Array, " b"],
) -> Any:
    """What a reader is given, behind it learned keys and values that ask for the text (prefix
    tuning, Li & Liang 2021): a vector in front of the frozen layers says too little to make them
    copy.

    Args:
      reader: architecture of the LLM.
      known: whose units the entries are in.
      rows: the entries, a key and a value each.
      given: anything with ``kv`` and ``start``.
      wanted: which texts are asked for.
    """
    rows = rows * known.spread[:, None] + known.centre[:, None]
    b, n = len(wanted), rows.shape[1]
    k, v = jnp.split(jnp.broadcast_to(rows[:, None], (len(rows), b, *rows.shape[1:])), 2, -1)
    where = given.start[:, None] + jnp.arange(n)
    k = rope.rotate_layers(k, where, jnp.asarray(inverse_frequencies(reader)))
    kv = KV(k, v, jnp.broadcast_to(wanted[:, None], (b, n)))
    if given.kv is not None:
        kv = KV(k.astype(given.kv.k.dtype), v.astype(given.kv.v.dtype), kv.mask)
    return given._replace(kv=behind(given.kv, kv), start=given.start + n * wanted)


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
) -> Calibration:
    """What `encode` and `decode` have to know, found in some texts.

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
        found = head_entries.entries(body, frozen, ids, mask, first)
        x = jnp.concatenate([found.kv.k, found.kv.v], axis=-1).astype(jnp.float32)
        real = (mask / mask.sum())[None, :, :, None, None]
        profile = head_budgets.profile(found.worth, mask)
        return Calibration(profile, (x * real).sum((1, 2)), (x * x * real).sum((1, 2)))

    add = functools.partial(jax.tree.map, jnp.add)
    total, texts = jax.tree.map(jnp.zeros_like, Calibration.blank(body.config)), 0
    for batch in batches:
        ids, mask = jnp.asarray(batch["context"]), jnp.asarray(batch["context_mask"])
        # The last batch of a stream may be smaller.
        weight = functools.partial(jnp.multiply, len(ids))
        total = add(total, jax.tree.map(weight, one(frozen, ids, mask)))
        texts += len(ids)
        if texts >= most:
            break
    profile, mean, square = jax.tree.map(functools.partial(jnp.multiply, 1 / texts), total)
    return Calibration(profile, mean, jnp.sqrt(jnp.maximum(square - mean * mean, 1e-8)))
