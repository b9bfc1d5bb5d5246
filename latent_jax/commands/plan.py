"""`--dry-run`: what a run would hold in memory, from shapes alone. Nothing is compiled."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from rich.table import Table

from latent_jax.core import rng, trees
from latent_jax.core.types import PyTree
from latent_jax.report.tables import size
from latent_jax.sharding import make_mesh, tree_shardings
from latent_jax.sharding.mesh import batch_shards, check_batch
from latent_jax.train.optimizers import GroupedOptimizer
from latent_jax.train.phases import phase_at
from latent_jax.train.step import DEFAULT_RNGS


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes by part: in all, and on the fullest device.

    Attributes:
      parts: name → (parameters or None, bytes, bytes per device).
      devices: how many devices the mesh has.
    """

    parts: dict[str, tuple[int | None, int, int]]
    devices: int

    @property
    def per_device(self) -> int:
        """Bytes on a device, all parts together."""
        return sum(part[2] for part in self.parts.values())

    def table(self) -> Table:
        """The plan as a terminal table."""
        grid = Table(title=f"Memory plan, {self.devices} device(s)", title_justify="left")
        for column in ("", "parameters", "bytes", "per device"):
            grid.add_column(column, justify="left" if not column else "right")
        for name, (count, whole, each) in self.parts.items():
            grid.add_row(name, "" if count is None else f"{count:,}", size(whole), size(each))
        grid.add_row("all", "", "", size(self.per_device), style="bold")
        return grid


def plan(config: Any, system: Any) -> Plan:
    """Sizes of everything that training holds.

    Activations are what the backward pass keeps of one micro-batch, before XLA fuses anything: an
    upper bound, without the workspace of single operations.
    """
    mesh = make_mesh(config.mesh)
    check_batch(config.train.batch_size, mesh)
    _, phase = phase_at(config.train, 0)
    batch = dict(next(iter(system.train_data(phase.data, None))))
    names = tuple(getattr(system, "rng_names", DEFAULT_RNGS))
    rngs = rng.named(config.seed, ("params", *names))
    variables = _variables(system, rngs, batch)
    params = variables["params"]
    labels = system.param_labels(params)
    optimizer = GroupedOptimizer.create(config.train.optimizer, labels, config.train.steps)
    moments = jax.eval_shape(optimizer.init, params)
    rules = system.logical_rules

    flat_labels = trees.flatten(labels)
    trained = {p: x for p, x in trees.flatten(params).items() if flat_labels[p] != "frozen"}
    parts: dict[str, tuple[int | None, int, int]] = {}

    def add(name: str, tree: PyTree, counted: bool = True) -> None:
        shardings = tree_shardings(tree, rules, mesh)
        each = sum(
            _bytes(leaf, where.shard_shape(tuple(leaf.shape)))
            for leaf, where in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
        )
        whole = sum(_bytes(leaf) for leaf in jax.tree.leaves(tree))
        count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
        parts[name] = (count if counted else None, whole, each)

    add("frozen", system.frozen)
    add("trained parameters", trees.unflatten(trained))
    held = {p: x for p, x in trees.flatten(params).items() if p not in trained}
    if held:
        add("held parameters", trees.unflatten(held))
    collections_ = {k: v for k, v in variables.items() if k != "params"}
    if jax.tree.leaves(collections_):
        add("collections", collections_)
    whole, each = parts["trained parameters"][1:]
    parts["gradients"] = (None, whole, each)
    moment_bytes = sum(_bytes(leaf) for leaf in jax.tree.leaves(moments))
    # Moments follow their parameters' sharding.
    parts["optimizer state"] = (None, moment_bytes, int(moment_bytes * each / max(whole, 1)))
    shards = batch_shards(mesh)
    batch_bytes = sum(_bytes(leaf) for leaf in batch.values())
    parts["batch"] = (None, batch_bytes, -(-batch_bytes // shards))
    micro = {k: v[: -(-len(v) // config.train.accumulate)] for k, v in batch.items()}
    kept = _activations(system, variables, micro, {n: rngs[n] for n in names})
    parts["activations (upper bound)"] = (None, kept, -(-kept // shards))
    return Plan(parts, mesh.size)


def _variables(system: Any, rngs: Any, batch: Mapping[str, Any]) -> Any:
    try:
        return jax.eval_shape(lambda r: system.init(r, batch), rngs)
    except (jax.errors.JAXTypeError, TypeError):
        if getattr(system, "jit_init", True):
            raise
        return system.init(rngs, batch)  # needs values, such as statistics of the data


def _activations(system: Any, variables: Any, batch: Any, rngs: Any) -> int:
    """Bytes that the backward pass keeps: the residuals of the vector-Jacobian product."""
    weights = [name for name, weight in system.weights.items() if weight is not None]

    def residuals(params: PyTree, frozen: PyTree, batch: Any, rngs: Any) -> Any:
        def loss(params: PyTree) -> Any:
            terms, _, _ = system.loss_terms(
                {**variables_rest, "params": params}, frozen, batch, rngs, True
            )
            return sum(term.value for name, term in terms.items() if name in weights)

        return jax.vjp(loss, params)[1]

    variables_rest = {
        k: jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), v)
        for k, v in variables.items()
        if k != "params"
    }
    kept = jax.eval_shape(residuals, variables["params"], system.frozen, batch, rngs)
    # Parameters and inputs among the residuals are there anyway.
    known = collections.Counter(
        (tuple(x.shape), str(x.dtype))
        for x in jax.tree.leaves((variables["params"], system.frozen, batch))
    )
    total = 0
    for leaf in jax.tree.leaves(kept):
        key = (tuple(leaf.shape), str(leaf.dtype))
        if known[key]:
            known[key] -= 1
        else:
            total += _bytes(leaf)
    return total


def _bytes(leaf: Any, shape: tuple[int, ...] | None = None) -> int:
    shape = tuple(leaf.shape) if shape is None else shape
    itemsize = getattr(leaf.dtype, "itemsize", 4)
    return int(np.prod(shape, dtype=np.int64)) * itemsize
