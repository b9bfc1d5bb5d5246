"""Reads what a run left behind, tolerating what is missing or cut off."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import yaml

from latent_jax.core.errors import RunError


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """The contents of a run directory, parsed.

    Attributes:
      path: the directory.
      config: resolved configuration tree.
      config_hash: its hash ("" when the run has none).
      environment: versions, devices, commit.
      metrics: rows of metrics.jsonl in step order.
      results: flat dotted name → number, list or text.
      samples: rows of samples.jsonl.
      warnings: rows of warnings.jsonl.
      notes: what could not be read, one sentence each.
    """

    path: Path
    config: dict[str, Any]
    config_hash: str
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    results: dict[str, Any]
    samples: list[dict[str, Any]]
    warnings: list[dict[str, Any]]
    notes: list[str]


def load_run(path: str | Path) -> RunFiles:
    """Reads a run directory.

    Raises:
      RunError: the directory does not exist or holds no run.
    """
    path = Path(path)
    if not path.is_dir():
        raise RunError(f"no such run: {path} is not a directory")
    if not (path / "config.yaml").is_file():
        raise RunError(f"not a run: {path} has no config.yaml")
    notes: list[str] = []
    try:
        config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunError(f"{path / 'config.yaml'} is not readable YAML: {error}") from None
    if not isinstance(config, dict):
        raise RunError(f"{path / 'config.yaml'} does not hold a configuration")
    hash_file = path / "config.hash"
    return RunFiles(
        path=path,
        config=config,
        config_hash=hash_file.read_text(encoding="utf-8").strip() if hash_file.is_file() else "",
        environment=_read_json(path / "environment.json", notes),
        metrics=read_jsonl(path / "metrics.jsonl", notes),
        results=_read_json(path / "results.json", notes),
        samples=read_jsonl(path / "samples.jsonl", notes),
        warnings=read_jsonl(path / "warnings.jsonl", notes),
        notes=notes,
    )


def _read_json(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        notes.append(f"{path.name} is missing.")
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        notes.append(f"{path.name} is not valid JSON.")
        return {}
    if not isinstance(value, dict):
        notes.append(f"{path.name} does not hold an object.")
        return {}
    return value


def read_jsonl(path: Path, notes: list[str] | None = None) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file; a killed run may leave a cut last line, which is left out."""
    if not path.is_file():
        return []
    rows, bad = [], 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                bad += 1
                continue
            if isinstance(row, dict):
                rows.append(row)
            else:
                bad += 1
    if bad and notes is not None:
        notes.append(f"{path.name}: {bad} unreadable line{'s' if bad > 1 else ''} left out.")
    return rows


def series(rows: list[dict[str, Any]]) -> dict[str, tuple[list[float], list[float]]]:
    """Columns of metric rows: name → (steps, values), names in order of first appearance.

    Example:
      >>> series([{"step": 1, "loss": 2.0}, {"step": 2, "loss": float("nan"), "lr": 0.1}])
      {'loss': ([1], [2.0]), 'lr': ([2], [0.1])}
    """
    columns: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        step = row.get("step")
        if not is_number(step):
            continue
        for name, value in row.items():
            if name == "step" or not is_number(value) or not math.isfinite(value):
                continue
            steps, values = columns.setdefault(name, ([], []))
            steps.append(step)
            values.append(float(value))
    return columns


def is_number(value: Any) -> bool:
    """True for int and float, not for bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
