"""Latents optimised for one text each: what a wire of this shape could hold, with hindsight.

An upper bound for encoders (Kuratov et al. 2025, "Cramming 1568 Tokens into a Single Vector"): no
encoder runs, gradient descent on the latents themselves makes the frozen reader say the text.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int

from latent_jax.backbones.cross_entropy import token_cross_entropy
from latent_jax.backbones.decoder import Decoder
from latent_jax.systems.latentwire.given import Asked, answer_hidden, prefix_to_given


@functools.partial(jax.jit, static_argnames=("decoder", "steps"))
def cram(
    decoder: Decoder,
    params: Any,
    latents: Any,
    wire: Any,
    ids: Int[Array, "b t"],
    mask: Bool[Array, "b t"],
    steps: int = 200,
    rate: float = 0.05,
) -> Any:
    """Moves each text's latents to where the reader rebuilds it best, teacher-forced.

    The question of an answer is not known to it: what it crams is the text.

    Args:
      decoder: the frozen reader.
      params: its parameters.
      latents: the compressor, whose adapter and task embedding stay as they are.
      wire: where to start, usually the compressor's own latents.
      ids: right-padded texts.
      mask: which tokens are real.
      steps: of Adam.
      rate: learning rate, in units of each dimension's RMS over the batch.
    """
    b = ids.shape[0]
    latents = latents.for_task("reconstruct")
    lead = latents.task("reconstruct", b)
    none = jnp.zeros((b, 0), jnp.int32), jnp.zeros((b, 0), bool)
    real = wire.mask[..., None]
    power = jnp.sum(jnp.square(wire.z) * real, (0, 1)) / jnp.maximum(real.sum(), 1)
    scale = jnp.sqrt(power) + 1e-6
    optimiser = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def loss(delta):
        moved = wire._replace(z=wire.z + delta * scale)
        given = prefix_to_given(decoder, params, latents.prefix(moved))
        given = latents.instructed(given, "reconstruct")
        hidden = answer_hidden(decoder, params, Asked(given, *none, lead), ids, mask)
        nll, _ = token_cross_entropy(decoder, params, hidden, ids)
        return jnp.sum(nll * mask) / b

    def step(_, state):
        delta, moments = state
        updates, moments = optimiser.update(jax.grad(loss)(delta), moments)
        return optax.apply_updates(delta, updates), moments

    start = jnp.zeros_like(wire.z)
    delta, _ = jax.lax.fori_loop(0, steps, step, (start, optimiser.init(start)))
    return wire._replace(z=wire.z + delta * scale)
