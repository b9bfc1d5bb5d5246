"""Metric writers: JSONL (always), TensorBoard, and optionally W&B and MLflow."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from latent_jax.core import files
from latent_jax.core.errors import ConfigError
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
        with files.explained(path):
            self._file = path.open("a", encoding="utf-8")

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
        with files.explained(self.path):
            self._file.write(json.dumps(clean) + "\n")

    def flush(self) -> None:
        with files.explained(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        try:
            self.flush()
        finally:
            with files.explained(self.path):
                self._file.close()


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
    if dropped:
        files.write_text(path, "".join(line + "\n" for line in kept))
    return dropped


class TensorboardWriter:
    """TensorBoard event files, written by this thread.

    tensorboardX's own writer hands events to a thread: where the disk is full that thread dies, and
    the training waits for ever on its queue. Files are numbered so that they sort in the order in
    which they were made, whatever the clock says; rows after a restored step are purged.
    """

    def __init__(self, directory: Path, purge_step: int | None) -> None:
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter

        self._event, self._directory = Event, files.make_dir(directory)
        made = [p.name.split(".")[3] for p in directory.glob("events.out.tfevents.*")]
        stamp = max([int(time.time()), *(int(n) + 1 for n in made if n.isdigit())])
        with files.explained(directory):
            self._file = RecordWriter(str(directory / f"events.out.tfevents.{stamp:010d}.latent"))
        self._add(file_version="brain.Event:2")
        if purge_step is not None:
            self._add(step=purge_step, session_log=SessionLog(status=SessionLog.START))

    def _add(self, **what: Any) -> None:
        with files.explained(self._directory):
            self._file.write(self._event(wall_time=time.time(), **what).SerializeToString())

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        from tensorboardX.summary import scalar

        for key, value in row.items():
            if isinstance(value, int | float):
                self._add(step=step, summary=scalar(key.replace(".", "/"), value))

    def flush(self) -> None:
        with files.explained(self._directory):
            self._file.flush()

    def close(self) -> None:
        with files.explained(self._directory):
            self._file.close()


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
        with contextlib.ExitStack() as stack:  # every one, though one of them fails
            for writer in self._writers:
                stack.callback(writer.close)


def open_writers(cfg: LogConfig, out: Path, name: str, start_step: int) -> Writers:
    """Opens ``metrics.jsonl`` and the configured extras, continuing after ``start_step``."""
    path = out / "metrics.jsonl"
    truncate_jsonl(path, start_step)
    writers: list[Writer] = [JsonlWriter(path)]
    try:
        if cfg.tensorboard:
            purge = start_step + 1 if start_step else None
            writers.append(TensorboardWriter(out / "tensorboard", purge))
        if cfg.wandb:
            writers.append(WandbWriter(cfg.wandb, name, out))
        if cfg.mlflow:
            writers.append(MlflowWriter(cfg.mlflow, name))
    except BaseException:
        Writers(writers).close()
        raise
    return Writers(writers)
