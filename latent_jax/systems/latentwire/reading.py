"""The frozen reader behind a prefix, teacher-forced: one path for all that is trained."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from latent_jax.backbones.decoder import KV, Decoder, DecoderOutput
from latent_jax.backbones.sink import behind, sink_kv
from latent_jax.systems.latentwire.latents import Prefix


def read(
    body: Decoder,
    frozen: Any,
    prefix: Prefix,
    embeds: Float[Array, "b t d"],
    mask: Bool[Array, "b t"],
    lora: Any = None,
) -> DecoderOutput:
    """The reader on a right-padded prompt that follows the latents.

    Args:
      body: the reader.
      frozen: its parameters.
      prefix: what stands for the text.
      embeds: of the prompt.
      mask: which of them are real.
      lora: deltas of a reader that is trained (`reader_lora`); none where it is frozen.
    """
    b, t, _ = embeds.shape
    positions = prefix.start[:, None] + jnp.arange(t)
    sink = None if prefix.sink is None else sink_kv(body, frozen, prefix.sink, b, lora)
    if prefix.kv is not None:
        kv = behind(sink, prefix.kv)
        return body.apply({"params": frozen}, embeds, positions, mask, prefix=kv, lora=lora)
    m = prefix.embeds.shape[1]
    out = body.apply(
        {"params": frozen},
        jnp.concatenate([prefix.embeds.astype(embeds.dtype), embeds], axis=1),
        jnp.concatenate([prefix.positions, positions], axis=1),
        jnp.concatenate([prefix.mask, mask], axis=1),
        prefix=sink,
        lora=lora,
    )
    own = KV(out.kv.k[:, :, m:], out.kv.v[:, :, m:], mask)
    return DecoderOutput(out.hidden[:, m:], own)
