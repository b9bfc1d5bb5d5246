"""The device mesh ``data x fsdp x tensor`` and how batches lie on it."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from latent_jax.core.config import field
from latent_jax.core.errors import ConfigError, MeshError

AXES = ("data", "fsdp", "tensor")
# The mesh axes the batch dimension is split over: fsdp shards the weights *and* the batch.
BATCH_AXES = ("data", "fsdp")

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How the devices are arranged."""

    data: int = field(default=-1, ge=-1, help="replicas of the weights; -1: all devices left over")
    fsdp: int = field(default=1, ge=-1, help="devices that share one copy of the weights")
    tensor: int = field(default=1, ge=-1, help="devices that share one matrix product")
    require: Literal["cpu", "gpu", "tpu"] | None = field(
        default=None, help="stop at once unless JAX sees this kind of device"
    )

    def validate(self) -> None:
        """Rejects a zero axis and more than one -1."""
        for axis in AXES:
            if getattr(self, axis) == 0:
                raise ConfigError(f"{axis} = 0: allowed: 1 or more devices, or -1 for the rest")
        if self.shape.count(-1) > 1:
            sizes = ", ".join(f"{a} = {n}" for a, n in zip(AXES, self.shape, strict=True))
            raise ConfigError(f"{sizes}: only one axis can be -1 (the devices left over)")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Sizes in the order of `AXES`, with -1 unresolved."""
        return (self.data, self.fsdp, self.tensor)


def make_mesh(
    config: MeshConfig | None = None, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Builds the mesh.

    With one axis at -1 all devices are used. With all three given, a mesh that divides the devices
    of a single process uses the first of them, so that a run can be repeated on fewer devices.

    Args:
      config: the arrangement; default: all devices on ``data``.
      devices: default `jax.devices()`.

    Raises:
      MeshError: wrong kind of device, or a mesh that does not divide the devices.
    """
    config = MeshConfig() if config is None else config
    devices = list(_devices(config.require) if devices is None else devices)
    if config.require is not None:
        _require(config.require, devices)
    shape = _resolve(config.shape, len(devices))
    wanted = math.prod(shape)
    if wanted < len(devices):
        _log.info("mesh %s uses %d of %d devices", "x".join(map(str, shape)), wanted, len(devices))
    # Auto, always: Explicit (jax's default) breaks Linen's logical constraints.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:wanted])


def abstract_mesh(config: MeshConfig, count: int) -> AbstractMesh:
    """The mesh that `make_mesh` would build of ``count`` devices, for planning: none is needed.

    Raises:
      MeshError: a mesh that does not divide the devices.
    """
    return AbstractMesh(_resolve(config.shape, count), AXES, axis_types=(AxisType.Auto,) * 3)


def _devices(require: str | None) -> list[jax.Device]:
    try:
        return jax.devices()
    except RuntimeError as error:  # a plugin that is installed but cannot start
        need = f"mesh.require = {require}: " if require else ""
        reason = " ".join(str(error).split())[:200]
        raise MeshError(f"{need}JAX cannot start its devices: {reason}") from None


def _require(kind: str, devices: Sequence[jax.Device]) -> None:
    platforms = sorted({d.platform for d in devices})
    seen = ["gpu" if p in ("cuda", "rocm") else p for p in platforms]
    if seen != [kind]:
        extra = {"gpu": "latent-jax[cuda]", "tpu": "latent-jax[tpu]"}.get(kind)
        hint = f"pip install '{extra}' on a machine with one, or " if extra else ""
        raise MeshError(
            f"mesh.require = {kind}: JAX sees {len(devices)} {'/'.join(platforms)} device(s) and "
            f"no {kind}; {hint}set mesh.require=null"
        )


def _resolve(shape: tuple[int, int, int], count: int) -> tuple[int, int, int]:
    text = "x".join(map(str, shape))
    fixed = math.prod(n for n in shape if n != -1)
    if -1 in shape:
        if count % fixed:
            axis = AXES[shape.index(-1)]
            raise MeshError(
                f"mesh data x fsdp x tensor = {text}: the other axes take {fixed} devices, "
                f"which does not divide {count}; allowed beside {axis} = -1: a product in "
                f"{_divisors(count)}"
            )
        return tuple(count // fixed if n == -1 else n for n in shape)  # type: ignore[return-value]
    if fixed == count or (fixed < count and count % fixed == 0 and jax.process_count() == 1):
        return shape
    rest = shape[1] * shape[2]
    fits = f"data = {count // rest}" if count % rest == 0 else "data = -1, fsdp = 1, tensor = 1"
    raise MeshError(
        f"mesh data x fsdp x tensor = {text} needs {fixed} devices and there are {count}; "
        f"what fits: {fits}, or any product in {_divisors(count)}"
    )


def _divisors(count: int) -> str:
    return ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The leading axis split over ``data`` and ``fsdp``."""
    return NamedSharding(mesh, P(tuple(a for a in BATCH_AXES if a in mesh.axis_names)))


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Number of pieces `batch_sharding` cuts the batch into."""
    return math.prod(mesh.shape[a] for a in BATCH_AXES if a in mesh.axis_names)


def check_batch(
    batch_size: int, mesh: Mesh | AbstractMesh, where: str = "train.batch_size"
) -> None:
    """Raises MeshError if a global batch does not split evenly over the mesh."""
    pieces = batch_shards(mesh)
    if batch_size % pieces:
        near = max(pieces, round(batch_size / pieces) * pieces)
        raise MeshError(
            f"{where} = {batch_size}: does not divide by data x fsdp = {pieces} devices; "
            f"allowed: multiples of {pieces}, e.g. {near}"
        )


def shard_batch(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Places a flat batch of host arrays on the mesh, the leading axis split.

    Args:
      batch: name -> array whose leading axis is *this process's* part of the batch.
      mesh: the mesh.

    Returns:
      name -> global jax.Array. In a single process a leading axis that does not divide (the last,
      short batch of an evaluation) is replicated instead.

    Raises:
      MeshError: several processes and a part that does not divide.
    """
    split, whole, pieces = batch_sharding(mesh), replicated(mesh), batch_shards(mesh)
    processes = jax.process_count()

    def place(name: str, value: Any) -> Any:
        if not isinstance(value, jax.Array):
            value = np.asarray(value)
        if value.ndim == 0:
            return jax.device_put(value, whole)
        rows = value.shape[0] * processes
        if processes == 1:
            return jax.device_put(value, whole if rows % pieces else split)
        check_batch(rows, mesh, where=f"global batch of {name!r}")
        return jax.make_array_from_process_local_data(split, np.asarray(value))

    return {name: place(name, value) for name, value in batch.items()}
