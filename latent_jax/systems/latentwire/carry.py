"""Summary vectors that are carried from segment to segment.

As in AutoCompressors (Chevalier et al. 2023), a segment is read behind the latents of those before
it, as a reader would read it: what was said earlier need not be said again, and a pronoun finds its
name. Gradients go back through all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from latent_jax.backbones.decoder import KV
from latent_jax.backbones.first_layers import first_params
from latent_jax.backbones.sink import sink_kv
from latent_jax.systems.latentwire.latents import Wire


def carried(
    model: Any,
    frozen: Any,
    ids: Int[Array, "b t"],
    mask: Bool[Array, "b t"],
    segments: int,
    train: bool = False,
) -> Wire:
    """Compresses texts segment by segment, each behind the latents of those before it.

    Args:
      model: a bound `Compressor`; ``encoder.carry`` says of how many segments.
      frozen: parameters of the LLM.
      ids: right-padded texts of whole segments.
      mask: which tokens are real.
      segments: how many there are.
      train: as of `Compressor.compress`.
    """
    each, parts = ids.shape[1] // segments, []
    for number in range(segments):
        start = number * each
        at = slice(start, start + each)
        before = None
        if parts:
            before = shown(model, frozen, parts[-model.config.encoder.carry :])
        parts.append(model.encoded(frozen, ids[:, at], mask[:, at], train, start, before))
    return joined(parts)


def joined(parts: Sequence[Wire]) -> Wire:
    """The wire of texts whose segments' wires these are."""
    alone = [part._replace(length=None) for part in parts]
    wire = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *alone)
    return wire._replace(length=sum(part.length for part in parts))


def shown(model: Any, frozen: Any, parts: Sequence[Wire]) -> KV:
    """What the encoder's layers are given of the latents of some segments, without the sink."""
    layers = model.config.encoder.layers
    prefix = model.prefix(joined(parts), frozen["embed"].dtype, frozen)
    if prefix.kv is not None:
        kv = prefix.kv  # of all layers of the reader
        return KV(kv.k[:layers], kv.v[:layers], kv.mask) if layers else kv
    own = first_params(frozen, layers)
    sink = None
    if model.sink is not None:
        sink = sink_kv(model.body, own, jnp.int32(model.sink), len(prefix.mask))
    run = model.body.apply(
        {"params": own}, prefix.embeds, prefix.positions, prefix.mask, prefix=sink
    )
    return run.kv
