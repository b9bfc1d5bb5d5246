"""Packaged matchers, with how they came to be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from latent_jax.assets import asset
from latent_jax.backbones import Backbone
from latent_jax.core import trees
from latent_jax.core.errors import ConfigError
from latent_jax.core.files import make_dir, write_json
from latent_jax.systems.megacontext.model_config import MatcherConfig

WEIGHTS, RECORD = "matcher.safetensors", "record.json"
# What of the configuration the weights depend on.
_SHAPE = ("layers", "width")


def packaged() -> list[str]:
    """Names of the matchers that ship with the package."""
    folder = asset("matchers")
    return sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []


def load(name: str, config: MatcherConfig, backbone: Backbone) -> dict[str, Any]:
    """Parameters of a packaged matcher, or of one in a directory.

    Raises:
      ConfigError: there is none of that name, or it is of another shape or another base.
    """
    folder = asset("matchers") / name if name in packaged() else Path(name).expanduser()
    if not (folder / WEIGHTS).is_file():
        known = ", ".join(packaged()) or "none is packaged"
        raise ConfigError(f"model.matcher.start: {name!r} is neither of {known}, nor a directory")
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    if record["backbone"] != backbone.sha256:
        raise ConfigError(
            f"model.matcher.start={name} was trained on states of {record['base']}, and this base "
            f"is {backbone.name}: leave it out and train one (data questions)"
        )
    for key in _SHAPE:
        wanted = getattr(config, key)
        wanted = list(wanted) if isinstance(wanted, tuple) else wanted
        if record[key] != wanted:
            raise ConfigError(
                f"model.matcher.{key}={wanted}: {name} was trained with {record[key]}; set that"
            )
    flat = load_file(folder / WEIGHTS)
    return trees.unflatten({key: x.astype(np.float32) for key, x in flat.items()})


def save(
    folder: Path, params: Any, config: MatcherConfig, backbone: Backbone,
    record: Mapping[str, Any],
) -> None:  # fmt: skip
    """Writes what `load` reads, as float16.

    Args:
      folder: made if it is not there.
      record: how it came to be: configuration, results.
    """
    make_dir(folder)
    flat = {k: np.asarray(x, np.float16) for k, x in trees.flatten(params).items()}
    save_file(flat, folder / WEIGHTS)
    shape = {"layers": list(config.layers), "width": config.width}
    own = {"base": backbone.name, "backbone": backbone.sha256, **shape}
    write_json(folder / RECORD, {**own, **record})
