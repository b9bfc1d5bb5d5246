"""What the reader holds before a prompt, and the one path along which it reads on from there."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from latent_jax.backbones.decoder import KV, Decoder
from latent_jax.backbones.sink import behind, sink_kv
from latent_jax.systems.latentwire.model import Prefix


class Given(NamedTuple):
    """What the reader holds before the prompt.

    Attributes:
      kv: keys and values that the prompt sees, or None.
      embeds: embeddings that precede the prompt in one sequence, or None.
      mask: which of ``embeds`` are real.
      start: rotary position of the first of ``embeds``, or of the prompt without them.
    """

    kv: KV | None
    embeds: Float[Array, "b n d"] | None
    mask: Bool[Array, "b n"] | None
    start: Int[Array, " b"]


class Asked(NamedTuple):
    """All that the reader reads before it writes.

    Attributes:
      given: what stands for the text.
      prompt_ids: left-padded token ids, after the learned embeddings.
      prompt_mask: which of them are real.
      lead: learned embeddings between ``given`` and the prompt, or None.
      lead_mask: which of them are real; None: all.
    """

    given: Given
    prompt_ids: Int[Array, "b p"]
    prompt_mask: Bool[Array, "b p"]
    lead: Float[Array, "b n d"] | None = None
    lead_mask: Bool[Array, "b n"] | None = None


def embed(decoder: Decoder, params: Any, ids: Int[Array, "b t"]) -> Float[Array, "b t d"]:
    """Input embeddings of token ids."""
    return decoder.apply({"params": params}, ids, method="embed")


@functools.partial(jax.jit, static_argnames=("decoder",))
def prefill(
    decoder: Decoder, params: Any, ids: Int[Array, "b t"], mask: Bool[Array, "b t"],
    sink: Int[Array, ""] | None = None,
) -> KV:  # fmt: skip
    """The frozen reader's cache of right-padded texts, seen behind the sink but without it."""
    before = None if sink is None else sink_kv(decoder, params, sink, ids.shape[0])
    x = embed(decoder, params, ids)
    return decoder.apply({"params": params}, x, mask=mask, prefix=before).kv


@functools.partial(jax.jit, static_argnames=("decoder",))
def with_sink(decoder: Decoder, params: Any, given: Given, sink: Int[Array, ""] | None) -> Given:
    """The same behind the sink."""
    if sink is None:
        return given
    first = sink_kv(decoder, params, sink, given.start.shape[0])
    return given._replace(kv=behind(first, given.kv))


@functools.partial(jax.jit, static_argnames=("decoder",))
def prefix_to_given(decoder: Decoder, params: Any, prefix: Prefix) -> Given:
    """Any prefix as keys and values, behind its sink: soft tokens run through the reader at their
    own positions.
    """
    kv, sink = prefix.kv, None
    if prefix.sink is not None:
        sink = sink_kv(decoder, params, prefix.sink, prefix.start.shape[0])
    if kv is None:
        x, where = prefix.embeds, prefix.positions
        kv = decoder.apply({"params": params}, x, where, prefix.mask, prefix=sink).kv
    return Given(behind(sink, kv), None, None, prefix.start)


@functools.partial(jax.jit, static_argnames=("decoder", "width"))
def widen(decoder: Decoder, params: Any, given: Given, width: int) -> Given:
    """The same with ``width`` key/value places, the added ones masked.

    Evaluation widens every arm to one shape: decoding is compiled once and not once per arm.
    """
    c, kv = decoder.config, given.kv
    if kv is None:
        shape = (c.num_layers, given.start.shape[0], 0, c.num_kv_heads, c.head_dim)
        none = jnp.zeros(shape, params["embed"].dtype)
        kv = KV(none, none, jnp.zeros(shape[1:3], bool))
    room = width - kv.mask.shape[1]
    pad = [(0, 0), (0, 0), (0, room), (0, 0), (0, 0)]
    # A weakly typed mask (of a comparison) would be another signature, hence another compilation.
    mask = jnp.pad(kv.mask.astype(bool), [(0, 0), (0, room)])
    bias = None if kv.bias is None else jnp.pad(kv.bias, pad[:-1])
    kv = KV(jnp.pad(kv.k, pad), jnp.pad(kv.v, pad), mask, bias, kv.cross)
    return given._replace(kv=kv)


def join(
    decoder: Decoder, params: Any, asked: Asked
) -> tuple[Float[Array, "b s d"], Bool[Array, "b s"]]:
    """Embeddings and mask after ``given.kv``: its own embeddings, learned ones, the prompt."""
    given, lead, lead_mask = asked.given, asked.lead, asked.lead_mask
    prompt = embed(decoder, params, asked.prompt_ids)
    parts = [] if given.embeds is None else [(given.embeds, given.mask)]
    if lead is not None:
        parts.append((lead, jnp.ones(lead.shape[:2], bool) if lead_mask is None else lead_mask))
    parts.append((prompt, asked.prompt_mask))
    return (
        jnp.concatenate([x.astype(prompt.dtype) for x, _ in parts], axis=1),
        jnp.concatenate([m for _, m in parts], axis=1),
    )


def answer_hidden(
    decoder: Decoder,
    params: Any,
    asked: Asked,
    answer_ids: Int[Array, "b a"],
    answer_mask: Bool[Array, "b a"],
) -> Float[Array, "b a d"]:
    """Hidden states that predict each answer token, teacher-forced (prompts left-padded).

    The one teacher-forced path of training and evaluation; generation (`generate_ids`) sees the
    same sequence.
    """
    x, mask = join(decoder, params, asked)
    gold = embed(decoder, params, answer_ids[:, :-1])
    x = jnp.concatenate([x, gold.astype(x.dtype)], axis=1)
    mask = jnp.concatenate([mask, answer_mask[:, :-1]], axis=1)
    positions = asked.given.start[:, None] + jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    out = decoder.apply({"params": params}, x, positions, mask, prefix=asked.given.kv)
    return out.hidden[:, -answer_ids.shape[1] :]
