"""Cross-entropy through a frozen decoder's vocabulary."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int


def token_cross_entropy(
    body,
    frozen,
    hidden: Float[Array, "b t d"],
    targets: Int[Array, "b t"],
    chunk: int | None = None,
    smoothing: float = 0.0,
) -> tuple[Float[Array, "b t"], Int[Array, "b t"]]:
    """Per-token cross-entropy (nats) and the greedy choice.

    The gradient of a row's loss in its state, ``(softmax - one-hot) @ vocabulary``, needs nothing
    that comes later, so it is taken while the logits are there: they are never kept for the
    backward pass nor computed again. The vocabulary is frozen and gets no gradient.

    Args:
      chunk: rows whose logits exist at once, so that the ``b x t x vocabulary`` logits never do.
        None does all at once.
      smoothing: share of every target that is spread evenly over the vocabulary.
    """
    b, t, d = hidden.shape
    n = b * t
    flat = hidden.reshape(n, d), targets.reshape(n)
    if chunk is None or chunk >= n:
        nll, guess = _rows(body, smoothing, frozen, *flat)
    else:
        h, y = (in_chunks(x, chunk) for x in flat)
        nll, guess = jax.lax.map(lambda part: _rows(body, smoothing, frozen, *part), (h, y))
        nll, guess = (out_of_chunks(x, n) for x in (nll, guess))
    return nll.reshape(b, t), guess.reshape(b, t)


def in_chunks(x: Array, chunk: int) -> Array:
    """``[n ...]`` rows as ``[k c ...]`` chunks, padded with zeros.

    A chunk is every ``k``-th row: where rows are split over devices each has its part of every
    chunk, and none waits for the others.
    """
    parts = -(-x.shape[0] // chunk)
    x = jnp.pad(x, [(0, -x.shape[0] % parts)] + [(0, 0)] * (x.ndim - 1))
    return jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)


def out_of_chunks(x: Float[Array, "k c"], n: int) -> Float[Array, " n"]:
    """Undoes `in_chunks`."""
    return jnp.swapaxes(x, 0, 1).reshape(-1)[:n]


def _plain(body, smoothing, frozen, h, y):
    # Rows first: they are what a mesh splits.
    logits = body.apply({"params": frozen}, h[:, None], method="unembed")[:, 0]
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    if smoothing:
        nll = (1 - smoothing) * nll - smoothing * jax.nn.log_softmax(logits).mean(-1)
    return nll, jnp.argmax(logits, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rows(body, smoothing, frozen, h, y):
    return _plain(body, smoothing, frozen, h, y)


def _forward(body, smoothing, frozen, h, y) -> tuple[Any, Any]:
    nll, pull, guess = jax.vjp(lambda h: _plain(body, smoothing, frozen, h, y), h, has_aux=True)
    # Rows do not touch each other: their own gradients are what a cotangent of ones pulls back.
    return (nll, guess), pull(jnp.ones_like(nll))[0]


def _backward(body, smoothing, gradient, cotangents) -> tuple[None, Any, None]:
    return None, (cotangents[0][:, None] * gradient).astype(gradient.dtype), None


_rows.defvjp(_forward, _backward)
