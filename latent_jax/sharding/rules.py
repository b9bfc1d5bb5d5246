"""Path rules: a table of ``(regex, axes)`` that a person can read, resolved to NamedShardings.

::

  RULES: Rules = (
      (r"embed$",                     ("vocab", "embed")),
      (r"(q|k|v|gate|up)/kernel$",    ("layers", "embed", "heads")),
      (r"(o|down)/kernel$",           ("layers", "heads", "embed")),
  )

The first regex found in an array's path wins; no match means replicated. The names are logical
(`LOGICAL_AXES`) or mesh axes, and belong to the array's *last* dimensions: an array with more
dimensions is replicated along the leading ones, one with fewer (a scalar counter) wholly. Because
the search is not anchored, Adam's moments (``0/mu/layers/q/kernel``) follow their parameter.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from latent_jax.core import trees
from latent_jax.core.types import PyTree

Axis = str | tuple[str, ...] | None
Rules = tuple[tuple[str, tuple[Axis, ...]], ...]

# logical name -> mesh axes. Everything a rule may say, in one place.
LOGICAL_AXES: dict[str, Axis] = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",  # the residual stream's width
    "vocab": "tensor",
    "heads": "tensor",  # attention heads times head size
    "kv_heads": "tensor",
    "mlp": "tensor",
    "layers": None,  # the axis that scan runs over
    "length": None,
    "latent": None,
    "rank": None,  # LoRA's inner axis
    "codes": None,
}


def _mesh_axes(name: Axis, mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """Resolves one entry of a rule to mesh axes."""
    if name is None:
        return ()
    if isinstance(name, tuple):
        return tuple(axis for part in name for axis in _mesh_axes(part, mesh))
    if name in mesh.axis_names:
        return (name,)
    if name in LOGICAL_AXES:
        target = LOGICAL_AXES[name]
        target = (target,) if isinstance(target, str) else target or ()
        return tuple(axis for axis in target if axis in mesh.axis_names)
    known = ", ".join([*mesh.axis_names, *LOGICAL_AXES])
    raise ValueError(f"sharding rule: unknown axis {name!r}; allowed: {known}")


def spec_for(shape: Sequence[int], axes: Sequence[Axis], mesh: Mesh | AbstractMesh) -> P:
    """Fits a rule's axes to a shape.

    A mesh axis is used at most once, and only where the dimension divides by it; a dimension that
    does not divide is replicated.

    Args:
      shape: the array's shape.
      axes: a rule's entries, for the last dimensions.
      mesh: the mesh.
    """
    if len(axes) > len(shape):
        return P()
    entries: list[Axis] = [None] * (len(shape) - len(axes))
    used: set[str] = set()
    for size, name in zip(shape[len(entries) :], axes, strict=True):
        kept: list[str] = []
        pieces = 1
        for axis in _mesh_axes(name, mesh):
            if axis in used or size % (pieces * mesh.shape[axis]):
                break  # a prefix of the axes is still a valid split
            kept.append(axis)
            pieces *= mesh.shape[axis]
        used.update(kept)
        entries.append(tuple(kept) if len(kept) > 1 else kept[0] if kept else None)
    while entries and entries[-1] is None:
        entries.pop()
    return P(*entries)


def logical_axes(tree: PyTree, rules: Rules) -> dict[str, tuple[Axis, ...]]:
    """``{path: axes}`` of every array in a tree: the first rule that matches, ``()`` for none."""
    rows = tuple((re.compile(pattern), axes) for pattern, axes in rules)
    return {
        path: next((axes for pattern, axes in rows if pattern.search(path)), ())
        for path in trees.paths(tree)
    }


def tree_shardings(tree: PyTree, rules: Rules, mesh: Mesh | AbstractMesh) -> PyTree:
    """Returns the NamedSharding of every array in a tree.

    Args:
      tree: arrays or abstract arrays (`jax.eval_shape`): parameters, optimizer state, TrainState.
      rules: the table; the first match wins.
      mesh: the mesh.
    """
    axes = logical_axes(tree, rules)

    def place(path: str, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, spec_for(leaf.shape, axes[path], mesh))

    return trees.map_with_path(place, tree)


def follow_params(
    tree: PyTree, params: PyTree, shardings: PyTree, mesh: Mesh | AbstractMesh
) -> PyTree:
    """Shards a tree that mirrors ``params`` (an optimizer state) like the parameters.

    A leaf whose path ends in a parameter's path and that has its shape takes its sharding, whatever
    the rules look like; everything else is replicated.
    """
    places = trees.flatten(shardings)
    known = {path: (leaf.shape, places[path]) for path, leaf in trees.flatten(params).items()}

    def place(path: str, leaf: Any) -> NamedSharding:
        parts = path.split("/")
        for start in range(len(parts)):  # longest suffix first
            shape, sharding = known.get("/".join(parts[start:]), (None, None))
            if shape == leaf.shape:
                return sharding
        return NamedSharding(mesh, P())

    return trees.map_with_path(place, tree)


def constrain(x: jax.Array, *axes: Axis) -> jax.Array:
    """Constrains an intermediate to logical axes under the current mesh (`jax.set_mesh`).

    Without a mesh it returns ``x``, so that a model runs unchanged outside the trainer.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec_for(x.shape, axes, mesh))


def sharding_table(tree: PyTree, shardings: PyTree) -> list[tuple[str, tuple[int, ...], str, int]]:
    """Lists (path, shape, spec, bytes on each device), for a person to read before a run."""
    places = trees.flatten(shardings)
    rows = []
    for path, leaf in trees.flatten(tree).items():
        sharding = places[path]
        local = jax.ShapeDtypeStruct(sharding.shard_shape(leaf.shape), leaf.dtype)
        names = ("+".join(e) if isinstance(e, tuple) else str(e or "-") for e in sharding.spec)
        spec = ", ".join(names)
        rows.append((path, tuple(leaf.shape), spec or "replicated", trees.bytes_of(local)))
    return rows
