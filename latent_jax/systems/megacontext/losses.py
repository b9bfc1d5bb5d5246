"""How far the base on gists is from the base on the text itself."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from latent_jax.backbones.decoder import Decoder


def substitution(
    decoder: Decoder,
    params: Any,
    full: Float[Array, "b t d"],
    given: Float[Array, "b t d"],
    targets: Int[Array, "b t"],
    chunk: int | None = None,
) -> tuple[Float[Array, "b t"], Float[Array, "b t"], Float[Array, "b t"]]:
    """Per token: ``KL(full || given)`` and the cross-entropy of both, nats.

    Args:
      full: hidden states on the raw text; no gradient goes there.
      given: hidden states behind gists.
      chunk: rows of the vocabulary products done at once, recomputed in the backward pass.
    """

    def rows(args):
        f, g, y = args
        logits = decoder.apply({"params": params}, jnp.stack([f, g]), method="unembed")
        target, log = jax.nn.log_softmax(logits)
        target = jax.lax.stop_gradient(target)
        kl = optax.losses.kl_divergence_with_log_targets(log, target)
        pick = lambda x: -jnp.take_along_axis(x, y[:, None], axis=-1)[:, 0]  # noqa: E731
        return kl, pick(log), pick(target)

    b, t, d = full.shape
    n = b * t
    flat = (full.reshape(n, d), given.reshape(n, d), targets.reshape(n))
    if chunk is None or chunk >= n:
        found = rows(flat)
    else:
        pad = -n % chunk
        flat = jax.tree.map(lambda x: jnp.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1)), flat)
        flat = jax.tree.map(lambda x: x.reshape(-1, chunk, *x.shape[1:]), flat)
        found = jax.lax.map(jax.checkpoint(rows), flat)
    return tuple(x.reshape(-1)[:n].reshape(b, t) for x in found)
