"""Rows that an expander looks back on, made in training as imperfect as they are in generation.

In generation the rows before a segment's own are the row model's (or the expander's above), and
what they say is not always what the text says. A schedule's share of a window's rows is replaced;
the segments of these rows are not scored, since they could not be said, but those after them are,
and learn how far a lookback is to be trusted. Every other row keeps its bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from latent_jax.systems.abstractinator import losses
from latent_jax.systems.abstractinator.config import part
from latent_jax.systems.abstractinator.model import Abstractinator, Lookback, Rows


def lookback(
    model: Abstractinator,
    variables: Mapping[str, Any],
    every: tuple[Rows, ...],
    level: int,
    key: Array | None,
) -> Lookback | None:
    """Rows of a level as its expander reads them in training; None where they are the text's.

    Args:
      model: the module.
      variables: its variables.
      every: rows of the levels, at least up to ``level``.
      level: which.
      key: random; None in evaluation.
    """
    config = model.config.levels[level].corrupt
    if key is None or not config.share.used:
        return None
    out, step = every[level], variables["codebook"][part("quantiser", level)]["step"]
    pick, draw = jax.random.split(jax.random.fold_in(key, level))
    chosen = out.there & (jax.random.uniform(pick, out.there.shape) < config.share(step))
    if config.by == "noise":
        there = out.there[..., None]
        square = jnp.sum(jnp.where(there, out.rows, 0.0) ** 2)
        size = jnp.sqrt(square / jnp.maximum(there.sum() * out.rows.shape[-1], 1))
        other = out.rows + config.noise * size * jax.random.normal(draw, out.rows.shape)
    else:
        digits = jnp.where(out.digits >= 0, _predicted(model, variables, every, level), -1)
        other = model.apply(variables, digits, level=level, method="append")
    other = jax.lax.stop_gradient(other)
    return Lookback(jnp.where(chosen[..., None], other, out.rows), ~chosen)


def _predicted(
    model: Abstractinator, variables: Mapping[str, Any], every: tuple[Rows, ...], level: int
) -> Int[Array, "b s n"]:
    """Likeliest digits of each row, given the true rows and digits before them."""
    out = every[level]
    if level == len(model.config.levels) - 1:
        return jnp.argmax(losses.next_rows(model, variables, out).logits, -1)
    above = (
        every[level + 1] if len(every) > level + 1
        else model.apply(variables, out.rows, out.there, level + 1, method="rise")
    )  # fmt: skip
    digits = jnp.argmax(losses.digit_logits(model, variables, above, out, level + 1)[0], -1)
    return digits.reshape(len(digits), -1, digits.shape[-1])[:, : out.there.shape[1]]
