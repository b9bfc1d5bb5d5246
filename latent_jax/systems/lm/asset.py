"""A trained language model as files that `backbones.load` reads, with the record of its run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from latent_jax.backbones.backbone import Backbone
from latent_jax.backbones.readers import hf
from latent_jax.core.config import read_yaml
from latent_jax.core.errors import RunError
from latent_jax.core.files import write_json


def curve(run: str | Path, points: int = 40) -> list[dict[str, float]]:
    """About ``points`` rows of a run's ``metrics.jsonl``: losses, accuracies, held-out values."""
    path = Path(run) / "metrics.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot read the training curve ({error})") from error
    merged: dict[int, dict[str, Any]] = {}
    for row in rows:
        merged.setdefault(int(row["step"]), {}).update(row)
    # Every so many from the end, so that the end of training and the held-out rows are in it.
    every = max(1, -(-len(merged) // points))
    return [{"step": s, **_numbers(merged[s])} for s in sorted(merged)[::-1][::every][::-1]]


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    wanted = ("term.", "eval.")
    return {
        k: round(v, 4)
        for k, v in row.items()
        if isinstance(v, float) and (k.startswith(wanted) or k.endswith("_accuracy"))
    }


def training_record(run: str | Path) -> dict[str, Any]:
    """``config, environment, results`` and ``curve`` of a finished run.

    Raises:
      RunError: it has no results yet.
    """
    run = Path(run)
    parts: dict[str, Any] = {"config": {}}
    for name in ("environment", "results"):
        path = run / f"{name}.json"
        if not path.is_file():
            raise RunError(f"{path} is missing: finish the run first (latent-jax run)")
        parts[name] = json.loads(path.read_text(encoding="utf-8"))
    config = read_yaml(run / "config.yaml")
    parts["config"] = {k: v for k, v in config.items() if k != "out"}
    return {**parts, "curve": curve(run)}


def save(
    model: Backbone, directory: str | Path, record: Mapping[str, Any], dtype: Any = np.float32
) -> Path:
    """Writes ``config.json, model.safetensors, tokenizer.json`` and ``record.json``.

    Args:
      model: what was trained.
      directory: made if needed.
      record: `training_record`, or whatever else a reader of the files should know.
      dtype: of the stored weights.

    Returns:
      The directory.
    """
    params = jax.device_get(model.params)
    out = hf.save_hf(directory, model.config, params, model.tokenizer, dtype)
    write_json(out / "record.json", {"parameters": model.parameter_count(), **record})
    return out
