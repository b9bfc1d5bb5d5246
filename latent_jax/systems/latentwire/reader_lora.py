"""LoRA on the LLM that reads latents: an option, off in everything that is called frozen.

Its deltas act behind latents alone. Whatever the reader does with text (the teacher, every text arm
of the evaluation, the encoder's own pass) is done by the LLM as it is. Training hands them to the
decoder beside its parameters; an evaluation adds them to the weights once, in their precision, so
that decoding and scoring need no path of their own.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from latent_jax.backbones.backbone import Backbone
from latent_jax.backbones.config import DecoderConfig
from latent_jax.core import trees
from latent_jax.nn.lora import LoRA, merged
from latent_jax.systems.latentwire.adapter_config import ReaderLoraConfig

#: Name of the deltas among a compressor's parameters, and of the group that they are trained in.
PART = "reader_lora"


def make(config: ReaderLoraConfig, reader: DecoderConfig) -> LoRA:
    """The module of the deltas."""
    shapes = {name: reader.projection_shapes[name] for name in config.targets}
    layers = min(config.layers, reader.num_layers) or reader.num_layers
    return LoRA(shapes, layers, config.rank, config.alpha)


def reading(latents: Any, reader: Backbone) -> Backbone:
    """The LLM as it reads behind latents: itself, or with the deltas that were trained for them.

    Args:
      latents: a compressor (`compressed.Compressed`), or None.
      reader: the LLM.
    """
    deltas = None if latents is None else latents.deltas()
    if deltas is None:
        return reader
    return dataclasses.replace(reader, params=merged(reader.params, deltas))


def note(config: Any, params: Any) -> str | None:
    """What is said beside every result of a reader that is not frozen; None of one that is.

    Args:
      config: of the compressor (`ModelConfig`).
      params: its parameters.
    """
    own = config.reader_lora
    if not own.rank:
        return None
    where = f"the first {own.layers} layers" if own.layers else "all layers"
    count = trees.count_params(params[PART])
    return (
        f"NOT frozen: LoRA of rank {own.rank} on {', '.join(own.targets)} of {where} "
        f"({count:,} trained numbers)"
    )


def numbers(config: Any, params: Any) -> dict[str, float]:
    """``reader.frozen`` (0) and ``reader.trained_parameters``; nothing of a frozen reader."""
    if not config.reader_lora.rank:
        return {}
    return {"reader.frozen": 0, "reader.trained_parameters": trees.count_params(params[PART])}
