"""How far a frozen decoder on a substitute for a text is from the decoder on the text itself."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from latent_jax.backbones.cross_entropy import in_chunks, out_of_chunks
from latent_jax.backbones.decoder import Decoder


class Substituted(NamedTuple):
    """Per token, nats.

    Attributes:
      kl: ``KL(full || given)`` at the temperature, times its square.
      nll: cross-entropy behind the substitute.
      full_nll: cross-entropy behind the text itself.
      guess: the greedy choice behind the substitute.
      full_hit: whether the greedy choice behind the text itself is the target.
    """

    kl: Float[Array, "b t"]
    nll: Float[Array, "b t"]
    full_nll: Float[Array, "b t"]
    guess: Int[Array, "b t"]
    full_hit: Bool[Array, "b t"]


def substitution(
    decoder: Decoder,
    params: Any,
    full: Float[Array, "b t d"],
    given: Float[Array, "b t d"],
    targets: Int[Array, "b t"],
    chunk: int | None = None,
    temperature: float = 1.0,
) -> Substituted:
    """Divergence and cross-entropies of two readings.

    Args:
      full: hidden states on the raw text; the divergence sends no gradient there.
      given: hidden states behind what replaces it.
      chunk: rows of the vocabulary products done at once, recomputed in the backward pass.
      temperature: of both distributions whose divergence is taken. Its square keeps the size of
        the gradient (Hinton et al. 2015); cross-entropies and hits are at 1.
    """

    def rows(args):
        f, g, y = args
        # Rows first: they are what a mesh splits.
        logits = decoder.apply({"params": params}, jnp.stack([f, g], axis=1), method="unembed")
        target, log = jnp.unstack(jax.nn.log_softmax(logits), axis=1)
        target = jax.lax.stop_gradient(target)
        soft, goal = log, target
        if temperature != 1:
            soft, goal = (jax.nn.log_softmax(x / temperature) for x in (log, target))
        kl = temperature**2 * optax.losses.kl_divergence_with_log_targets(soft, goal)
        pick = lambda x: -jnp.take_along_axis(x, y[:, None], axis=-1)[:, 0]  # noqa: E731
        guess, full_hit = jnp.argmax(log, -1), jnp.argmax(target, -1) == y
        return Substituted(kl, pick(log), pick(target), guess, full_hit)

    b, t, d = full.shape
    n = b * t
    flat = (full.reshape(n, d), given.reshape(n, d), targets.reshape(n))
    if chunk is None or chunk >= n:
        found = rows(flat)
    else:
        parts = tuple(in_chunks(x, chunk) for x in flat)
        found = jax.lax.map(jax.checkpoint(rows), parts)
        found = jax.tree.map(lambda x: out_of_chunks(x, n), found)
    return jax.tree.map(lambda x: x.reshape(b, t), found)
