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
from latent_jax.backbones.decoder import KV, Decoder
from latent_jax.backbones.padding import bucket, left_align, pad_left, pad_prefix
from latent_jax.backbones.sampling import Sampling, SamplingMode, choose, row_keys
from latent_jax.core.errors import BackboneError, ConfigError


class Generated(NamedTuple):
    """New tokens of each row.

    Attributes:
        tokens: ids, 0 after a row's end; the stop token itself is kept.
        lengths: tokens of each row, its stop token included.
        stopped: whether the row ended on a stop token (False: it ran out of `max_new_tokens`).
    """

    tokens: Int[Array, "b n"]
    lengths: Int[Array, " b"]
    stopped: Bool[Array, " b"]


class _Loop(NamedTuple):
    """What the decode loop carries; `cache` is whatever the step in use keeps its entries in."""

    step: Array
    token: Int[Array, " b"]
    cache: Any
    valid: Bool[Array, "b s"]
    tokens: Int[Array, "b n"]
    lengths: Int[Array, " b"]
    stopped: Bool[Array, " b"]


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


def decode_step(
    decoder: Decoder,
    params: Any,
    token: Int[Array, " b"],
    position: Int[Array, " b"],
    cache: KV,
    slot: Int[Array, ""],
    dtype: Any,
    lora: Any = None,
) -> tuple[Float[Array, "b d"], KV]:
    """One token per row through the decoder; its keys and values go into `slot` (in place).

    Args:
        decoder: the decoder module.
        params: its parameters.
        token: ids.
        position: rotary positions.
        cache: entries that the tokens see besides themselves.
        slot: free entry, the same for every row.
        dtype: compute dtype.
        lora: low-rank deltas.

    Returns:
        (hidden states, cache with the entry written and valid).
    """
    x = decoder.apply({"params": params}, token[:, None], dtype, method="embed")
    out = decoder.apply({"params": params}, x, position[:, None], prefix=cache, lora=lora)
    at = (0, 0, slot, 0, 0)
    cache = KV(
        jax.lax.dynamic_update_slice(cache.k, out.kv.k, at),
        jax.lax.dynamic_update_slice(cache.v, out.kv.v, at),
        jax.lax.dynamic_update_slice(cache.mask, out.kv.mask, (0, slot)),
        cache.bias,
        cache.cross,
    )
    return out.hidden[:, 0], cache


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
    b, dtype = inputs_embeds.shape[0], inputs_embeds.dtype
    hidden, cache, position = prefill(
        decoder, params, inputs_embeds, mask, start, prefix, room=slots, lora=lora
    )
    first_slot = cache.mask.shape[1] - slots
    valid = cache.mask

    if layers is None:

        def forward(token: Array, step: Array, cache: KV, valid: Array) -> tuple[Array, KV]:
            return decode_step(
                decoder, params, token, position + step, cache, first_slot + step, dtype, lora
            )

        def logits_of(hidden: Array) -> Array:
            return decoder.apply({"params": params}, hidden[:, None], method="unembed")[:, 0]
    else:
        cache = decode_cpu.lay_out_cache(cache)

        def forward(token: Array, step: Array, cache: Any, valid: Array) -> tuple[Array, Any]:
            x = decoder.apply({"params": params}, token[:, None], dtype, method="embed")[:, 0]
            return decode_cpu.step(
                decoder.config,
                layers,
                params["final_norm"]["scale"],
                x,
                position + step,
                cache,
                valid,
                first_slot + step,
            )

        def logits_of(hidden: Array) -> Array:
            return decode_cpu.unembed(decoder.config, params, hidden)

    def pick(hidden: Array, step: Array) -> Array:
        step_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step)
        return choose(step_keys, logits_of(hidden), mode, *values)

    def record(state: _Loop, token: Array) -> _Loop:
        """Store `token` for the rows still running and see which of them it ends."""
        alive = ~state.stopped
        tokens = jax.lax.dynamic_update_slice(
            state.tokens, jnp.where(alive, token, 0)[:, None], (0, state.step)
        )
        ends = alive & jnp.any(token[:, None] == stops[None, :], axis=1)
        return state._replace(
            token=token,
            tokens=tokens,
            lengths=state.lengths + alive,
            stopped=state.stopped | ends,
        )

    def running(state: _Loop) -> Array:
        return (state.step + 1 < limit) & ~jnp.all(state.stopped)

    def advance(state: _Loop) -> _Loop:
        # A finished row keeps computing on its own entries; nothing of it is recorded.
        valid = jax.lax.dynamic_update_slice(
            state.valid, jnp.ones((b, 1), bool), (0, first_slot + state.step)
        )
        hidden, cache = forward(state.token, state.step, state.cache, valid)
        state = state._replace(step=state.step + 1, cache=cache, valid=valid)
        return record(state, pick(hidden, state.step))

    state = _Loop(
        step=jnp.int32(0),
        token=jnp.zeros((b,), jnp.int32),
        cache=cache,
        valid=valid,
        tokens=jnp.zeros((b, slots), jnp.int32),
        lengths=jnp.zeros((b,), jnp.int32),
        stopped=jnp.zeros((b,), bool),
    )
    state = record(state, pick(hidden if layers is None else hidden.T, state.step))
    state = jax.lax.while_loop(running, advance, state)
    return Generated(state.tokens, state.lengths, state.stopped)


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
    # Stop ids are a traced, padded vector: another set of the same size class compiles nothing.
    # -1 never matches.
    padded = bucket(max(len(stop_ids), 1), 4)
    stops = np.full((padded,), -1, np.int32)
    stops[: len(stop_ids)] = list(stop_ids)
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
        jnp.asarray(stops),
        sampling.values,
        slots=slots,
        mode=sampling.mode,
    )
    return out._replace(tokens=out.tokens[:, :max_new_tokens])
