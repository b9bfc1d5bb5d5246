"""Experiments on slots: hide, overwrite, exchange, strip of identity or content."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from latent_jax.systems.spacing.config import SpacingModelConfig
from latent_jax.systems.spacing.model import Ablation


def none(config: SpacingModelConfig) -> Ablation:
    """Changes nothing; others are made of it by ``_replace``."""
    m = config.memory.slots
    order, one = jnp.arange(m), jnp.asarray(1.0)
    fill, shift = jnp.zeros((m, config.slot_width)), jnp.zeros((m, config.width))
    return Ablation(jnp.ones(m, bool), jnp.ones(m), fill, order, order, one, one, shift)


def hide(base: Ablation, slots: list[int]) -> Ablation:
    """Slots that nothing attends to or reads."""
    return base._replace(visible=base.visible.at[jnp.asarray(slots)].set(False))


def overwrite(base: Ablation, slots: list[int], by: Float[Array, "m w"]) -> Ablation:
    """Final contents replaced (by their mean, or by zero), read with the weights they had."""
    at = jnp.asarray(slots)
    return base._replace(keep=base.keep.at[at].set(0.0), fill=base.fill.at[at].set(by[at]))


def exchange(base: Ablation, rng: np.random.Generator, what: str) -> Ablation:
    """Identities or contents given to other slots: a permutation without fixed points.

    Args:
      base: what is changed.
      rng: draws the permutation.
      what: ``identity`` or ``content``.
    """
    m = len(base.keep)
    order = np.arange(m)
    while m > 1 and (order == np.arange(m)).any():
        order = rng.permutation(m)
    return base._replace(**{what: jnp.asarray(order)})
