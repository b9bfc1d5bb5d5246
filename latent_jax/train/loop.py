"""The training loop: set up, resume, step, log, evaluate, save.

The inner loop never waits for the device: a step's metrics are read when they are due in the log,
and then only those of finished steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from latent_jax.core import files
from latent_jax.core.errors import (
    CheckpointError,
    MeshError,
    PeerLost,
)
from latent_jax.sharding import (
    await_processes,
    check_batch,
    make_mesh,
    replicated,
    shard_batch,
    tree_shardings,
)
from latent_jax.train.checkpoints import Checkpoints, resume_hash
from latent_jax.train.config import PhaseConfig, RunBase
from latent_jax.train.feeds import Feeds
from latent_jax.train.guards import Guards
from latent_jax.train.init_from import apply_init_from
from latent_jax.train.meter import Meter
from latent_jax.train.phases import Patience, active_labels, first_phase, phase_at, phase_rate, span
from latent_jax.train.preemption import Preempted, PreemptionWatch
from latent_jax.train.profile import StepProfile
from latent_jax.train.progress import ProgressEvent, ProgressFn
from latent_jax.train.protocol import System
from latent_jax.train.rows import Rows
from latent_jax.train.selection import Selection
from latent_jax.train.setup import check_gates, describe_params, plan_state
from latent_jax.train.state import TrainState
from latent_jax.train.step import StepFn, make_train_step
from latent_jax.train.writers import Writers, open_writers

# With slow steps the log is also written after so long, not only every log_every steps.
_LOG_SECONDS = 2.0

# How a collective fails, or the coordination service answers, when another process has ended.
_LOST = re.compile(r"gloo|connection (closed|reset)|heartbeat|unavailable|nccl", re.IGNORECASE)


def fit(
    system: System,
    config: RunBase,
    out: str | Path,
    mesh: Mesh | None = None,
    progress: ProgressFn | None = None,
    profile: bool = False,
) -> TrainState:
    """Trains a system to ``config.train.steps``, resuming by itself.

    Writes ``metrics.jsonl``, ``warnings.jsonl``, ``tensorboard/`` and ``checkpoints/`` in ``out``.

    Args:
      system: what to train.
      config: the run's config (only the fields of `RunBase` are read).
      out: run directory; made if missing.
      mesh: device mesh; default from ``config.mesh``.
      progress: called with `ProgressEvent`s.
      profile: trace a few steps into ``profile/``.

    Returns:
      The final state. If ``out`` holds checkpoints of the same config, training continues from the
      newest readable one (and returns at once if it was finished).

    Raises:
      CheckpointError: the checkpoints in ``out`` are of another configuration, or unwritable.
      Preempted: SIGTERM came; the state is saved (exit code 75).
      RunError: ``out`` is not writable, or too many non-finite steps in a row.
    """
    out = Path(out)
    files.make_dir(out)
    mesh = make_mesh(config.mesh) if mesh is None else mesh
    with jax.set_mesh(mesh), PreemptionWatch() as watch:
        return _Run(system, config, out, mesh, progress, profile).train(watch)


class _Run:
    """One call of `fit`."""

    def __init__(self, system: System, config: RunBase, out: Path, mesh: Mesh,
                 progress: ProgressFn | None, profile: bool) -> None:
        self.system, self.config, self.out, self.mesh = system, config, out, mesh
        self.cfg = config.train
        self._progress, self._profiled = progress, profile
        if hasattr(system, "notify"):
            system.notify = self.message
        self._main = jax.process_index() == 0
        # What depends on the clock must not decide anything where clocks may disagree.
        self._alone = jax.process_count() == 1
        self.selection = Selection(self.cfg.checkpoint)
        self.patience = Patience(self.cfg.checkpoint)
        rules = (*self.cfg.guards, *getattr(system, "guards", ()))
        self.guards = Guards(rules, self.cfg.max_nonfinite,
                             out / "warnings.jsonl" if self._main else None, self.message)
        self.step = 0
        self.phase = "main"
        self._begun: int | None = None  # at which step the phase that is on began
        self._feeds = Feeds(system)
        self._steps: dict[int, StepFn] = {}
        self._meter = Meter()
        self._rows = Rows(self._meter, self.guards)
        self._profile: StepProfile | None = None
        self._began = time.perf_counter()
        self.writers: Writers | None = None
        self._restore_warning: str | None = None

    # ---- set-up -------------------------------------------------------------------------------

    def _set_up(self) -> TrainState:
        """Makes or restores the state; every array lands on its sharding."""
        system, cfg = self.system, self.cfg
        check_batch(cfg.batch_size, self.mesh)
        self.checkpoints = Checkpoints(
            self.out / "checkpoints", cfg.checkpoint, resume_hash(self.config)
        )
        sample = self._feeds.sample(first_phase(cfg).data)
        plan = self._plan = plan_state(system, self.config, self.mesh, sample)
        self._check_gates(plan.abstract.variables, sample)
        self.frozen = jax.device_put(
            system.frozen, tree_shardings(system.frozen, system.logical_rules, self.mesh)
        )
        restored = self.checkpoints.restore(plan.abstract, plan.shardings, self._warn_restore)
        if restored is not None:
            state, positions, host = restored
            self.step = int(state.step)
            self._feeds.set_state(positions)
            self.selection.set_state(host.get("selection", {}))
            self.guards.set_state(host.get("guards", {}), self.step)
            self.patience.set_state(host.get("patience", {}))
            self.message(f"resumed from step {self.step} in {self.out}")
            return state
        if (self.out / "metrics.jsonl").exists():
            self.message(
                f"no checkpoint in {self.out}: the run there ended before its first one; starting "
                "from step 0"
            )
        self.guards.set_state({}, 0)
        state = plan.create()
        self.message(describe_params(state.params, plan.optimizer, system.frozen))
        for line in getattr(system, "notes", ()):
            self.message(line)
        if cfg.init_from:
            state, line = apply_init_from(state, cfg.init_from, cfg.init_partial, plan.shardings)
            self.message(line)
        return state

    def _check_gates(self, variables: Any, sample: Mapping[str, Any]) -> None:
        """Refuses gates on what no batch gives, where all kinds of batches are known before they
        are read.
        """
        kinds = getattr(self.system, "batch_specs", lambda _: ())
        names = dict.fromkeys(phase.data for phase in self.cfg.phases) or ["main"]
        specs = [kinds(name) for name in names]
        if len(specs) == 1 and not specs[0]:
            check_gates(self.system, self.config, variables, [sample])
        elif all(specs):
            known = [spec.arrays for found in specs for spec in found]
            check_gates(self.system, self.config, variables, known)

    def _warn_restore(self, text: str) -> None:
        # Kept for after the file's rows past the restored step have been dropped.
        self.message(f"warning: {text}")
        self._restore_warning = text

    def _step_fn(self, index: int) -> StepFn:
        """The compiled step of a phase (one per distinct phase)."""
        if index not in self._steps:
            phase = self.cfg.phases[index] if self.cfg.phases else None
            optimizer = self._plan.optimizer
            if phase is not None and self.cfg.optimizer.per_phase:
                optimizer = dataclasses.replace(optimizer, schedule=phase_rate(self.cfg, index))
            self._steps[index] = make_train_step(
                self.system,
                optimizer,
                seed=self.config.seed,
                accumulate=self.cfg.accumulate,
                active=active_labels(phase, self._plan.optimizer.names) if phase else None,
                weights={**self.system.weights, **phase.weights} if phase else None,
                shardings=self._plan.shardings,
                metric_sharding=replicated(self.mesh),
            )
        return self._steps[index]

    def _take_step(
        self, index: int, state: TrainState, batch: Mapping[str, jax.Array]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        first = index not in self._steps
        step = self._step_fn(index)
        if first and not self._alone:
            # Nobody runs a collective before all have compiled; the call below finds the program.
            step.lower(state, self.frozen, batch).compile()
            await_processes(f"latent_jax/step/{self.step}/phase/{index}")
        return step(state, self.frozen, batch)

    # ---- the loop -----------------------------------------------------------------------------

    def train(self, watch: PreemptionWatch) -> TrainState:
        state = self._set_up()
        if self._main:
            self.writers = open_writers(self.cfg.log, self.out, self.config.name, self.step)
            self._rows.writers = self.writers
        if self._restore_warning:
            self.guards.warn(self.step, "checkpoint", "checkpoint", 0.0, self._restore_warning)
        done = lost = False
        try:
            state = self._loop(state, watch)
            done = True
        except (jax.errors.JaxRuntimeError, CheckpointError, MeshError) as error:
            lost = not self._alone and bool(_LOST.search(str(error)))
            if not lost:
                raise
            reason = " ".join(str(error).split())[:120]
            raise PeerLost(
                f"another process of this job has ended near step {self.step} ({reason}); start "
                "all of them again with the same command: they resume from the last checkpoint"
            ) from None
        finally:
            self._finish(done, lost)
        return state

    def _loop(self, state: TrainState, watch: PreemptionWatch) -> TrainState:
        cfg, total = self.cfg, self.cfg.steps
        saved = self.step if self.checkpoints.steps() else -1
        self._meter.start(self.step)
        self._rows.logged = self._saved_at = time.perf_counter()
        if self.step < total:
            self._report(self.step, "compiling")
        if self._profiled and self._main:
            self._profile = StepProfile.of(self.out / "profile", self.step, total)
            if self._profile is None:
                self.message(f"no step is left to profile: {self.step} of {total} are done")
        while self.step < total and self.guards.stop_reason is None:
            index, phase = phase_at(cfg, self.step)
            self.phase = phase.name
            if phase.skip:
                state = self._pass_on(state)
                continue
            self._begin(phase, state)
            batch = self._feeds.next(phase.data, self.step)
            units = self._units(batch)
            self._meter.count(units)
            state, metrics = self._take_step(index, state, shard_batch(batch, self.mesh))
            self.step += 1
            self._rows.add(self.step, phase.name, metrics, units)
            if self._profile is not None:
                began = time.perf_counter()
                text = self._profile.after(self.step, metrics["loss"], self._meter.busy)
                self._meter.pause(time.perf_counter() - began)
                if text:
                    self.message(text)
            if self.step % cfg.log_every == 0:
                self._log(keep=1)
            elif self._alone and time.perf_counter() - self._rows.logged > _LOG_SECONDS:
                # Slow steps: what is finished, without waiting.
                self._log(keep=self._rows.running())
            evaluated = self._quick_eval(state, self.step == total)
            if evaluated and self.patience.spent(self._begun, phase, evaluated):
                state = self._pass_on(state, phase)
            last = self.step >= total
            ended = cfg.checkpoint.phases and span(cfg, self.step)[0] != self._begun
            due = last or ended or (
                cfg.checkpoint.every and self.step % cfg.checkpoint.every == 0
            )
            if cfg.max_minutes and time.perf_counter() - self._began > 60 * cfg.max_minutes:
                watch.request()
            preempted = watch.requested(self.step)
            timely = self._time_to_save()
            if due or timely or preempted or evaluated is not None:
                self._log(keep=0)
                observed = None
                if due or evaluated is not None:
                    observed = self.selection.observe(self.step, self._measured(evaluated))
                better = evaluated is not None and self.selection.improved(self.step)
                if due or timely or preempted or better or self.guards.stop_reason is not None:
                    self._save(state, observed, wait=preempted or last, pinned=ended)
                    saved = self.step
            if preempted and not last:
                raise Preempted(
                    f"stopped early: saved step {self.step} of {total} in {self.out}; run the same "
                    "command again to resume"
                )
        self._log(keep=0)
        if self.guards.stop_reason is not None:
            self.message(f"stopped at step {self.step}: {self.guards.stop_reason}")
        # A run of no steps keeps what its system was started with: that may be all there is to it.
        if saved != self.step and (self.step > 0 or not total):
            self._save(state, None, wait=True)
        name = cfg.checkpoint.metric
        if saved >= 0 and not self.selection.observed and self.step == total:
            self.guards.warn(
                self.step, "checkpoint", name, 0.0,
                f"train.checkpoint.metric = {name} was never measured (have: "
                f"{', '.join(sorted(self._rows.latest)) or 'nothing'}); best and peak are the last",
            )
        return state

    def _begin(self, phase: PhaseConfig, state: TrainState) -> None:
        """Lets a system prepare the data of a phase: where it begins, and where training resumes in
        it.
        """
        start, _ = span(self.cfg, self.step)
        prepare = getattr(self.system, "begin_phase", None)
        if start != self._begun and prepare is not None:
            began = time.perf_counter()
            self._log(keep=0)
            if prepare(phase, start, state.variables, self.frozen, self.out):
                self._feeds.renew(phase.data, forget=start == self.step)
            self._meter.pause(time.perf_counter() - began)
        self._begun = start

    def _pass_on(self, state: TrainState, ended: PhaseConfig | None = None) -> TrainState:
        """Goes to where the present phase ends, so that schedules and cycles stay where they are.

        Args:
          ended: the phase that has been on until now; none: one that is skipped.
        """
        self._log(keep=0)
        last = self.step if ended is None else self.step - 1
        _, stop = span(self.cfg, last)
        if ended is not None and stop > self.step:
            self.message(
                f"phase {ended.name}: no better for {ended.patience} evaluations: ends at step "
                f"{self.step}, training goes on at {stop}"
            )
        state = state.replace(step=state.step + (stop - self.step))
        self.step = stop
        self._meter.start(stop)
        return state

    def _measured(self, evaluated: dict[str, float] | None) -> dict[str, float]:
        """What was measured at this step: an earlier evaluation says nothing about it."""
        row = {k: v for k, v in self._rows.latest.items() if not k.startswith("eval.")}
        return row | (evaluated or {})

    def _units(self, batch: Mapping[str, Any]) -> dict[str, int]:
        counter = getattr(self.system, "unit_counts", None)
        return {k: n * jax.process_count() for k, n in counter(batch).items()} if counter else {}

    def _quick_eval(self, state: TrainState, last: bool) -> dict[str, float] | None:
        every = self.cfg.eval_every
        evaluate = getattr(self.system, "quick_eval", None)
        if not every or evaluate is None or (self.step % every and not last):
            return None
        began = time.perf_counter()
        values = evaluate(state.variables, self.frozen)
        row = {f"eval.{k}": float(v) for k, v in values.items()}
        self._meter.pause(time.perf_counter() - began)
        self._log(keep=0)
        self._rows.evaluated(self.step, row)
        return row

    def _log(self, keep: int) -> None:
        """Writes the rows of finished steps, all but the newest ``keep`` of them."""
        step = self._rows.write(keep)
        if step is not None:
            self._report(step)

    def _time_to_save(self) -> bool:
        """True when ``train.checkpoint.minutes`` have gone by."""
        minutes = self.cfg.checkpoint.minutes
        return bool(
            minutes and self._alone
            and time.perf_counter() - self._saved_at > 60 * minutes
        )

    def _save(
        self, state: TrainState, metrics: dict[str, float] | None, wait: bool, pinned: bool = False
    ) -> None:
        if self.writers is not None:
            self.writers.flush()
        began = time.perf_counter()
        self.checkpoints.save(
            state,
            self.step,
            data=self._feeds.get_state(),
            host={
                "selection": self.selection.get_state(), "guards": self.guards.get_state(),
                "patience": self.patience.get_state(),
            },
            metrics=metrics,
            wait=wait,
            pinned=pinned,
        )
        self._saved_at = time.perf_counter()
        self._meter.pause(self._saved_at - began)

    def _finish(self, done: bool, lost: bool) -> None:
        """Makes rows and pending saves durable, also on the way out of an error.

        A save needs all processes: where one is lost it is not waited for.
        """
        if lost:
            if self.writers is not None:
                self.writers.close()
            return
        with contextlib.ExitStack() as stack:  # every one of them, though one fails
            stack.callback(self._feeds.close)
            stack.callback(self.checkpoints.close)
            if self.writers is not None:
                stack.callback(self.writers.close)
            if self._profile is not None:
                self._profile.close()
            if not done:
                self._log_quietly()
            self.checkpoints.wait()

    def _log_quietly(self) -> None:
        try:
            self._log(keep=0)
        except Exception:  # noqa: BLE001 - the first error is the one to show
            self._rows.clear()

    # ---- progress -----------------------------------------------------------------------------

    def message(self, text: str) -> None:
        if self._progress is not None and self._main:
            self._progress(ProgressEvent(self.step, self.cfg.steps, self.phase, message=text))

    def _report(self, step: int, phase: str | None = None) -> None:
        if self._progress is None or not self._main:
            return
        rates = self._meter.rates()
        eta = (self.cfg.steps - step) / rates["steps"] if rates.get("steps") else None
        self._progress(
            ProgressEvent(
                step, self.cfg.steps, phase or self.phase, self._rows.latest, rates, eta,
                self._meter.host,
            )
        )
