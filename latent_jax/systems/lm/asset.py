"""From a run to files that `backbones.load` reads, with the record of how they came to be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from latent_jax.backbones.readers import hf
from latent_jax.core.config import to_dict
from latent_jax.core.errors import RunError
from latent_jax.core.files import write_json
from latent_jax.systems.lm.system import LMSystem


def curve(run: str | Path, points: int = 40) -> list[dict[str, float]]:
    """About ``points`` rows of a run's ``metrics.jsonl``: step, loss terms, accuracies, held-out values."""
    path = Path(run) / "metrics.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot read the training curve ({error})") from error
    merged: dict[int, dict[str, float]] = {}
    for row in rows:
        merged.setdefault(int(row["step"]), {}).update(row)
    steps = sorted(merged)
    every = max(1, -(-len(steps) // points))
    # The last of each group, so that the end of training is always in it.
    kept = steps[::-1][::every][::-1]
    return [{"step": s, **_numbers(merged[s])} for s in kept]


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    wanted = ("term.", "eval.")
    return {
        k: round(v, 4)
        for k, v in row.items()
        if isinstance(v, float) and (k.startswith(wanted) or k.endswith("_accuracy"))
    }


def export(
    system: LMSystem,
    variables: Mapping[str, Any],
    directory: str | Path,
    record: Mapping[str, Any],
    dtype: Any = np.float32,
) -> Path:
    """Writes ``config.json, model.safetensors, tokenizer.json`` and ``record.json``.

    Args:
      system: what was trained.
      variables: its trained variables.
      directory: made if needed.
      record: machine, curve, results and whatever else a reader of the file should know; the run's config is added.
      dtype: of the stored weights.

    Returns:
      The directory.
    """
    params = jax.device_get(variables["params"])
    out = hf.save_hf(directory, system.decoder.config, params, system.tokenizer, dtype)
    config = {k: v for k, v in to_dict(system.config).items() if k not in ("out", "mesh")}
    entry = {"config": config, "parameters": system.backbone(variables).parameter_count()}
    write_json(out / "record.json", {**entry, **record})
    return out


def export_run(run: str | Path, directory: str | Path) -> Path:
    """`export` of a finished run, whose results and environment become the record.

    Raises:
      RunError: the run has no results yet.
    """
    from latent_jax.core.config import parse, read_yaml
    from latent_jax.systems.lm.config import LMRun
    from latent_jax.train.checkpoints import load_variables

    run = Path(run)
    parts = {}
    for name in ("results", "environment"):
        path = run / f"{name}.json"
        if not path.is_file():
            raise RunError(f"{path} is missing: finish the run first (latent-jax run)")
        parts[name] = json.loads(path.read_text(encoding="utf-8"))
    variables, _ = load_variables(run)
    config = parse(LMRun, read_yaml(run / "config.yaml"), str(run))
    return export(LMSystem(config), variables, directory, {**parts, "curve": curve(run)})


if __name__ == "__main__":
    import sys

    print(export_run(*sys.argv[1:3]))
