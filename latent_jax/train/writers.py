"""Metric writers: JSONL (always), tensorboardX, and optionally W&B and MLflow."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from latent_jax.core.errors import ConfigError, RunError
from latent_jax.train.config import LogConfig


class Writer(Protocol):
    """Where rows of metrics go."""

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """Adds a row of numbers at ``step`` (the number of finished steps)."""

    def flush(self) -> None:
        """Makes all rows durable."""

    def close(self) -> None:
        """Flushes and releases files."""


class JsonlWriter:
    """One JSON object per line: ``{"step": n, "loss": …, "term.x": …}``.

    A non-finite number is written as ``null`` and named in ``"nonfinite"``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("a", encoding="utf-8")
        except OSError as e:
            raise RunError(f"cannot write {path}: {e.strerror}") from e

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        clean: dict[str, Any] = {"step": step}
        bad = []
        for key, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                bad.append(key)
                value = None
            clean[key] = value
        if bad:
            clean["nonfinite"] = bad
        self._guarded(lambda: self._file.write(json.dumps(clean) + "\n"))

    def flush(self) -> None:
        self._guarded(self._sync)

    def close(self) -> None:
        self._guarded(self._sync)
        self._guarded(self._file.close)

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def _guarded(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except OSError as e:
            raise RunError(f"cannot write {self.path}: {e.strerror or e}") from e


def truncate_jsonl(path: Path, step: int) -> int:
    """Drops rows after ``step`` and a half-written last line; returns how many were dropped.

    The file is written aside and renamed.
    """
    if not path.exists():
        return 0
    kept, dropped = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            good = int(json.loads(line)["step"]) <= step
        except (ValueError, KeyError, TypeError):
            good = False
        if good:
            kept.append(line)
        else:
            dropped += 1
    aside = path.with_suffix(path.suffix + ".tmp")
    aside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(aside, path)
    return dropped


class TensorboardWriter:
    """Event files through tensorboardX; rows after a restored step are purged by the reader."""

    def __init__(self, directory: Path, purge_step: int | None) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(directory), purge_step=purge_step, flush_secs=60)

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        for key, value in row.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(key.replace(".", "/"), value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbWriter:
    """Weights & Biases (optional install)."""

    def __init__(self, project: str, name: str, directory: Path) -> None:
        try:
            import wandb
        except ImportError as e:
            raise ConfigError(
                "train.log.wandb is set but wandb is not installed: pip install wandb"
            ) from e
        self._run = wandb.init(project=project, name=name, dir=str(directory), resume="allow")

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        self._run.log(dict(row), step=step)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._run.finish()


class MlflowWriter:
    """MLflow (optional install)."""

    def __init__(self, experiment: str, name: str) -> None:
        try:
            import mlflow
        except ImportError as e:
            raise ConfigError(
                "train.log.mlflow is set but mlflow is not installed: pip install mlflow"
            ) from e
        mlflow.set_experiment(experiment)
        mlflow.start_run(run_name=name)
        self._mlflow = mlflow

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        numbers = {k: v for k, v in row.items() if isinstance(v, int | float)}
        self._mlflow.log_metrics(numbers, step=step)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._mlflow.end_run()


class Writers:
    """Several writers as one."""

    def __init__(self, writers: Iterable[Writer]) -> None:
        self._writers = list(writers)

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        for writer in self._writers:
            writer.write(step, row)

    def flush(self) -> None:
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


def open_writers(cfg: LogConfig, out: Path, name: str, start_step: int) -> Writers:
    """Opens ``metrics.jsonl`` and the configured extras, continuing after ``start_step``."""
    path = out / "metrics.jsonl"
    truncate_jsonl(path, start_step)
    writers: list[Writer] = [JsonlWriter(path)]
    if cfg.tensorboard:
        purge = start_step + 1 if start_step else None
        writers.append(TensorboardWriter(out / "tensorboard", purge))
    if cfg.wandb:
        writers.append(WandbWriter(cfg.wandb, name, out))
    if cfg.mlflow:
        writers.append(MlflowWriter(cfg.mlflow, name))
    return Writers(writers)
