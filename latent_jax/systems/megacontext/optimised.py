"""Entries optimised for one history each: what as many slots can hold, with hindsight.

A capacity meter after Kuratov et al. 2025, "Cramming 1568 Tokens into a Single Vector": no gist is
made, gradient descent on the slots themselves moves the frozen base behind them towards the base
behind the text. That estimates, from below and the better the more steps, the bound on any gist of
these slots. What is read behind them meanwhile is never the horizon whose loss is reported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from latent_jax.backbones.decoder import KV, Decoder
from latent_jax.backbones.substitution import substitution
from latent_jax.systems.megacontext.reading import read_on

ARM = "optimised"


class Queries(NamedTuple):
    """Text that is read behind a history to say what its entries are worth.

    Attributes:
      ids: its own tail, the beginning of another history, and itself once more.
      weight: of the prediction of each token but the first: the history itself, and what comes
        before it, count half each.
    """

    ids: Int[Array, "b t"]
    weight: Float[Array, " t-1"]


def length(past: int, live: int, tail: int) -> int:
    """Tokens of `queries`.

    Args:
      past: tokens of a history.
      live: tokens of what follows it.
      tail: of those, the ones that are not reported.
    """
    return tail + min(past, live) + past


def queries(ids: Int[Array, "b n"], past: int, tail: int) -> Queries:
    """What is read behind each history of a batch; of the horizon, which is reported, nothing.

    Args:
      ids: histories, each with its tail and horizon.
      past: tokens of a history.
      tail: tokens of its tail.
    """
    new = tail + min(past, ids.shape[1] - past)
    other = jnp.roll(ids[:, : new - tail], 1, axis=0)
    told = jnp.concatenate([ids[:, past : past + tail], other, ids[:, :past]], axis=1)
    again = jnp.arange(1, told.shape[1]) >= new
    return Queries(told, jnp.where(again, 0.5 / past, 0.5 / (new - 1)))


def optimised(
    decoder: Decoder, base: Any, sink: int, start: Any, placed: Callable[[Any], KV],
    ids: Int[Array, "b n"], past: int, tail: int, steps: int, rate: float, live: int,
    lora: Any = None, chunk: int | None = None,
) -> Any:  # fmt: skip
    """Moves entries to where the base behind them predicts what it predicts behind the text.

    The loss is ``KL(behind the text || behind the entries)`` over `queries`, by Adam with a cosine
    schedule.

    Args:
      decoder: the frozen base.
      base: its parameters.
      sink: token before everything.
      start: entries of all histories, a tree; each dimension (the last axis) has a scale of its
        own in each layer (the first).
      placed: what the base attends to of such a tree.
      ids: histories, each with its tail and horizon.
      past: tokens of a history.
      tail: tokens of its tail.
      steps: of Adam.
      rate: learning rate, in units of the RMS of each dimension in each layer.
      live: rotary position of the first token behind the entries.
      lora: deltas of the base where it reads on.
      chunk: rows of the vocabulary products done at once.
    """
    told, weight = queries(ids, past, tail)
    row = jnp.concatenate([ids[:, :past], told], axis=1)
    where = jnp.broadcast_to(jnp.arange(row.shape[1]), row.shape)
    full = read_on(decoder, base, sink, None, row, where, lora=lora)[:, past:-1]
    full, first = jax.lax.stop_gradient(full), jax.tree.map(_float, start)
    scale = jax.tree.map(_scale, first)
    optimiser = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def moved(delta):
        return jax.tree.map(lambda x, d, s, like: (x + d * s).astype(like.dtype),
                            first, delta, scale, start)  # fmt: skip

    def loss(delta):
        given = read_on(
            decoder, base, sink, placed(moved(delta)), told, where[:, past:] - past + live,
            lora=lora,
        )
        found = substitution(decoder, base, full, given[:, :-1], told[:, 1:], chunk)
        return jnp.sum(found.kl * weight)

    def step(_, state):
        delta, moments = state
        updates, moments = optimiser.update(jax.grad(loss)(delta), moments)
        return optax.apply_updates(delta, updates), moments

    still = jax.tree.map(jnp.zeros_like, first)
    delta, _ = jax.lax.fori_loop(0, steps, step, (still, optimiser.init(still)))
    return moved(delta)


def _float(x: Array) -> Array:
    return x.astype(jnp.float32)


def _scale(x: Float[Array, "l ... d"]) -> Float[Array, "l ... d"]:
    """RMS of each dimension in each layer."""
    middle = tuple(range(1, x.ndim - 1))
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=middle, keepdims=True)) + 1e-6
