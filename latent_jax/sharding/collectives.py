"""What devices have to tell each other in a step, from how its arrays are split."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from latent_jax.sharding.mesh import BATCH_AXES


class Collective(NamedTuple):
    """A kind of exchange (XLA's name), the mesh axes that it may go along, and what it carries."""

    kind: str
    axes: tuple[str, ...]
    why: str


def collectives(mesh: Mesh | AbstractMesh, specs: Iterable[P]) -> tuple[Collective, ...]:
    """Every kind of exchange that a training step may make; anything else is a mistake of layout.

    Args:
      mesh: the devices.
      specs: of frozen weights, parameters and collections.
    """
    split: set[str] = set()
    for spec in specs:
        for entry in spec:
            split |= set(entry) if isinstance(entry, tuple) else {entry}
    wide = [axis for axis in mesh.axis_names if mesh.shape[axis] > 1]
    batch = tuple(axis for axis in wide if axis in BATCH_AXES)
    found = []
    if batch:
        found.append(Collective("all-reduce", batch, "gradients and sums of losses"))
    if "fsdp" in wide and "fsdp" in split:
        found.append(Collective("all-gather", ("fsdp",), "a layer's weights"))
        found.append(Collective("reduce-scatter", ("fsdp",), "their gradients"))
    if "tensor" in wide and "tensor" in split:
        found.append(Collective("all-reduce", ("tensor",), "partial sums of matrix products"))
        found.append(Collective("all-gather", ("tensor",), "what it does not divide evenly"))
    return tuple(found)
