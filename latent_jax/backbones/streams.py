"""The residual stream of a frozen decoder, which its own call does not hand out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from latent_jax.backbones.decoder import KV, Decoder, DecoderOutput


def streams(
    decoder: Decoder,
    params: Any,
    embeds: Float[Array, "b t d"],
    layers: Sequence[int],
    positions: Int[Array, "b t"] | None = None,
    mask: Bool[Array, "b t"] | None = None,
    prefix: KV | None = None,
) -> tuple[Float[Array, "b t k d"], DecoderOutput]:
    """Runs a decoder and keeps what some of its layers are given.

    Args:
      layers: the stream before each of them; their number stands for the output after the final
        norm.

    Returns:
      The streams, and what the decoder returns.
    """

    def intercept(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if context.method_name == "__call__" and context.module.name == "layers":
            hidden, (k, v) = out
            return hidden, (k, (v, args[0]))
        return out

    with nn.intercept_methods(intercept):
        out = decoder.apply({"params": params}, embeds, positions, mask, prefix=prefix)
    values, before = out.kv.v
    last = decoder.config.num_layers
    found = [out.hidden if layer == last else before[layer] for layer in layers]
    return jnp.stack(found, axis=2), DecoderOutput(out.hidden, KV(out.kv.k, values, out.kv.mask))
