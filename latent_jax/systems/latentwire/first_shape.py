"""The shape of a compressor as the first ones would have told it: what identifies their wires."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from latent_jax.core.config import to_dict
from latent_jax.systems.latentwire.model_config import ModelConfig

# What compressors could not be told when the first of their wires were written.
_LATER = {
    "encoder": (
        "pooler", "byte_layers", "refiner", "layers", "carry", "anchor_width", "anchor_layers",
        "backbone", "pieces",
    ),
    "wire": ("fit", "levels", "codes", "stages"),
    "adapter": (
        "entries", "residual", "hidden", "calibration", "transform", "neighbours", "offset",
        "codes", "onto_soft", "task_rank", "depths", "gate", "carrier",
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
