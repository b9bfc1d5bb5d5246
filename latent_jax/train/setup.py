"""From a system and a config to a sharded TrainState."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from latent_jax.core import rng as rng_lib
from latent_jax.core import trees
from latent_jax.core.errors import ConfigError
from latent_jax.core.types import PyTree
from latent_jax.sharding import shard_batch
from latent_jax.train.config import RunBase
from latent_jax.train.curriculum import init_gates, watched
from latent_jax.train.optimizers import FROZEN, GroupedOptimizer
from latent_jax.train.protocol import System
from latent_jax.train.state import TrainState, create_state, state_shardings
from latent_jax.train.step import DEFAULT_RNGS, rates_at


@dataclasses.dataclass(frozen=True)
class StatePlan:
    """What the state will be, before any of it is made.

    Attributes:
      abstract: TrainState of shapes and dtypes.
      shardings: TrainState of NamedShardings.
      optimizer: the grouped optimizer over the system's labels.
      create: makes the state at step 0, each array directly on its sharding.
    """

    abstract: TrainState
    shardings: TrainState
    optimizer: GroupedOptimizer
    create: Callable[[], TrainState]


def abstract_state(
    system: System, config: RunBase, mesh: Mesh | AbstractMesh, variables: dict[str, Any]
) -> tuple[TrainState, TrainState, GroupedOptimizer]:
    """Shapes of the state, its shardings and its optimizer, from the variables' shapes."""
    optimizer = GroupedOptimizer.create(
        config.train.optimizer, system.param_labels(variables["params"]), config.train.steps
    )
    abstract = jax.eval_shape(lambda v: _fresh(system, config, optimizer, v), variables)
    return abstract, state_shardings(abstract, system.logical_rules, mesh), optimizer


def _fresh(
    system: System, config: RunBase, optimizer: GroupedOptimizer, variables: dict[str, Any]
) -> TrainState:
    """The state at step 0."""
    tables = (system.weights, *(phase.weights for phase in config.train.phases))
    return create_state(variables, optimizer.init(variables["params"]), init_gates(*tables))


def plan_state(
    system: System, config: RunBase, mesh: Mesh, batch: Mapping[str, Any]
) -> StatePlan:
    """Plans the state of a run.

    Args:
      system: what is trained.
      config: the run.
      mesh: where.
      batch: one (host) batch, for shapes.
    """
    names = ("params", *getattr(system, "rng_names", DEFAULT_RNGS))
    rngs = rng_lib.named(config.seed, names)
    batch = shard_batch(batch, mesh)
    in_jit = getattr(system, "jit_init", True)
    if in_jit:
        variables = jax.eval_shape(lambda r: system.init(r, batch), rngs)
    else:
        variables = jax.tree.map(jnp.asarray, system.init(rngs, batch))
    abstract, shardings, optimizer = abstract_state(system, config, mesh, variables)

    def fresh(variables: dict[str, Any]) -> TrainState:
        return _fresh(system, config, optimizer, variables)

    def create() -> TrainState:
        if in_jit:
            make = jax.jit(lambda r: fresh(system.init(r, batch)), out_shardings=shardings)
            return make(rngs)
        # Copied: the step donates the state, and init may hand out arrays that it shares.
        own = jax.jit(lambda v: fresh(jax.tree.map(jnp.copy, v)), out_shardings=shardings)
        return own(variables)

    return StatePlan(abstract, shardings, optimizer, create)


def describe_params(params: PyTree, optimizer: GroupedOptimizer, frozen: PyTree) -> str:
    """One line for start-up: trained parameters per label, and what is frozen."""
    counts = {
        name: trees.count_params(optimizer.select(params, (name,))) for name in optimizer.names
    }
    held = trees.count_params(optimizer.select(params, (FROZEN,))) + trees.count_params(frozen)
    parts = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    return f"trained parameters {sum(counts.values()):,} ({parts}); frozen {held:,}"


def check_gates(
    system: System, config: RunBase, variables: PyTree, batches: Sequence[Mapping[str, Any]]
) -> None:
    """Refuses gates and auto-scales that look at what no batch gives. Traces, compiles nothing.

    Args:
      system: what is trained.
      config: the run.
      variables: or their shapes.
      batches: one of every kind that training reads, or their shapes.

    Raises:
      ConfigError: what is looked at, and what there is.
    """
    tables = (system.weights, *(phase.weights for phase in config.train.phases))
    wanted = watched(*tables)
    if not wanted:
        return
    names = tuple(getattr(system, "rng_names", DEFAULT_RNGS))

    def observed(variables: Any, frozen: Any, batch: Any) -> dict[str, Any]:
        rngs, now = rng_lib.named(config.seed, names, 0), rates_at(system, 0)
        terms, _, aux = system.loss_terms(variables, frozen, batch, rngs, True, **now)
        return {**aux, **terms}

    found: set[str] = set()
    for batch in batches:
        found |= set(jax.eval_shape(observed, variables, system.frozen, dict(batch)))
    for setting, name in wanted:
        if name not in found:
            raise ConfigError(
                f"{setting}: no loss term or aux value {name!r}; there are: "
                + ", ".join(sorted(found))
            )
