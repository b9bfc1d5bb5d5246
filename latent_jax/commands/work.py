"""What `run`, `train` and `eval` have in common: processes, progress, and how they end."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import Any

import jax

from latent_jax import run as runs
from latent_jax.commands import plan as plans
from latent_jax.commands.show import EvalProgress, console, present, results_table
from latent_jax.core.config import config_hash, to_dict
from latent_jax.core.errors import BackboneError
from latent_jax.report import record
from latent_jax.report.directory import out_dir
from latent_jax.sharding import check_agreement, initialize_distributed, make_mesh
from latent_jax.train.checkpoints import resume_hash
from latent_jax.train.footprint import footprint
from latent_jax.train.phases import first_phase
from latent_jax.train.preemption import Preempted
from latent_jax.train.progress import make_progress


def resolve(config: str, overrides: list[str]) -> Any:
    """Joins the other processes of a job, before anything touches a device; then the config.

    Raises:
      MeshError: the others cannot be reached, or have another configuration or other code.
    """
    initialize_distributed()
    resolved = runs.resolve(config, overrides)
    agree(resolved)
    return resolved


def agree(config: Any) -> None:
    """Refuses processes that would not compute the same thing."""
    check_agreement(
        {
            "configuration": config_hash(config, exclude=()),
            "versions": " ".join(f"{name} {v}" for name, v in record.versions().items()),
            "source": record.source_digest(),
        }
    )


def train(config: Any, quiet: bool, profile: bool = False) -> Any:
    """Trains with a progress bar on a terminal; returns (system, state, directory)."""
    warn_if_short(config)
    progress = make_progress(quiet or not record.primary())
    try:
        return runs.train(config, progress, profile)
    finally:
        if progress is not None:
            progress.close()


def warn_if_short(config: Any) -> None:
    """Says, before anything is loaded, that a run will not fit the devices it is started on."""
    room = memory_limit()
    if not room or not record.primary():
        return
    try:
        found = plans.plan(config, plans.Machine(jax.device_count()))
    except BackboneError:
        return  # its shape is known when it has been loaded
    line = plans.fit_line(found, room / 2**30)
    if line is not None and line.startswith("warning"):
        print(line, file=sys.stderr)


def memory_limit() -> int:
    """Bytes of the smallest device of this process; 0 where a device does not tell (a CPU)."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return min((int(s.get("bytes_limit", 0)) for s in stats), default=0)


@contextlib.contextmanager
def evaluating(quiet: bool) -> Iterator[Any]:
    """Progress of an evaluation; SIGTERM ends it as a preemption, for training has been saved."""

    def stop(*_: Any) -> None:
        raise Preempted("preempted while evaluating: run the same command again to resume")

    old = signal.signal(signal.SIGTERM, stop)
    progress = None if quiet or not record.primary() else EvalProgress()
    try:
        yield progress
    finally:
        signal.signal(signal.SIGTERM, old)
        if progress is not None:
            progress.close()


def run(config: Any, quiet: bool, profile: bool = False) -> None:
    """Trains, evaluates and shows the results."""
    system, state, out = train(config, quiet, profile)
    with evaluating(quiet) as progress:
        results = runs.finish(system, state.variables, config, out, progress)
    show(results)


def evaluate(
    run: str, overrides: list[str], checkpoint: str, out: str | None, quiet: bool
) -> None:
    """Evaluates an existing run and shows the results."""
    if initialize_distributed():
        agree(runs.open_run(run, overrides)[1])
    with evaluating(quiet) as progress:
        results = runs.evaluate(run, overrides, checkpoint, out, progress)
    show(results)


def dry_run(config: Any) -> None:
    """Builds the system, reads its first batch, prints the plan, and writes nothing."""
    mesh = make_mesh(config.mesh)
    system = runs.system_class(config.system)(config)
    next(iter(system.train_data(first_phase(config.train).data, None)))
    found = footprint(config, system, mesh, *plans.without_remat(config))
    plans.show(found, console(), plans.Machine(mesh.size))
    _note(system)
    print(f"configuration {resume_hash(config)} is valid; it would write {out_dir(config)}")


def show(results: runs.Results) -> None:
    """What a run ends with: the system's own table where it has one, and the report's path."""
    if not record.primary():
        return
    config = getattr(results.system, "config", None)
    config = None if config is None else to_dict(config)
    if hasattr(results.system, "show"):
        present(results.system.show(results), config=config)
    else:
        for table in results_table(results, config):
            console().print(table)
    _note(results.system)
    print(f"report: {results.report}")


def _note(system: Any) -> None:
    """What a system says of its configuration."""
    for line in getattr(system, "notes", ()):
        print(f"note: {line}")
