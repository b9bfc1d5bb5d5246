"""The decode loop over a preallocated cache: a token of every row at a time until all end."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from latent_jax.backbones import decode_cpu
from latent_jax.backbones.decoder import KV, Decoder
from latent_jax.backbones.sampling import SamplingMode, choose


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


def decode(
    decoder: Decoder,
    params: Any,
    layers: Any,
    hidden: Float[Array, "b d"],
    cache: KV,
    position: Int[Array, " b"],
    lora: Any,
    keys: Array,
    limit: Int[Array, ""],
    stops: Int[Array, " e"],
    values: tuple[Array, Array],
    *,
    slots: int,
    mode: SamplingMode,
) -> Generated:
    """New tokens behind what `generate.prefill` made.

    Args:
        decoder: the decoder module.
        params: its parameters.
        layers: their layout for CPUs, or None; see `decode_cpu`.
        hidden: last hidden state of each row.
        cache: with free entries at its end.
        position: rotary position of the next token.
        lora: low-rank deltas.
        keys: one per row.
        limit: how many tokens at most.
        stops: ids that end a row.
        values: of the sampling.
        slots: free entries, as many as tokens can be asked for.
        mode: of the sampling.
    """
    b, dtype = hidden.shape[0], hidden.dtype
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
