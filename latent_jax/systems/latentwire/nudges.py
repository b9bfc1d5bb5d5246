"""Nudged decoding (`NudgeConfig`): reported beside the greedy answers, never in their place."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from latent_jax.backbones.backbone import Backbone
from latent_jax.backbones.decode_loop import decode_step
from latent_jax.backbones.decoder import KV, Decoder
from latent_jax.backbones.generate import prefill
from latent_jax.backbones.padding import left_align
from latent_jax.backbones.sampling import Sampling, choose, row_keys
from latent_jax.systems.latentwire.given import Asked, join
from latent_jax.systems.latentwire.nudge_config import NudgeConfig
from latent_jax.systems.latentwire.prompts import PromptBuilder


def nudged(
    reader: Backbone, asked: Asked, max_new_tokens: int, nudges: NudgeConfig,
    builder: PromptBuilder, *, sink: bool, rows: Int[Array, " b"], seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Tokens of each row and how many they are, as `scoring.decode` gives them.

    Args:
      asked: what the reader reads first. The question is read at the first token's gain.
      sink: whether the first entry is the sink, which stands for no text and has no gain.
      rows: numbers of the questions, with which the first token is drawn.
      seed: of the drawing.
    """
    embeds, mask = left_align(*join(reader.decoder, reader.params, asked))
    size = reader.config.vocab_size
    banned = nudges.banned(builder, size, max_new_tokens)
    said = np.asarray(_decode(
        reader.decoder, reader.params, embeds, mask, asked.given.start, asked.given.kv,
        row_keys(jax.random.key(seed), jnp.asarray(rows)), jnp.asarray(banned),
        jnp.asarray(nudges.gains(max_new_tokens)), jnp.float32(nudges.first_top_p or 1.0),
        draws=nudges.first_top_p is not None, skip=int(sink),
    ))  # fmt: skip
    stop = np.isin(said, builder.stop_ids)
    ends = np.where(stop.any(1), stop.argmax(1) + 1, max_new_tokens)
    return said, ends


@functools.partial(jax.jit, static_argnames=("decoder", "draws", "skip"))
def _decode(
    decoder: Decoder, params: Any, embeds: Float[Array, "b t d"], mask: Bool[Array, "b t"],
    start: Int[Array, " b"], prefix: KV | None, keys: Array, banned: Bool[Array, "n v"],
    gains: Float[Array, " n"], top_p: Float[Array, ""], *, draws: bool, skip: int,
) -> Int[Array, "b n"]:  # fmt: skip
    """All ``n`` new tokens of every row, also those behind a stop."""
    held = 0 if prefix is None else prefix.mask.shape[1]

    def amplified(values: Array, gain: Array) -> Array:
        """The values of a cache, those of the prefix as they were given times the gain."""
        factor = jnp.where(jnp.arange(held) < skip, 1.0, gain).astype(values.dtype)
        own = prefix.v.astype(values.dtype) * factor[:, None, None]
        return jax.lax.dynamic_update_slice(values, own, (0,) * values.ndim)

    def logits(hidden: Array, row: Array) -> Array:
        found = decoder.apply({"params": params}, hidden[:, None], method="unembed")[:, 0]
        return jnp.where(row, -jnp.inf, found.astype(jnp.float32))

    seen = prefix if not held else prefix._replace(v=amplified(prefix.v, gains[0]))
    hidden, cache, position = prefill(
        decoder, params, embeds, mask, start, seen, room=len(gains)
    )
    mode = Sampling(1.0, top_p=0.5).mode if draws else Sampling().mode
    token = choose(keys, logits(hidden, banned[0]), mode, 1.0, top_p)
    slot = cache.mask.shape[1] - len(gains)

    def step(state, now):
        cache, token, i = state
        gain, row = now
        if held:
            cache = cache._replace(v=amplified(cache.v, gain))
        hidden, cache = decode_step(
            decoder, params, token, position + i, cache, slot + i, embeds.dtype
        )
        token = jnp.argmax(logits(hidden, row), axis=-1).astype(jnp.int32)
        return (cache, token, i + 1), token

    _, rest = jax.lax.scan(step, (cache, token, jnp.int32(0)), (gains[1:], banned[1:]))
    return jnp.concatenate([token[:, None], rest.T], axis=1)
