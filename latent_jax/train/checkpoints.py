"""Checkpoints with Orbax: async, best-k and smoothed peak, data position in the same step.

Layout of ``<run>/checkpoints/<step>/``: ``variables`` (params and collections), ``training``
(everything else in the TrainState) and ``meta`` (config hash, data iterators, host counters).
Orbax writes aside and renames, so a checkpoint is there as a whole or not at all. Arrays are stored
under their path, so evaluation can read the variables without knowing the optimizer.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from latent_jax.core import trees
from latent_jax.core.config import config_hash
from latent_jax.core.errors import CheckpointError
from latent_jax.core.types import PyTree
from latent_jax.train.config import CheckpointConfig
from latent_jax.train.load import load_variables, quiet_orbax
from latent_jax.train.retention import Retention
from latent_jax.train.state import TrainState

# What may differ between a run and its continuation: it does not change what is computed.
_NOT_HASHED = (
    "out", "name", "mesh", "train.log_every", "train.log", "train.checkpoint.keep_last",
    "train.checkpoint.keep_best", "train.checkpoint.asynchronous", "train.checkpoint.every",
    "train.checkpoint.minutes", "train.checkpoint.phases", "train.max_minutes",
)
_VERSION = 1
_YEAR = 365 * 24 * 3600

__all__ = ["Checkpoints", "load_variables", "resume_hash"]


def resume_hash(config: Any) -> str:
    """Hash of the config without what a continuation may change (mesh, logging, retention)."""
    return config_hash(config, exclude=_NOT_HASHED)


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: ``<run>/checkpoints``.
      cfg: what to keep.
      hash_: `resume_hash` of the config; another run's checkpoints are refused.
    """

    def __init__(self, directory: Path, cfg: CheckpointConfig, hash_: str) -> None:
        quiet_orbax()
        self._directory = Path(directory).absolute()
        self._hash = hash_
        self._retention = Retention(cfg, self._directory)
        try:
            self._manager = ocp.CheckpointManager(
                self._directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=self._retention,
                    enable_async_checkpointing=cfg.asynchronous,
                    cleanup_tmp_directories=True,
                    save_root_metadata=False,
                    async_options=_patient() if jax.process_count() == 1 else None,
                ),
                item_names=("variables", "training", "meta"),
            )
        except OSError as e:
            raise CheckpointError(
                f"cannot use {self._directory} for checkpoints: {e.strerror or e}"
            ) from e

    def steps(self) -> list[int]:
        """Steps with a finished checkpoint."""
        return sorted(self._manager.all_steps())

    def save(
        self, state: TrainState, step: int, *, data: Mapping[str, Any], host: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None, wait: bool = False, pinned: bool = False,
    ) -> None:
        """Saves ``state`` as ``step`` (in the background unless ``wait``).

        Args:
          state: may be donated after this returns: Orbax has copied it to the host by then.
          step: number of finished steps.
          data: ``{data name: iterator state}`` of this process.
          host: JSON counters of the loop (guards, peak).
          metrics: ``{"value", "smoothed"}`` that best and peak are judged by.
          wait: return when it is on disk.
          pinned: it stays when newer ones come.
        """
        variables, training = _split(state)
        meta = {
            "version": _VERSION,
            "step": step,
            "config_hash": self._hash,
            "data": _gather(data),
            "host": dict(host),
            "metrics": dict(metrics) if metrics else None,
            "param_count": trees.count_params(state.params),
            "pinned": pinned,
        }
        self._retention.note(step, metrics, pinned)
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    variables=ocp.args.StandardSave(variables),
                    training=ocp.args.StandardSave(training),
                    meta=ocp.args.JsonSave(meta),
                ),
                force=True,
            )
            if wait:
                self.wait()
        except (OSError, ValueError, RuntimeError) as e:  # tensorstore raises the latter two
            raise CheckpointError(
                f"cannot write checkpoint {step} in {self._directory}: {_reason(e)}; the ones "
                "before it are kept, run again to resume from them"
            ) from e

    def wait(self) -> None:
        """Blocks until pending saves are on disk."""
        with self._written():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        """Lets go of the directory; waits for pending saves."""
        with self._written():
            self._manager.close()

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError) as e:
            raise CheckpointError(
                f"writing a checkpoint in {self._directory} failed: {_reason(e)}; the ones before "
                "it are kept, run again to resume from them"
            ) from e

    def restore(
        self, abstract: TrainState, shardings: TrainState, warn: Callable[[str], None]
    ) -> tuple[TrainState, dict[str, Any], dict[str, Any]] | None:
        """Restores the newest readable checkpoint onto ``shardings``.

        A damaged one is set aside (``checkpoints_damaged/``) with a warning and the one before it
        is tried.

        Returns:
          ``(state, data states, host counters)``, or ``None`` if there is no checkpoint.

        Raises:
          CheckpointError: the checkpoint is of another configuration, or every one is damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                meta = self._meta(step)
            except Exception as e:  # noqa: BLE001 - whatever a damaged file makes a reader raise
                self._set_aside(step, e, warn)
                continue
            if meta["config_hash"] != self._hash:
                raise CheckpointError(
                    f"{self._directory}: checkpoint {step} is of another configuration "
                    f"({meta['config_hash']}, this one is {self._hash}); use another --out, or "
                    "train.init_from=RUN to start from its weights"
                )
            targets = jax.tree.map(
                lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings
            )
            variables, training = _split(targets)
            try:
                got = self._manager.restore(
                    step,
                    args=ocp.args.Composite(
                        variables=ocp.args.StandardRestore(variables),
                        training=ocp.args.StandardRestore(training),
                    ),
                )
            except Exception as e:  # noqa: BLE001
                self._set_aside(step, e, warn)
                continue
            # A process that was killed after a save had not deleted what that save replaced.
            for surplus in set(self.steps()) - self._retention.kept(self.steps()):
                self._manager.delete(surplus)
            state = _join(abstract, got["variables"], got["training"])
            # Restored buffers may be views that cannot be donated: copy once into owned ones.
            own = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=shardings)
            return own(state), _scatter(meta["data"]), meta["host"]
        if steps:
            raise CheckpointError(
                f"{self._directory}: none of the checkpoints {steps} can be read; they were moved "
                "to checkpoints_damaged/. Run again to start afresh"
            )
        return None

    def _meta(self, step: int) -> dict[str, Any]:
        restored = self._manager.restore(
            step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
        )
        return restored["meta"]

    def _set_aside(self, step: int, error: Exception, warn: Callable[[str], None]) -> None:
        reason = _reason(error)
        logging.getLogger(__name__).debug("checkpoint %s", step, exc_info=error)
        if jax.process_index() == 0:
            aside = self._directory.parent / "checkpoints_damaged"
            aside.mkdir(exist_ok=True)
            target = aside / str(step)
            shutil.rmtree(target, ignore_errors=True)
            shutil.move(str(self._directory / str(step)), str(target))
        self._manager.reload()
        warn(f"checkpoint {step} is damaged ({reason}); falling back to the one before it")


def _patient() -> ocp.AsyncOptions:
    """Limits of a save that a clock which is set forward in the middle of it does not reach.

    Orbax counts by the wall clock. Several processes need its limits, to notice a lost one.
    """
    return ocp.AsyncOptions(timeout_secs=_YEAR, create_directories_asynchronously=False)


def _reason(error: BaseException) -> str:
    """The part of a storage error that a person needs, in one line."""
    text = str(error)
    for known in ("No space left on device", "Disk quota exceeded", "Permission denied"):
        if known in text:
            return known
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (text.strip().splitlines() or [type(error).__name__])[0][:160]


def _split(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    """Flat ``{path: leaf}`` of the variables, and of the rest."""
    variables = trees.flatten(state.variables)
    training = trees.flatten({
        "step": state.step, "opt_state": state.opt_state, "gates": state.gates,
        "guard": state.guard,
    })
    return variables, training


def _join(abstract: TrainState, variables: Any, training: Any) -> TrainState:
    flat = {**variables, **training}

    def fill(prefix: str, tree: PyTree) -> PyTree:
        return trees.map_with_path(lambda path, _: flat[f"{prefix}/{path}"], tree)

    return TrainState(
        step=flat["step"],
        params=fill("params", abstract.params),
        collections={k: fill(k, v) for k, v in abstract.collections.items()},
        opt_state=fill("opt_state", abstract.opt_state),
        gates=fill("gates", abstract.gates),
        guard=fill("guard", abstract.guard),
    )


def _encode(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"b64": base64.b64encode(value).decode()}
    return {"json": value}


def _decode(value: Mapping[str, Any]) -> Any:
    return base64.b64decode(value["b64"]) if "b64" in value else value["json"]


def _gather(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every process's iterator states, as JSON, on every process."""
    mine = {name: _encode(state) for name, state in data.items()}
    if jax.process_count() == 1:
        return [mine]
    from jax.experimental import multihost_utils

    raw = np.frombuffer(json.dumps(mine).encode(), np.uint8)
    size = int(multihost_utils.process_allgather(np.asarray(raw.size)).max())
    rows = multihost_utils.process_allgather(np.pad(raw, (0, size - raw.size)))
    return [json.loads(bytes(row).rstrip(b"\0")) for row in np.asarray(rows)]


def _scatter(rows: list[dict[str, Any]]) -> dict[str, Any]:
    if all(row == rows[0] for row in rows):  # positions that count global batches
        return {name: _decode(state) for name, state in rows[0].items()}
    if len(rows) != jax.process_count():
        raise CheckpointError(
            f"the checkpoint was saved by {len(rows)} processes and this run has "
            f"{jax.process_count()}: data positions cannot be split; use train.init_from=RUN"
        )
    return {name: _decode(state) for name, state in rows[jax.process_index()].items()}
