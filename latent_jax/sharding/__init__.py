"""Device meshes, path rules that shard arrays, and multi-process start-up.

Every array's place follows from three things a person can read: the mesh (`MeshConfig`), a table
of path regexes (`Rules`) and the logical axis names (`LOGICAL_AXES`).
"""

from __future__ import annotations

from latent_jax.sharding.collectives import Collective, collectives
from latent_jax.sharding.distributed import (
    await_processes,
    check_agreement,
    initialize_distributed,
)
from latent_jax.sharding.mesh import (
    AXES,
    MeshConfig,
    abstract_mesh,
    batch_sharding,
    check_batch,
    make_mesh,
    replicated,
    shard_batch,
)
from latent_jax.sharding.rules import (
    LOGICAL_AXES,
    Rules,
    constrain,
    follow_params,
    logical_axes,
    sharding_table,
    spec_for,
    tree_shardings,
)

__all__ = [
    "AXES",
    "LOGICAL_AXES",
    "Collective",
    "MeshConfig",
    "Rules",
    "abstract_mesh",
    "await_processes",
    "batch_sharding",
    "check_agreement",
    "check_batch",
    "collectives",
    "constrain",
    "follow_params",
    "initialize_distributed",
    "logical_axes",
    "make_mesh",
    "replicated",
    "shard_batch",
    "sharding_table",
    "spec_for",
    "tree_shardings",
]
