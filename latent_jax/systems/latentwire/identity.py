"""Who writes a compressor's wires: the digest by which a reader knows that it can read them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import numpy as np

from latent_jax.core import trees
from latent_jax.core.config import parse, to_dict
from latent_jax.systems.latentwire import reader_lora
from latent_jax.systems.latentwire.config import ModelConfig
from latent_jax.systems.latentwire.first_shape import as_first
from latent_jax.systems.latentwire.wire import Origin


def origin_of(own: Any) -> Origin:
    """What wires of a `LatentWire` say of it: the same configuration and weights read them."""
    config = own.config
    shape = to_dict(dataclasses.replace(config, start=None, remat=False, readers={}))
    shape = as_first(to_dict(parse(ModelConfig, shape)))  # a ratio of 4 is one of 4.0
    # Readers are not the encoder's: one that is added later reads what was written before. Only
    # the layout of private latents is.
    del shape["readers"], shape["private"], shape["rebuild_entries"]
    for name in ("reader_lora", "gist_layers"):
        shape.pop(name, None)
    if any(config.private_slots.values()):
        shape["private"] = [(k, n) for k, n in config.private_slots.items() if n]
    if own.separate is not None:  # its weights count, not where they lie
        shape["encoder"]["backbone"] = own.separate.backbone.sha256
    digest = hashlib.sha256(json.dumps([shape, own.backbone.sha256, own.method]).encode())
    reads = ("readers", "asking", "gist", reader_lora.PART)
    flat = trees.flatten({k: v for k, v in own.params.items() if k not in reads})
    if own.centre is not None:
        flat["centre"] = own.centre
    for name, leaf in sorted(flat.items()):
        x = np.asarray(leaf, np.float32)
        digest.update(f"{name}{x.shape}".encode())
        digest.update(x.tobytes())
    reader = own.backbone
    return Origin(own.name, digest.hexdigest(), reader.name, reader.config.family)
