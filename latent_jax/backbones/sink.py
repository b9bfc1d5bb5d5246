"""The attention sink: one constant token before everything the frozen LLM is shown.

Decoders park attention on their first token (Xiao et al. 2023, "attention sinks"), whose own
content is lost in the middle layers. Without a BOS that is a token of the text: its reconstruction
is as bad as a guess, and a reader that starts on latents parks its attention on the first of them.
The sink is a constant of the LLM and is not transmitted. It stands at position -1 (rotary positions
are relative), so that everything else keeps its place.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from latent_jax.backbones.decoder import KV, Decoder
from latent_jax.core.errors import ConfigError


def sink_token(tokenizer: Any) -> int:
    """BOS, or the EOS that separates documents where a model has no BOS.

    Raises:
      ConfigError: a tokenizer that has neither.
    """
    token = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    if token is None:
        raise ConfigError("model.sink: this tokenizer has no BOS or EOS token; set it to false")
    return token


def sink_kv(
    decoder: Decoder, params: Any, token: Int[Array, ""], batch: int, lora: Any = None
) -> KV:
    """Keys and values of the one token at position -1, for a batch; a constant, without gradient.

    Args:
      decoder: the LLM.
      params: its parameters.
      token: of the vocabulary.
      batch: rows.
      lora: deltas of an LLM that is trained.
    """
    x = decoder.apply({"params": params}, jnp.reshape(token, (1, 1)), method="embed")
    where, real = jnp.full((1, 1), -1, jnp.int32), jnp.ones((1, 1), bool)
    kv = decoder.apply({"params": params}, x, where, real, lora=lora).kv
    kv = jax.lax.stop_gradient(kv)

    def wide(x):
        return jnp.broadcast_to(x, (x.shape[0], batch, *x.shape[2:]))

    return KV(wide(kv.k), wide(kv.v), jnp.ones((batch, 1), bool))


def behind(first: KV | None, then: KV | None) -> KV | None:
    """Both, ``first`` in front; either may be missing."""
    if first is None or then is None:
        return then if first is None else first
    return KV(
        jnp.concatenate([first.k, then.k], axis=2),
        jnp.concatenate([first.v, then.v], axis=2),
        jnp.concatenate([first.mask, then.mask], axis=-1),
        joined_bias(first, then),
        then.cross if first.cross is None else first.cross,
    )


def joined_bias(first: KV, then: KV) -> Float[Array, "l b m g"] | None:
    """Biases of both; zeros where only one has any."""
    if first.bias is None and then.bias is None:
        return None
    return jnp.concatenate(
        [jnp.zeros(kv.k.shape[:-1]) if kv.bias is None else kv.bias for kv in (first, then)], axis=2
    )


def repeat(kv: KV | None, times: int) -> KV | None:
    """Every row ``times`` times in a row."""
    if kv is None:
        return None
    return KV(
        jnp.repeat(kv.k, times, axis=1),
        jnp.repeat(kv.v, times, axis=1),
        jnp.repeat(kv.mask, times, axis=0),
        None if kv.bias is None else jnp.repeat(kv.bias, times, axis=1),
    )
