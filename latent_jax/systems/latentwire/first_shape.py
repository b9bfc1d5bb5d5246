"""What identifies a compressor's wires: its shape, as the first ones would have told it, and its
weights.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from latent_jax.core import trees
from latent_jax.core.config import parse, to_dict
from latent_jax.systems.latentwire import reader_lora
from latent_jax.systems.latentwire.model_config import ModelConfig

# What compressors could not be told when the first of their wires were written.
_LATER = {
    "encoder": (
        "pooler", "byte_layers", "refiner", "layers", "carry", "anchor_width", "anchor_layers",
        "backbone", "pieces", "places", "train",
    ),
    "wire": ("fit", "levels", "codes", "stages"),
    "adapter": (
        "entries", "residual", "hidden", "calibration", "transform", "neighbours", "offset",
        "codes", "onto_soft", "task_rank", "depths", "gate", "carrier", "positions",
    ),
}  # fmt: skip


def as_first(shape: Mapping[str, Any]) -> dict[str, Any]:
    """A `ModelConfig` as a mapping, without later settings where they are as they always were: the
    wires of a compressor that has none of them stay readable.
    """
    own, found = to_dict(ModelConfig()), dict(shape)
    for part, names in _LATER.items():
        found[part] = {
            k: v for k, v in shape[part].items() if k not in names or v != own[part][k]
        }
    for name in ("follow", "reader_lora", "gist_layers"):
        if found[name] == own[name]:
            del found[name]
    return found


def identity(
    config: ModelConfig,
    params: Mapping[str, Any],
    reader: str,
    method: str | None,
    encoder: str = "",
) -> str:
    """What two compressors share that read each other's wires: a digest of shape and weights.

    Args:
      config: the shape.
      params: all that is trained, and what is taken off wires (``centre``).
      reader: digest of the LLM's weights.
      method: of a compressor that nobody trained.
      encoder: digest of the weights of ``encoder.backbone``, where there is one.
    """
    shape = to_dict(dataclasses.replace(config, start=None, remat=False, readers={}))
    shape = as_first(to_dict(parse(ModelConfig, shape)))  # a ratio of 4 is one of 4.0
    # Readers are not the encoder's: one that is added later reads what was written before. Only
    # the layout of private latents is.
    del shape["readers"], shape["private"], shape["rebuild_entries"]
    for name in ("reader_lora", "gist_layers"):
        shape.pop(name, None)
    if any(config.private_slots.values()):
        shape["private"] = [(k, n) for k, n in config.private_slots.items() if n]
    if encoder:  # its weights count, not where they lie
        shape["encoder"]["backbone"] = encoder
    digest = hashlib.sha256(json.dumps([shape, reader, method]).encode())
    reads = ("readers", "asking", "gist", reader_lora.PART)
    flat = trees.flatten({k: v for k, v in params.items() if k not in reads})
    for name, leaf in sorted(flat.items()):
        x = np.asarray(leaf, np.float32)
        digest.update(f"{name}{x.shape}".encode())
        digest.update(x.tobytes())
    return digest.hexdigest()
