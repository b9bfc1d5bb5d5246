"""What the shared trainer asks of a system. It never looks at anything else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax

from latent_jax.core.types import Mean, PyTree


@runtime_checkable
class DataIterator(Protocol):
    """Batches with a position that can be saved.

    A batch is a flat dict of numpy arrays, each with the leading axis ``batch_size`` (this
    process's part of it), always of the same shapes and dtypes within a few buckets: the step is
    compiled once per distinct shape.
    """

    def __iter__(self) -> Iterator[Mapping[str, Any]]: ...

    def __next__(self) -> Mapping[str, Any]: ...

    def get_state(self) -> bytes | dict[str, Any]:
        """The position after the last batch returned; bytes, or a dict JSON can hold."""

    def set_state(self, state: bytes | dict[str, Any]) -> None:
        """Goes to a position that ``get_state`` returned."""


class BatchSpec(NamedTuple):
    """One kind of training batch, without its content.

    Attributes:
      name: of the kind.
      share: of the batches that are of this kind.
      arrays: name -> shape and dtype of the whole batch, over all processes.
    """

    name: str
    share: float
    arrays: Mapping[str, jax.ShapeDtypeStruct]


class System(Protocol):
    """A model, its losses and its data, as pure functions for the trainer.

    Required:

    * ``weights``: ``{term: number | ScheduleConfig | fn(step)}``. A loss term without a weight (or
      with ``None``) is logged only. A phase may replace entries.
    * ``frozen``: pytree of arrays that are an argument of the step, never differentiated, donated,
      checkpointed or in the optimizer (e.g. ``{"reader": params}``; ``{}`` if there is none).
    * ``logical_rules``: ``((regex, axes), ...)`` over parameter paths, see `latent_jax.sharding`.
      They apply to ``params``, the collections (path without the collection's name) and ``frozen``
      (path from its root, e.g. ``reader/layers/q/kernel``); optimizer moments follow their
      parameter.
    * the methods below.

    Optional attributes (the trainer uses them when they exist):

    * ``rng_names: tuple[str, ...]``: names of the keys in ``rngs`` (default
      ``("dropout", "sample")``); a fresh key per name, step and micro-batch.
    * ``rates: Mapping[str, ScheduleConfig | fn(step)]``: other numbers that change over the steps,
      such as a dropout rate. Where there are any, ``loss_terms`` gets the present ones as the
      keyword ``rates`` (``{name: scalar}``), and each is logged as ``rate.<name>``.
    * ``unit_counts(batch) -> dict[str, int]``: what a (numpy) batch holds, e.g.
      ``{"tokens": 4096}``, for throughput.
    * ``quick_eval(variables, frozen) -> dict[str, float]``: called every ``train.eval_every``
      steps; logged as ``eval.<name>`` and usable as ``train.checkpoint.metric``.
    * ``guards: tuple[GuardConfig, ...]``: added to ``train.guards``.
    * ``begin_phase(phase, start, variables, frozen, out) -> bool``: called with a `PhaseConfig`
      where it begins, at step ``start``, and again where training resumes in its middle, before its
      data is asked for: what that depends on of the parameters is made here, under ``out``. True:
      the data is to be opened anew.
    * ``batch_specs(phase) -> tuple[BatchSpec, ...]``: the kinds of batches that ``train_data`` of a
      phase may give, so that a run can be planned without its data (``()``: they must be read).
    * ``init_shapes(batch) -> variables``: shapes of what ``init`` returns, where that cannot be
      traced.
    * ``evaluates_in_parts: bool``: ``evaluate`` also takes ``parts`` (`core.parts.Parts`), which
      keeps what is finished of an evaluation that is stopped.
    * ``notify: Callable[[str], None] | None``: the trainer puts here what shows a line to whoever
      waits, for data that takes minutes to prepare.
    * ``findings(results, samples, log) -> Sequence[str]``, static: what is known to be wrong with a
      run, a line each, from what it left behind; stands in its report.
    * ``notes: Sequence[str]``: what a person should know of the configuration, a line each: said
      when training starts, by a dry run and beside the results.
    * ``jit_init: bool``: set False if ``init`` must run outside jit (it reads files or large
      constants such as pretrained weights).
    """

    weights: Mapping[str, Any]
    frozen: PyTree
    logical_rules: Any

    def init(self, rngs: Mapping[str, jax.Array], batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns fresh variables: ``{"params": ..., **collections}``, nested plain dicts.

        Args:
          rngs: ``{"params": key}`` plus a key per ``rng_names``.
          batch: one batch, for shapes only (may be abstract under ``eval_shape``).
        """

    def param_labels(self, params: PyTree) -> PyTree:
        """Returns a tree of group labels (str) with the structure of ``params``.

        The label ``"frozen"`` means: no gradient, no update, no optimizer state. The other labels
        name optimizer groups (``train.optimizer.groups``) and what phases train or freeze.
        """

    def loss_terms(
        self,
        variables: Mapping[str, Any],
        frozen: PyTree,
        batch: Mapping[str, Any],
        rngs: Mapping[str, jax.Array],
        train: bool,
    ) -> tuple[dict[str, Mean], dict[str, Any], dict[str, Any]]:
        """Computes the loss terms of one (micro-)batch. Pure; it is traced by jit.

        Returns:
          terms: ``{name: Mean(sum, count)}``. The loss is ``Σ weight(step) · sum/count`` with the
            count treated as a constant. With accumulation sums and counts are pooled over
            micro-batches first, so that the result equals the whole batch's.
          collections: the collections that changed (``{}`` if none); they replace the old ones.
          aux: scalars (arrays or `Mean`) that are logged and may be monitored by gates and guards.
        """

    def train_data(self, phase: str, start_state: Any) -> DataIterator:
        """Returns the endless training iterator of a phase's ``data`` name (default ``"main"``).

        Args:
          phase: the phase's ``data`` field.
          start_state: ``None``, or what ``get_state`` returned (the iterator continues there).
        """

    def eval_data(self) -> Any:
        """Returns the held-out data (the trainer passes it on, it never reads it)."""

    def evaluate(
        self, variables: Mapping[str, Any], frozen: PyTree, progress: Any = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns final metrics (flat, dotted names) and artefacts (samples, arrays)."""
