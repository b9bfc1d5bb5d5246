"""Evaluation arms: what the frozen reader is given in place of a text.

Every arm ends in a `Given`, and every `Given` is continued by the same prompt: the arms differ in
nothing else. Arms that stand for the whole text (latents, soft tokens, selections of its cache)
leave the prompt at rotary position T, the text's length; arms that are a shorter text of their own
leave it where that text ends.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from latent_jax.backbones.decoder import KV, Decoder
from latent_jax.backbones.sink import behind, sink_kv
from latent_jax.systems.latentwire import selection
from latent_jax.systems.latentwire.compressed import Compressed
from latent_jax.systems.latentwire.given import (
    Given,
    embed,
    prefill,
    prefix_to_given,
    with_sink,
)
from latent_jax.systems.latentwire.model import Prefix, num_latents
from latent_jax.systems.latentwire.pool import real_slots, span_of

#: Arms of the reader's own text, no training anywhere.
TEXT_ARMS = (
    "full_text", "embedding_replay", "embedding_replay_anchor", "no_context",
    "token_budget_head", "token_budget_tail", "stride_tokens", "random_tokens",
)  # fmt: skip
#: Arms of soft tokens or selected keys and values, no training anywhere.
FROZEN_ARMS = ("mean_pool", "pca", "kv_stride", "kv_topk", "kv_question")
#: Arms of a trained compressor, with their controls.
LATENT_ARMS = ("latent", "cramming", "shuffled", "scrambled", "zero")
#: The reader first rebuilds the text from its latents, then reads what it wrote.
REBUILT = "rebuilt"
ARMS = (*TEXT_ARMS, *FROZEN_ARMS, *LATENT_ARMS, REBUILT)
#: Arms whose budget is one slot per `ratio` tokens.
BUDGETED = frozenset(
    {"token_budget_head", "token_budget_tail", "stride_tokens", "random_tokens", *FROZEN_ARMS}
)
#: Arms that start from the frozen cache of the whole text.
CACHED = frozenset({"full_text", "kv_stride", "kv_topk", "kv_question"})


@functools.partial(jax.jit, static_argnames=("name",))
def instructed(latents: Compressed, given: Given, name: str | None) -> Given:
    """What the reader is given, behind it what a task has learned; None is no task."""
    return given if name is None else latents.instructed(given, name)


def budget(mask: Bool[Array, "b t"], ratio: float) -> Int[Array, " b"]:
    """M of each text: ``ceil(T / ratio)``."""
    return real_slots(mask.sum(-1), mask.shape[1], ratio).sum(-1)


def subset_index(
    arm: str, mask: Bool[Array, "b t"], ratio: float, rows: Int[Array, " b"], key: Array
) -> tuple[Int[Array, "b m"], Bool[Array, "b m"]]:
    """Which M tokens of each text an arm keeps, in text order, and which of the slots hold one.

    Args:
      arm: ``token_budget_head``, ``token_budget_tail``, ``random_tokens``, or a stride arm.
      rows: example numbers; random choices depend on them and not on the batch.
    """
    b, t = mask.shape
    length = mask.sum(-1)
    valid = real_slots(length, t, ratio)
    slot, keep = np.arange(valid.shape[1]), valid.sum(-1)
    if arm == "token_budget_head":
        index = jnp.broadcast_to(slot, valid.shape)
    elif arm == "token_budget_tail":
        index = (length - keep)[:, None] + slot
    elif arm == "random_tokens":
        noise = jax.vmap(lambda r: jax.random.uniform(jax.random.fold_in(key, r), (t,)))(rows)
        order = jnp.argsort(jnp.where(mask, noise, jnp.inf), axis=1)[:, : len(slot)]
        index = jnp.sort(jnp.where(valid, order, t), axis=1)
    else:
        index = jnp.broadcast_to(np.floor(slot * ratio + 1e-9).astype(np.int32), valid.shape)
    return jnp.clip(index, 0, t - 1), valid


def span_means(
    decoder: Decoder, params: Any, ids: Int[Array, "b t"], mask: Bool[Array, "b t"], ratio: float
) -> Prefix:
    """The mean embedding of each span, as a soft token at the span's middle position."""
    t = ids.shape[1]
    slot = jnp.arange(num_latents(t, ratio))
    weight = (span_of(t, ratio)[None] == slot[:, None])[None] & mask[:, None]
    weight = weight / jnp.maximum(weight.sum(-1, keepdims=True), 1)
    vectors = embed(decoder, params, ids)
    pooled = jnp.einsum("bmt,btd->bmd", weight, vectors).astype(vectors.dtype)
    middle = jnp.floor(slot * ratio + (ratio - 1) / 2).astype(jnp.int32)
    valid = real_slots(mask.sum(-1), t, ratio)
    return Prefix(None, pooled, valid, jnp.broadcast_to(middle, valid.shape), mask.sum(-1))


def principal_projection(table: Float[Array, "v d"], rank: int) -> tuple[Array, Array]:
    """The vocabulary's mean embedding and the projector onto its ``rank`` main components."""
    table = table.astype(jnp.float32)
    mean = table.mean(0)
    centred = table - mean
    _, vectors = jnp.linalg.eigh(centred.T @ centred / len(table))
    top = vectors[:, -rank:]
    return mean, top @ top.T


def scramble(wire: Any, rows: Int[Array, " b"], key: Array) -> Any:
    """The wire's own latents in random order over its own (valid) places."""
    mask = wire.mask
    noise = jax.vmap(lambda r: jax.random.uniform(jax.random.fold_in(key, r), mask.shape[1:]))(rows)
    drawn = jnp.argsort(jnp.where(mask, noise, jnp.inf), axis=1)
    places = jnp.argsort(~mask, axis=1, stable=True)
    source = jax.vmap(lambda p, d: jnp.zeros_like(p).at[p].set(d))(places, drawn)
    return wire._replace(z=jnp.take_along_axis(wire.z, source[..., None], axis=1))


def encode(latents: Compressed, ids: Int[Array, "b t"], mask: Bool[Array, "b t"]) -> Any:
    """The wire of right-padded texts, made once where the compressor keeps what it has made
    (`bits.Rounded`).
    """
    own = getattr(latents, "encode", None)
    return _encode(latents, ids, mask) if own is None else own(ids, mask)


@jax.jit
def _encode(latents, ids, mask):
    return latents.compress(ids, mask)


@jax.jit
def received(latents: Compressed, wire: Any) -> Bool[Array, "b m"]:
    """Which latents of a wire its reader is given (`Compressed.received`)."""
    return latents.received(wire)


@functools.partial(jax.jit, static_argnames=("arm", "decoder"))
def latent_given(
    arm: str, decoder: Decoder, params: Any, latents: Compressed, wire: Any,
    rows: Int[Array, " b"], key: Array,
) -> Given:  # fmt: skip
    """The latent arm or a control; for ``shuffled`` the wire is another example's already, for
    ``cramming`` the optimised one.
    """
    if arm == "zero":
        wire = wire._replace(z=jnp.zeros_like(wire.z))
    elif arm == "scrambled":
        wire = scramble(wire, rows, key)
    return prefix_to_given(decoder, params, latents.prefix(wire))


@functools.partial(jax.jit, static_argnames=("arm", "ratio"))
def token_subset(
    arm: str, ids: Int[Array, "b t"], mask: Bool[Array, "b t"], ratio: float,
    rows: Int[Array, " b"], key: Array,
) -> tuple[Int[Array, "b m"], Bool[Array, "b m"]]:  # fmt: skip
    """The kept tokens of a text arm, right-padded, and which of them are real."""
    index, valid = subset_index(arm, mask, ratio, rows, key)
    return jnp.take_along_axis(ids, index, axis=1), valid


@functools.partial(jax.jit, static_argnames=("arm", "decoder", "ratio"))
def pooled_prefix(
    arm: str, decoder: Decoder, params: Any, ids: Int[Array, "b t"], mask: Bool[Array, "b t"],
    ratio: float,
) -> Prefix:  # fmt: skip
    """Soft tokens of the arms ``mean_pool`` and ``pca``."""
    prefix = span_means(decoder, params, ids, mask, ratio)
    if arm == "pca":
        rank = max(1, round(decoder.config.hidden_size / ratio))
        mean, project = principal_projection(params["embed"], rank)
        low = (prefix.embeds - mean) @ project + mean
        prefix = prefix._replace(embeds=low.astype(prefix.embeds.dtype))
    return prefix


@functools.partial(jax.jit, static_argnames=("arm", "decoder", "ratio"))
def selected_kv(
    arm: str, decoder: Decoder, params: Any, context: KV,
    ids: Int[Array, "b t"], mask: Bool[Array, "b t"],
    prompt_ids: Int[Array, "b p"], prompt_mask: Bool[Array, "b p"],
    ratio: float, sink: Int[Array, ""] | None = None,
) -> KV:  # fmt: skip
    """What the arms ``kv_stride``, ``kv_topk`` and ``kv_question`` keep of the text's cache."""
    b, t = ids.shape
    if arm == "kv_stride":
        rows, key = jnp.arange(b), jax.random.key(0)  # a stride draws nothing
        return selection.keep_positions(context, *subset_index(arm, mask, ratio, rows, key))
    first = None if sink is None else sink_kv(decoder, params, sink, b)
    if arm == "kv_topk":
        score = selection.mass_from_tail(decoder, params, ids, mask, sink=first)
    else:
        seen = behind(first, context)
        score = selection.mass_from_question(
            decoder, params, seen, mask.sum(-1), prompt_ids, prompt_mask
        )[:, :, seen.mask.shape[1] - t :]
    places = num_latents(t, ratio)
    return selection.keep_best(context, score, budget(mask, ratio), places, first=sink is None)


def build(
    arm: str,
    decoder: Decoder,
    params: Any,
    ids: Int[Array, "b t"],
    mask: Bool[Array, "b t"],
    prompt_ids: Int[Array, "b p"],
    prompt_mask: Bool[Array, "b p"],
    rows: Int[Array, " b"],
    *,
    ratio: float = 4.0,
    context: KV | None = None,
    latents: Compressed | None = None,
    wire: Any = None,
    anchor_ids: Int[Array, " a"] | None = None,
    key: Array | None = None,
    sink: Int[Array, ""] | None = None,
) -> Given:
    """What the reader is given in one arm.

    Made of jitted pieces rather than jitted as a whole: arms with equal shapes share programs.

    Args:
      arm: one of `ARMS`.
      decoder: the reader.
      params: its frozen parameters.
      ids: context tokens, right-padded (for ``shuffled``: another's, unless ``wire`` is given; for
        ``rebuilt``: what the reader made of its latents).
      mask: which of them are real.
      prompt_ids: the question's tokens; only ``kv_question`` looks at them.
      prompt_mask: which of them are real.
      rows: example numbers, for reproducible random choices.
      ratio: context tokens per slot.
      context: `prefill` of the same texts, where several arms share it.
      latents: the trained compressor, for the latent arms.
      wire: `encode` of the texts, where several arms share it.
      anchor_ids: text after the context in ``embedding_replay_anchor``.
      key: PRNG key of the random arms.
      sink: token that every arm gets first; a compressor brings its own, which must be the same.

    Raises:
      ValueError: unknown arm, or a latent arm without a compressor.
    """
    b, t = ids.shape
    length, zero = mask.sum(-1), jnp.zeros((b,), jnp.int32)
    key = jax.random.key(0) if key is None else key
    if arm in (*CACHED, REBUILT) and context is None:
        context = prefill(decoder, params, ids, mask, sink)
    ready = functools.partial(with_sink, decoder, params, sink=sink)
    if arm == "no_context":
        return ready(Given(None, None, None, zero))
    if arm in ("full_text", REBUILT):
        return ready(Given(context, None, None, length))
    if arm in ("embedding_replay", "embedding_replay_anchor"):
        vectors = embed(decoder, params, ids)
        if arm == "embedding_replay_anchor" and anchor_ids is not None and anchor_ids.size:
            anchor = jnp.broadcast_to(anchor_ids, (b, anchor_ids.shape[0]))
            vectors = jnp.concatenate([vectors, embed(decoder, params, anchor)], axis=1)
            mask = jnp.concatenate([mask, jnp.ones(anchor.shape, bool)], axis=1)
        return ready(Given(None, vectors, mask, zero))
    if arm in ("token_budget_head", "token_budget_tail", "stride_tokens", "random_tokens"):
        kept, valid = token_subset(arm, ids, mask, ratio, rows, key)
        cache = prefill(decoder, params, kept, valid, sink)
        return ready(Given(cache, None, None, valid.sum(-1)))
    if arm in ("mean_pool", "pca"):
        prefix = pooled_prefix(arm, decoder, params, ids, mask, ratio)._replace(sink=sink)
        return prefix_to_given(decoder, params, prefix)
    if arm in ("kv_stride", "kv_topk", "kv_question"):
        kept = selected_kv(
            arm, decoder, params, context, ids, mask, prompt_ids, prompt_mask, ratio, sink
        )
        return ready(Given(kept, None, None, length))
    if arm not in LATENT_ARMS:
        raise ValueError(f"unknown arm {arm!r}; known: {', '.join(ARMS)}")
    if latents is None:
        raise ValueError(f"arm {arm!r} needs a compressor")
    wire = encode(latents, ids, mask) if wire is None else wire
    return latent_given(arm, decoder, params, latents, wire, rows, key)
