"""The first layers of a decoder: what is left when the others are cut off."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from latent_jax.backbones.config import DecoderConfig


def first_config(config: DecoderConfig, layers: int) -> DecoderConfig:
    """The architecture with ``layers`` layers; 0 leaves all."""
    return dataclasses.replace(config, num_layers=layers) if layers else config


def first_params(params: Any, layers: int) -> Any:
    """The parameters of the first ``layers`` layers, with embeddings and final norm; 0 leaves all.

    Example:
      >>> import numpy as np
      >>> first_params({"embed": 1, "layers": {"q": np.ones((4, 2))}}, 3)["layers"]["q"].shape
      (3, 2)
    """
    if not layers:
        return params
    return {**params, "layers": jax.tree.map(lambda x: x[:layers], params["layers"])}
