"""Memory-slot mixture-density transformers on the gaps between zeta zeros."""

from __future__ import annotations

from latent_jax.systems.spacing.model import SpacingModel

__all__ = ["SpacingModel"]
