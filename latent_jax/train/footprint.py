"""What a run will hold on each device and compute in each step, from shapes alone."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from latent_jax.core import rng as rng_lib
from latent_jax.core import trees
from latent_jax.core.flops import matmul_flops
from latent_jax.core.types import PyTree
from latent_jax.sharding import (
    Collective,
    collectives,
    logical_axes,
    sharding_table,
    tree_shardings,
)
from latent_jax.sharding.mesh import batch_shards, check_batch
from latent_jax.train.config import PhaseConfig, RunBase
from latent_jax.train.optimizers import GroupedOptimizer
from latent_jax.train.phases import active_labels
from latent_jax.train.protocol import BatchSpec, System
from latent_jax.train.setup import abstract_state, check_gates
from latent_jax.train.state import TrainState
from latent_jax.train.step import DEFAULT_RNGS, rates_at, weighted


class ArrayRow(NamedTuple):
    """One array of a run.

    Attributes:
      part: ``frozen``, ``trained parameters``, …
      path: in its tree.
      axes: logical names of its last dimensions, as the rule says.
      spec: mesh axes that it is split over.
      whole: its bytes.
      each: bytes on each device.
    """

    part: str
    path: str
    shape: tuple[int, ...]
    axes: tuple[Any, ...]
    spec: str
    whole: int
    each: int

    @property
    def count(self) -> int:
        """Numbers in it."""
        return int(np.prod(self.shape, dtype=np.int64))


class StepCost(NamedTuple):
    """What a step on one kind of batch takes.

    Attributes:
      phase: name of the phase.
      kind: of batch, and ``share``, how many of the phase's batches are of it.
      flops: matrix products of all devices (`latent_jax.core.flops`), recomputed ones included.
      batch: bytes of the batch on each device.
      kept: bytes that the backward pass of one micro-batch keeps on each device: the residuals of
        its trace, before XLA fuses anything, split as the batch is. An upper bound.
      working: bytes of the layer that is being recomputed.
    """

    phase: str
    kind: str
    share: float
    flops: float
    batch: int
    kept: int
    working: int

    @property
    def each(self) -> int:
        """Bytes on each device while the step runs."""
        return self.batch + self.kept + self.working


@dataclasses.dataclass(frozen=True)
class Footprint:
    """A run on a mesh.

    Attributes:
      mesh: where.
      rows: every array that lives from step to step, and the gradients.
      steps: what a step takes, by phase and kind of batch.
      gathered: bytes on a device for the weights of one layer (or one table) while it is computed,
        where weights are sharded over ``fsdp``.
      collectives: what the devices may exchange in a step, and nothing else.
    """

    mesh: Mesh | AbstractMesh
    rows: tuple[ArrayRow, ...]
    steps: tuple[StepCost, ...]
    gathered: int
    collectives: tuple[Collective, ...]

    @property
    def parts(self) -> dict[str, tuple[int | None, int | None, int]]:
        """``{part: (numbers, bytes, bytes on each device)}``; together they are what must fit."""
        found: dict[str, tuple[int | None, int | None, int]] = {}
        for row in self.rows:
            count, whole, each = found.get(row.part, (0, 0, 0))
            found[row.part] = (count + row.count, whole + row.whole, each + row.each)
        worst = max(self.steps, key=lambda step: step.each)
        found["batch"] = (None, None, worst.batch)
        found["activations (upper bound)"] = (None, None, worst.kept)
        if worst.working:
            found["a layer recomputed"] = (None, None, worst.working)
        if self.gathered:
            found["a layer's weights gathered"] = (None, None, self.gathered)
        return found

    @property
    def per_device(self) -> int:
        """Bytes on a device, all parts together."""
        return sum(each for _, _, each in self.parts.values())


def footprint(
    config: RunBase,
    system: System,
    mesh: Mesh | AbstractMesh,
    plain: System | None = None,
    layers: int = 1,
) -> Footprint:
    """Plans a run: `jax.eval_shape` and a trace of the step; nothing is compiled or allocated.

    Args:
      config: the run.
      system: what is trained; its ``frozen`` may be shapes.
      mesh: where; may be abstract.
      plain: the same system without recomputation, to tell what a layer of it takes.
      layers: how many layers recompute one after the other.

    Raises:
      MeshError: the batch does not divide over the mesh.
      ConfigError: a phase that trains nothing, labels that are not there, or a gate on what no
        batch gives.
    """
    cfg = config.train
    check_batch(cfg.batch_size, mesh)
    phases = [phase for phase in cfg.phases if not phase.skip] or [PhaseConfig()]
    specs = {name: _specs(system, name) for name in dict.fromkeys(p.data for p in phases)}
    first = specs[phases[0].data][0]
    variables = variable_shapes(system, config.seed, first.arrays)
    check_gates(system, config, variables, [s.arrays for found in specs.values() for s in found])
    state, shardings, optimizer = abstract_state(system, config, mesh, variables)
    rules = system.logical_rules
    rows = tuple(_rows(system, optimizer, state, shardings, mesh, cfg.accumulate))
    kinds = [(phase, spec) for phase in phases for spec in specs[phase.data]]
    steps = [_cost(config, system, optimizer, *kind, state, mesh) for kind in kinds]
    if plain is not None:  # of the largest step: one more trace
        worst = max(range(len(steps)), key=lambda i: steps[i].kept)
        bare = _cost(config, plain, optimizer, *kinds[worst], state, mesh)
        saved = max(0, bare.kept - steps[worst].kept)
        steps[worst] = steps[worst]._replace(working=saved // layers)
    held = (system.frozen, state.params, state.collections)
    splits = [place.spec for place in jax.tree.leaves(tree_shardings(held, rules, mesh))]
    exchanged = collectives(mesh, splits)
    return Footprint(mesh, rows, tuple(steps), _gathered(rows, mesh), exchanged)


def variable_shapes(system: System, seed: int, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Shapes of what ``system.init`` returns."""
    if hasattr(system, "init_shapes"):
        return system.init_shapes(batch)
    names = ("params", *getattr(system, "rng_names", DEFAULT_RNGS))
    return jax.eval_shape(lambda b: system.init(rng_lib.named(seed, names), b), dict(batch))


def _specs(system: System, data: str) -> tuple[BatchSpec, ...]:
    """The kinds of batches of a phase; the first of its data stands for them where it must."""
    found = system.batch_specs(data) if hasattr(system, "batch_specs") else ()
    if found:
        return found
    batch = next(iter(system.train_data(data, None)))
    arrays = {k: jax.ShapeDtypeStruct(np.shape(v), np.asarray(v).dtype) for k, v in batch.items()}
    return (BatchSpec(data, 1.0, arrays),)


def _rows(
    system: System, optimizer: GroupedOptimizer, state: TrainState, shardings: TrainState,
    mesh: Mesh | AbstractMesh, accumulate: int,
) -> Iterator[ArrayRow]:
    rules = system.logical_rules

    def table(part: str, tree: PyTree, places: PyTree, times: int = 1) -> Iterator[ArrayRow]:
        axes, leaves = logical_axes(tree, rules), trees.flatten(tree)
        for path, shape, spec, each in sharding_table(tree, places):
            whole = trees.bytes_of(leaves[path])
            yield ArrayRow(part, path, shape, axes[path], spec, times * whole, times * each)

    yield from table("frozen", system.frozen, tree_shardings(system.frozen, rules, mesh))
    trained, held = optimizer.split(state.params, optimizer.names)
    places, held_places = optimizer.split(shardings.params, optimizer.names)
    yield from table("trained parameters", trained, places)
    yield from table("held parameters", held, held_places)
    yield from table("collections", state.collections, shardings.collections)
    yield from table("optimizer state", state.opt_state, shardings.opt_state)
    # With micro-batches there is the sum and what is added to it.
    yield from table("gradients", trained, places, 2 if accumulate > 1 else 1)


def _cost(
    config: RunBase, system: System, optimizer: GroupedOptimizer, phase: PhaseConfig,
    spec: BatchSpec, state: TrainState, mesh: Mesh | AbstractMesh,
) -> StepCost:
    """One trace of the loss and its gradient on a micro-batch, which is most of a step."""
    accumulate, shards = config.train.accumulate, batch_shards(mesh)
    micro = {
        name: jax.ShapeDtypeStruct((-(-x.shape[0] // accumulate), *x.shape[1:]), x.dtype)
        for name, x in spec.arrays.items()
    }
    names = tuple(getattr(system, "rng_names", DEFAULT_RNGS))
    weights = {**system.weights, **phase.weights}
    used = {name for name, weight in weights.items() if weight is not None}
    trained, held = optimizer.split(state.params, active_labels(phase, optimizer.names))

    def gradient(trained: PyTree, held: PyTree, rest: Any, frozen: PyTree, batch: Any) -> Any:
        def loss(part: PyTree) -> Any:
            variables = {**rest, "params": trees.merge(part, held)}
            rngs = rng_lib.named(0, names)
            now = rates_at(system, 0)
            terms, _, _ = system.loss_terms(variables, frozen, batch, rngs, True, **now)
            return sum(term.value for term in weighted(terms, used).values())

        value, pull = jax.vjp(loss, trained)
        return (value, pull(jnp.ones_like(value))), pull

    inputs = (trained, held, state.collections, system.frozen, micro)
    flops, residuals = matmul_flops(gradient, *inputs)
    # Parameters and inputs among the residuals are there anyway.
    known = Counter(_key(leaf) for leaf in jax.tree.leaves(inputs))
    kept = 0
    for leaf in jax.tree.leaves(residuals):
        if known[_key(leaf)]:
            known[_key(leaf)] -= 1
        else:
            kept += trees.bytes_of(leaf)
    size = trees.bytes_of(dict(spec.arrays))
    return StepCost(
        phase.name, spec.name, spec.share, accumulate * flops, -(-size // shards),
        -(-kept // shards), 0,
    )  # fmt: skip


def _key(leaf: Any) -> tuple[tuple[int, ...], str]:
    return tuple(leaf.shape), str(leaf.dtype)


def _gathered(rows: Iterable[ArrayRow], mesh: Mesh | AbstractMesh) -> int:
    """Bytes of what has to be brought together from ``fsdp`` to compute a layer, or a table."""
    layer = largest = 0
    for row in rows:
        if row.part not in ("frozen", "trained parameters") or "fsdp" not in row.spec:
            continue
        together = row.each * mesh.shape["fsdp"]
        if row.axes[:1] == ("layers",):
            layer += together // row.shape[0]
        else:
            largest = max(largest, together)
    return max(layer, largest)
