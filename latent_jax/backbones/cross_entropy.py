"""Cross-entropy through a frozen decoder's vocabulary."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int


def token_cross_entropy(
    body,
    frozen,
    hidden: Float[Array, "b t d"],
    targets: Int[Array, "b t"],
    chunk: int | None = None,
) -> tuple[Float[Array, "b t"], Bool[Array, "b t"]]:
    """Per-token cross-entropy (nats) and whether the greedy choice is right.

    Args:
      chunk: rows of the vocabulary product done at once; each is recomputed in the backward pass,
        so that the ``b x t x vocabulary`` logits never exist. None does all at once, which is
        faster where they fit.
    """

    def rows(h, y):
        logits = body.apply({"params": frozen}, h[None], method="unembed")[0]
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return nll, jnp.argmax(logits, -1) == y

    b, t, d = hidden.shape
    n = b * t
    h, y = hidden.reshape(n, d), targets.reshape(n)
    if chunk is None or chunk >= n:
        nll, hit = rows(h, y)
    else:
        pad = -n % chunk
        h = jnp.pad(h, ((0, pad), (0, 0))).reshape(-1, chunk, d)
        y = jnp.pad(y, (0, pad)).reshape(-1, chunk)
        nll, hit = jax.lax.map(lambda a: jax.checkpoint(rows)(*a), (h, y))
        nll, hit = nll.reshape(-1)[:n], hit.reshape(-1)[:n]
    return nll.reshape(b, t), hit.reshape(b, t)
