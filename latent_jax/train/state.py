"""The state of training: everything that a checkpoint must hold."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Int

from latent_jax.core.types import PyTree
from latent_jax.sharding import follow_params, replicated, tree_shardings


@flax.struct.dataclass
class TrainState:
    """Arrays that one training step replaces.

    Attributes:
      step: steps done; drives every schedule and random stream. Skipped steps count.
      params: trained parameters (and label-``frozen`` leaves of ``params``).
      collections: the other variables, e.g. EMA codebooks.
      opt_state: optimizer state per label, only for trained leaves.
      gates: adaptive curriculum state, see `latent_jax.train.curriculum`.
      guard: ``{"skipped": total, "in_a_row": n}`` non-finite steps.
    """

    step: Int[Array, ""]
    params: PyTree
    collections: dict[str, PyTree]
    opt_state: PyTree
    gates: PyTree
    guard: dict[str, Int[Array, ""]]

    @property
    def variables(self) -> dict[str, Any]:
        """What Linen's ``apply`` takes: ``{"params": params, **collections}``."""
        return {"params": self.params, **self.collections}


def create_state(variables: dict[str, Any], opt_state: PyTree, gates: PyTree) -> TrainState:
    """Returns the state at step 0 for fresh variables."""
    collections = {k: v for k, v in variables.items() if k != "params"}
    # One array each: the step donates them, and a buffer cannot be donated twice.
    guard = {name: jnp.zeros((), jnp.int32) for name in ("skipped", "in_a_row")}
    step = jnp.zeros((), jnp.int32)
    return TrainState(step, variables["params"], collections, opt_state, gates, guard)


def state_shardings(
    abstract: TrainState, rules: Any, mesh: Mesh | AbstractMesh
) -> TrainState:
    """Returns a TrainState of NamedShardings.

    Parameters and collections follow the logical rules. An optimizer leaf takes the sharding of the
    parameter it belongs to (its path ends with the parameter's path and the shapes agree), so that
    moments are never left on one device; the rest is replicated.
    """
    params = tree_shardings(abstract.params, rules, mesh)
    collections = {k: tree_shardings(v, rules, mesh) for k, v in abstract.collections.items()}
    everywhere = replicated(mesh)
    return TrainState(
        step=everywhere,
        params=params,
        collections=collections,
        opt_state=follow_params(abstract.opt_state, abstract.params, params, mesh),
        gates=jax.tree.map(lambda _: everywhere, abstract.gates),
        guard=jax.tree.map(lambda _: everywhere, abstract.guard),
    )
