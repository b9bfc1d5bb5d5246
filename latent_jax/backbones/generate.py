"""Batched generation: bucketed prefill, then one jitted decode loop over a preallocated cache.

The cache is a `KV` of fixed size: `[prefix | prompt | new tokens]`. Prompts are left-padded, so
every row writes its next token into the same slot; padding is masked, never read. The loop ends
as soon as every row has finished. Prompt length, prefix length and the number of new tokens are
rounded up to a few sizes, so the number of compiled programs stays small; how many tokens are
wanted, temperature, top-p and stop ids stay traced.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from latent_jax.backbones import decode_cpu
from latent_jax.backbones.decode_loop import Generated, decode
from latent_jax.backbones.decoder import KV, Decoder
from latent_jax.backbones.padding import bucket, left_align, pad_left, pad_prefix
from latent_jax.backbones.sampling import Sampling, SamplingMode, row_keys
from latent_jax.core.errors import BackboneError, ConfigError


def prefill(
    decoder: Decoder,
    params: Any,
    inputs_embeds: Float[Array, "b t d"],
    mask: Bool[Array, "b t"],
    start: Int[Array, " b"],
    prefix: KV | None,
    room: int,
    lora: Any = None,
) -> tuple[Float[Array, "b d"], KV, Int[Array, " b"]]:
    """Run the prompt once.

    Args:
        decoder: the decoder module.
        params: its parameters.
        inputs_embeds: left-padded prompt embeddings.
        mask: valid places.
        start: rotary position of each row's first valid place.
        prefix: keys and values every place sees.
        room: free slots to leave at the end of the cache.
        lora: low-rank deltas, as `Decoder` takes them.

    Returns:
        (last hidden state of each row, cache `[prefix | prompt | room]`, rotary position of the
        next token).
    """
    positions = start[:, None] + jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    out = decoder.apply(
        {"params": params}, inputs_embeds, positions, mask=mask, prefix=prefix, lora=lora
    )
    parts = [out.kv] if prefix is None else [prefix, out.kv]
    free = [(0, 0), (0, 0), (0, room), (0, 0), (0, 0)]
    k = jnp.pad(jnp.concatenate([p.k.astype(out.kv.k.dtype) for p in parts], axis=2), free)
    v = jnp.pad(jnp.concatenate([p.v.astype(out.kv.v.dtype) for p in parts], axis=2), free)
    valid = jnp.pad(jnp.concatenate([p.mask for p in parts], axis=1), [(0, 0), (0, room)])
    bias = None
    if prefix is not None and prefix.bias is not None:
        after = k.shape[2] - prefix.bias.shape[2]
        bias = jnp.pad(prefix.bias, [(0, 0), (0, 0), (0, after), (0, 0)])
    cross = None if prefix is None else prefix.cross
    return out.hidden[:, -1], KV(k, v, valid, bias, cross), start + jnp.sum(mask, axis=1)


@functools.partial(jax.jit, static_argnames=("decoder", "slots", "mode"))
def _generate(
    decoder: Decoder,
    params: Any,
    layers: Any,
    inputs_embeds: Array,
    mask: Array,
    start: Array,
    prefix: KV | None,
    lora: Any,
    keys: Array,
    limit: Array,
    stops: Int[Array, " e"],
    values: tuple[Array, Array],
    *,
    slots: int,
    mode: SamplingMode,
) -> Generated:
    hidden, cache, position = prefill(
        decoder, params, inputs_embeds, mask, start, prefix, room=slots, lora=lora
    )
    return decode(
        decoder, params, layers, hidden, cache, position, lora, keys, limit, stops, values,
        slots=slots, mode=mode,
    )  # fmt: skip


class Begun(NamedTuple):
    """A prompt that was read, of one row.

    Attributes:
        hidden: last hidden state.
        cache: keys and values of prefix and prompt, with free entries at the end.
        position: rotary position of the next token.
    """

    hidden: Float[Array, "1 d"]
    cache: KV
    position: Int[Array, " 1"]


@functools.partial(jax.jit, static_argnames=("decoder", "slots"))
def _go_on(decoder, params, layers, begun, limit, stops, *, slots):
    keys, greedy = row_keys(jax.random.key(0), jnp.arange(1)), Sampling()
    return decode(
        decoder, params, layers, *begun, None, keys, limit, stops, greedy.values,
        slots=slots, mode=greedy.mode,
    )  # fmt: skip


def go_on(
    decoder: Decoder, params: Any, begun: Begun, slots: int, limit: int,
    stop_ids: Sequence[int] = (),
) -> Generated:  # fmt: skip
    """Greedy tokens behind a prompt that was read (`prefill`); one program per size of its cache.

    Args:
        decoder: the decoder module.
        params: its parameters.
        begun: what they follow.
        slots: free entries at the end of its cache.
        limit: tokens wanted, at most so many.
        stop_ids: as of `generate_ids`.
    """
    layers = None
    if decode_cpu.pays(decoder.config, params, 1, slots):
        layers = decode_cpu.laid_out(decoder.config, params, None, begun.hidden.dtype)
    limit, stops = jnp.int32(min(limit, slots)), jnp.asarray(_padded(stop_ids))
    return _go_on(decoder, params, layers, begun, limit, stops, slots=slots)


def _padded(stop_ids: Sequence[int]) -> Int[np.ndarray, " e"]:
    """Stop ids as a traced vector: another set of the same size class compiles nothing."""
    stops = np.full((bucket(max(len(stop_ids), 1), 4),), -1, np.int32)  # -1 never matches
    stops[: len(stop_ids)] = list(stop_ids)
    return stops


def generate_ids(
    decoder: Decoder,
    params: Any,
    inputs_embeds: Float[Array, "b t d"],
    mask: Bool[Array, "b t"] | None = None,
    *,
    max_new_tokens: int,
    start: Int[Array, " b"] | int = 0,
    prefix: KV | None = None,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    stop_ids: Sequence[int] = (),
    rng: Array | int = 0,
    rows: Int[Array, " b"] | None = None,
    lora: Any = None,
) -> Generated:
    """Generate from embeddings (of tokens, of soft tokens, or both concatenated).

    Args:
        decoder: the decoder module.
        params: its parameters, an ordinary argument of the compiled program.
        inputs_embeds: prompts; their dtype is the compute dtype. Padding may be anywhere (`mask`
            says where).
        mask: valid places, all by default. Every row needs at least one.
        max_new_tokens: how many tokens at most.
        start: rotary position of the first valid prompt place of each row (after a prefix:
            usually the number of positions the prefix stands for).
        prefix: post-RoPE keys and values that every token sees.
        sampling: how tokens are chosen.
        stop_ids: ids that end a row; the one met is the row's last token.
        rng: a PRNG key or a seed. Row i draws from `fold_in(rng, rows[i])`.
        rows: each row's number in the whole job, 0, 1, … by default; keeps draws the same however
            a job is batched.
        lora: low-rank deltas for the decoder's projections.

    Returns:
        New tokens, their number per row, and whether a stop token was met.

    Raises:
        ConfigError: `max_new_tokens` below 1.
        BackboneError: shapes that do not fit together.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}: use at least 1")
    if inputs_embeds.ndim != 3 or inputs_embeds.shape[-1] != decoder.config.hidden_size:
        raise BackboneError(
            f"prompt embeddings have shape {tuple(inputs_embeds.shape)}: expected "
            f"[batch, tokens, {decoder.config.hidden_size}]"
        )
    b, t, _ = inputs_embeds.shape
    if t < 1:
        raise BackboneError("the prompt is empty: give at least one token or soft token")
    if prefix is not None and prefix.k.shape[:2] != (decoder.config.num_layers, b):
        raise BackboneError(
            f"prefix keys have shape {tuple(prefix.k.shape)}: expected "
            f"[{decoder.config.num_layers} layers, batch {b}, entries, heads, head_dim]"
        )
    if mask is None:
        mask = jnp.ones((b, t), bool)
    elif not (isinstance(mask, np.ndarray) and np.all(mask[:, :-1] <= mask[:, 1:])):
        inputs_embeds, mask = left_align(inputs_embeds, jnp.asarray(mask, bool))
    width = bucket(t)
    inputs_embeds, mask = pad_left(inputs_embeds, width), pad_left(mask, width)
    if prefix is not None:
        prefix = (
            None
            if prefix.mask.shape[1] == 0 and prefix.cross is None
            else pad_prefix(prefix, bucket(prefix.mask.shape[1], 8))
        )
    if isinstance(rng, int):
        rng = jax.random.key(rng)
    slots = bucket(max_new_tokens)
    layers = None
    plain = prefix is None or prefix.cross is None  # its step knows no blocks
    if plain and decode_cpu.pays(decoder.config, params, b, max_new_tokens):
        layers = decode_cpu.laid_out(decoder.config, params, lora, inputs_embeds.dtype)
    out = _generate(
        decoder,
        params,
        layers,
        inputs_embeds,
        mask,
        jnp.broadcast_to(jnp.asarray(start, jnp.int32), (b,)),
        prefix,
        lora,
        row_keys(rng, jnp.arange(b) if rows is None else jnp.asarray(rows)),
        jnp.int32(max_new_tokens),
        jnp.asarray(_padded(stop_ids)),
        sampling.values,
        slots=slots,
        mode=sampling.mode,
    )
    return out._replace(tokens=out.tokens[:, :max_new_tokens])
