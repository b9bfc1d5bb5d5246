"""LoRA on the base: what makes it friendly to gists. An option; without it the base is frozen.

The deltas act where the base reads on behind a working context, and nowhere else. Raw entries and
gists are made by the base as it is, so that a store serves a base with and without them, and so is
what gists are measured and trained against: the loss behind the whole text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from latent_jax.backbones.config import DecoderConfig
from latent_jax.core.config import field
from latent_jax.core.errors import ConfigError
from latent_jax.nn.lora import LoRA, placed

#: Name of the deltas among a run's parameters, and of the group that they are trained in.
PART = "lora"


@dataclass(frozen=True)
class BaseLoraConfig:
    """Low-rank deltas of a few layers of the base."""

    rank: int = field(default=8, ge=1, help="inner width")
    alpha: float = field(default=16.0, gt=0, help="deltas are scaled by alpha / rank")
    targets: tuple[str, ...] = field(
        default=("q", "k", "v", "o"), help="adapted projections of the base"
    )
    layers: int = field(default=2, ge=0, help="so many layers are adapted; 0: all")
    where: Literal["first", "last"] = field(default="last", help="which layers they are")


def make(config: BaseLoraConfig, base: DecoderConfig) -> LoRA:
    """The module of the deltas.

    Raises:
      ConfigError: a projection that the base does not have.
    """
    unknown = [name for name in config.targets if name not in base.projection_shapes]
    if unknown or not config.targets:
        raise ConfigError(
            f"model.lora.targets: unknown {unknown}; the base has "
            f"{', '.join(base.projection_shapes)}"
        )
    shapes = {name: base.projection_shapes[name] for name in config.targets}
    return LoRA(shapes, _layers(config, base), config.rank, config.alpha)


def deltas(
    config: BaseLoraConfig | None, base: DecoderConfig, params: Mapping[str, Any]
) -> dict[str, Any] | None:
    """What the decoder is handed as ``lora``; None where the base reads as it is.

    Args:
      config: of the deltas, if there are.
      base: the decoder.
      params: of a run; without `PART` the base is frozen.
    """
    if config is None or PART not in params:
        return None
    found = make(config, base).apply({"params": params[PART]})
    first = base.num_layers - _layers(config, base) if config.where == "last" else 0
    return placed(found, base.num_layers, first)


def frozen(params: Mapping[str, Any]) -> dict[str, Any]:
    """A run's parameters without the deltas."""
    return {name: part for name, part in params.items() if name != PART}


def _layers(config: BaseLoraConfig, base: DecoderConfig) -> int:
    return min(config.layers, base.num_layers) or base.num_layers
