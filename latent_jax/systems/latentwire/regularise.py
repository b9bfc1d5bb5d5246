"""Loss terms beside the tasks: what latents and first tokens should look like."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from latent_jax.core.types import Mean
from latent_jax.systems.latentwire.adapters import ERROR, rms
from latent_jax.systems.latentwire.config import LossConfig
from latent_jax.systems.latentwire.model import Compressor, Prefix, Wire


def unit_means(model: Compressor, wire: Wire) -> Float[Array, "b z"]:
    """Direction of the mean latent of every text."""
    z = model.informative(wire)
    weight = wire.mask[..., None].astype(jnp.float32)
    mean = jnp.sum(z * weight, 1) / jnp.maximum(weight.sum(1), 1)
    return mean / (jnp.linalg.norm(mean, axis=-1, keepdims=True) + 1e-6)


def contrast(model: Compressor, wire: Wire, texts: Int[Array, "b t"]) -> Mean:
    """Mean squared cosine between the mean latents of different texts; equal ones do not count."""
    mean = unit_means(model, wire)
    differ = jnp.any(texts[:, None] != texts[None], axis=-1)
    square = jnp.square(mean @ mean.T) * differ
    return Mean(square.sum(), jnp.maximum(differ.sum(), 1).astype(jnp.float32))


def stood_for(
    embeds: Float[Array, "b t d"], mask: Bool[Array, "b t"], segment: int, slots: int, width: int
) -> tuple[Float[Array, "b m d"], Bool[Array, "b m"]]:
    """The mean embedding of the tokens that each soft token stands for, and which stand for any.

    Args:
      embeds: of texts, right-padded.
      mask: real tokens.
      segment: tokens that are compressed at once.
      slots: soft tokens of a text, equally many of each segment.
      width: tokens that each stands for, but for the last of a segment.
    """
    b, t, d = embeds.shape
    n = max(1, t // segment)
    each = slots // n
    pad = [(0, 0), (0, 0), (0, each * width - t // n)]
    real = jnp.pad(mask.reshape(b, n, -1), pad).reshape(b, slots, width)
    x = jnp.pad(embeds.reshape(b, n, -1, d), [*pad, (0, 0)]).reshape(b, slots, width, d)
    count = real.sum(-1)
    mean = (x * real[..., None]).sum(2) / jnp.maximum(count, 1)[..., None]
    return mean, count > 0


def embedding_error(
    model: Compressor, prefix: Prefix, text: Float[Array, "b t d"], mask: Bool[Array, "b t"],
    table: Float[Array, "v d"],
) -> tuple[Mean, Mean]:  # fmt: skip
    """``1 - cosine + 0.1 squared error / mean square of embeddings`` of soft tokens to the mean
    embedding of what they stand for, and the cosine alone.
    """
    c, slots = model.config, prefix.embeds.shape[1]
    width = int(c.ratio) // c.adapter.entries
    target, there = stood_for(text.astype(jnp.float32), mask, c.segment, slots, width)
    y, weight = prefix.embeds.astype(jnp.float32), (there & prefix.mask).astype(jnp.float32)
    # Soft tokens of padding may be 0, where a norm has no gradient.
    size = jnp.sqrt((jnp.square(y).sum(-1) + 1e-12) * (jnp.square(target).sum(-1) + 1e-12))
    cosine = (y * target).sum(-1) / size
    error = jnp.square(y - target).mean(-1) / rms(table) ** 2
    lost = 1 - cosine + ERROR * error
    return Mean((lost * weight).sum(), weight.sum()), Mean((cosine * weight).sum(), weight.sum())


def magnitude(prefix: Prefix, table: Float[Array, "v d"]) -> Mean:
    """Squared log of the size of every soft token over that of the vocabulary's embeddings."""
    own = jnp.square(prefix.embeds.astype(jnp.float32)).mean(-1)
    off = jnp.square(0.5 * jnp.log(own + 1e-12) - jnp.log(rms(table)))
    weight = prefix.mask.astype(jnp.float32)
    return Mean((off * weight).sum(), weight.sum())


def first_entropy(
    body: Any, frozen: Any, hidden: Float[Array, "b t d"], supervised: Bool[Array, "b t"]
) -> Mean:
    """How far the reader's first prediction is from undecided: ``log V - entropy``, nats."""
    at = jnp.argmax(supervised, axis=1)
    first = jnp.take_along_axis(hidden, at[:, None, None], axis=1)
    log = jax.nn.log_softmax(body.apply({"params": frozen}, first, method="unembed")[:, 0])
    sure = math.log(log.shape[-1]) + (jnp.exp(log) * log).sum(-1)
    weight = supervised.any(1).astype(jnp.float32)
    return Mean((sure * weight).sum(), weight.sum())


def extra_terms(
    model: Compressor,
    losses: LossConfig,
    body: Any,
    frozen: Any,
    batch: Mapping[str, Any],
    wire: Wire | None,
    prefix: Prefix,
    hidden: Float[Array, "b t d"],
    supervised: Bool[Array, "b t"],
) -> tuple[dict[str, Mean], dict[str, Mean]]:
    """The terms of this module that have a weight, and ``embedding_cosine``."""
    terms, aux = {}, {}
    if losses.first_entropy != 0:
        terms["first_entropy"] = first_entropy(body, frozen, hidden, supervised)
    if wire is None:
        return terms, aux
    if losses.contrast != 0:
        texts = jnp.where(batch["context_mask"], batch["context"], -1)
        terms["contrast"] = contrast(model, wire, texts)
    if prefix.embeds is not None and losses.magnitude != 0:
        terms["magnitude"] = magnitude(prefix, frozen["embed"])
    if prefix.embeds is not None and losses.embeddings != 0:
        text = body.apply({"params": frozen}, batch["context"], method="embed")
        shown = batch["context_mask"], frozen["embed"]
        found = embedding_error(model, prefix, text, *shown)
        terms["embeddings"], aux["embedding_cosine"] = found
    return terms, aux


def dropped(key: Array, wire: Wire, keep: float | Float[Array, ""]) -> Wire:
    """A share of the latents is hidden from the reader."""
    return wire._replace(mask=wire.mask & jax.random.bernoulli(key, keep, wire.mask.shape))
