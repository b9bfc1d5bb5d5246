"""`latent-jax plan` and `--dry-run`: what a run would hold and compute, from shapes alone."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Console
from rich.table import Table

from latent_jax import run as runs
from latent_jax.backbones import skeleton
from latent_jax.backbones.config import BackboneConfig
from latent_jax.commands.chips import chip as chip_named
from latent_jax.core.errors import ConfigError
from latent_jax.report.tables import size
from latent_jax.sharding import abstract_mesh
from latent_jax.train.footprint import Footprint, footprint


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices of a plan.

    Attributes:
      count: how many.
      hbm: memory of each, GiB; None if it is not known.
      peak: dense products of each at their best, 1e12 operations/s; None if it is not known.
      mfu: share of it that the step reaches.
    """

    count: int
    hbm: float | None = None
    peak: float | None = None
    mfu: float = 0.4

    @classmethod
    def of(
        cls, count: int, chip: str | None, hbm: float | None, peak: float | None, mfu: float
    ) -> Machine:
        """From the command line: a chip's figures, replaced by those that are given.

        Raises:
          ConfigError: figures out of range, or a chip that is not known.
        """
        known = (None, None) if chip is None else chip_named(chip)
        hbm, peak = known[0] if hbm is None else hbm, known[1] if peak is None else peak
        for name, value in (("--devices", count), ("--hbm", hbm), ("--peak", peak), ("--mfu", mfu)):
            if value is not None and value <= 0:
                raise ConfigError(f"{name} = {value}: allowed: more than 0")
        if mfu > 1:
            raise ConfigError(f"--mfu = {mfu}: allowed: at most 1, a share of the peak")
        return cls(count, hbm, peak, mfu)


def plan(config: Any, machine: Machine) -> Footprint:
    """Plans a run on a machine that need not be there; no weight is loaded.

    Raises:
      MeshError: the mesh or the batch does not divide.
      BackboneError: a backbone whose architecture is not known here.
    """
    mesh = abstract_mesh(config.mesh, machine.count)
    return footprint(config, outlined(config), mesh, *without_remat(config))


def outlined(config: Any) -> Any:
    """A run's system around a backbone without weights, where it has one."""
    made = runs.system_class(config.system)
    wanted = getattr(config, "backbone", None)
    return made(config, skeleton(wanted)) if isinstance(wanted, BackboneConfig) else made(config)


def without_remat(config: Any) -> tuple[Any, int]:
    """The system that recomputes nothing, and its layers; (None, 1) where the run is that one."""
    model = getattr(config, "model", None)
    if not getattr(model, "remat", False):
        return None, 1
    bare = outlined(dataclasses.replace(config, model=dataclasses.replace(model, remat=False)))
    return bare, bare.backbone.config.num_layers


def show(found: Footprint, out: Console, machine: Machine, table: bool = False) -> None:
    """Prints a plan; with ``table`` every array, too."""
    if table:
        out.print(arrays_table(found))
    out.print(memory_table(found, machine))
    out.print(steps_table(found, machine))
    for line in notes(found, machine):
        out.print(line, markup=False)


def memory_table(found: Footprint, machine: Machine) -> Table:
    """Bytes by part."""
    shape = " x ".join(f"{name} {count}" for name, count in found.mesh.shape.items())
    idle = machine.count - found.mesh.size
    unused = f" ({idle} unused)" if idle else ""
    grid = _grid(
        f"Memory plan, {found.mesh.size} device(s): {shape}{unused}",
        "", "parameters", "bytes", "per device",
    )  # fmt: skip
    for name, (count, whole, each) in found.parts.items():
        counted = count if name.endswith(("parameters", "frozen")) else None
        grid.add_row(
            name, "" if counted is None else f"{counted:,}", "" if whole is None else size(whole),
            size(each),
        )  # fmt: skip
    grid.add_row("all", "", "", size(found.per_device), style="bold")
    return grid


def steps_table(found: Footprint, machine: Machine) -> Table:
    """Operations and time of a step, by phase and kind of batch."""
    grid = _grid("A step", "phase", "batch", "share", "TFLOP", "activations", "time", right=2)
    for step in found.steps:
        total = sum(other.share for other in found.steps if other.phase == step.phase)
        grid.add_row(
            step.phase, step.kind, f"{step.share / total:.0%}", f"{step.flops / 1e12:,.3g}",
            size(step.kept), _time(step.flops, found, machine),
        )  # fmt: skip
    return grid


def _time(flops: float, found: Footprint, machine: Machine) -> str:
    if machine.peak is None:
        return ""
    seconds = flops / (found.mesh.size * machine.peak * 1e12 * machine.mfu)
    return f"{1e3 * seconds:,.3g} ms" if seconds < 1 else f"{seconds:,.3g} s"


def notes(found: Footprint, machine: Machine) -> list[str]:
    """What the figures mean, and whether the run fits."""
    lines = [
        "FLOP: 2mnk of every matrix product in the step's trace: 4N per token through frozen "
        "weights, 6N through trained ones, attention, and what is recomputed",
        "activations: residuals of the backward pass of one micro-batch before fusion, split over "
        "data x fsdp",
    ]
    if machine.peak is not None:
        lines.append(
            f"time: FLOP / ({found.mesh.size} x {machine.peak:g} TFLOP/s x {machine.mfu:g})"
        )
    if found.collectives:
        each = (f"{c.kind} over {' and '.join(c.axes)} ({c.why})" for c in found.collectives)
        lines.append(f"exchanges: {', '.join(each)}")
    fits = fit_line(found, machine.hbm)
    return [*lines, fits] if fits else lines


def fit_line(found: Footprint, hbm: float | None) -> str | None:
    """One line: whether a device's memory (GiB) holds the plan."""
    if hbm is None:
        return None
    need, room = found.per_device, hbm * 2**30
    if need <= room:
        return f"fits: {_gib(need)} of {hbm:.4g} GiB on each device ({need / room:.0%})"
    name, each = max(((k, v[2]) for k, v in found.parts.items()), key=lambda part: part[1])
    cure = (
        "a larger train.accumulate, model.remat=true, a losses.chunk or a smaller train.batch_size"
        if name in ("batch", "activations (upper bound)", "a layer recomputed")
        else "a larger mesh.fsdp or mesh.tensor, or backbone.dtype=bfloat16"
    )
    return (
        f"warning: does not fit: {_gib(need)} of {hbm:.4g} GiB on each device ({need / room:.0%}); "
        f"most of it: {name}, {_gib(each)} GiB; try {cure}"
    )


def _gib(count: float) -> str:
    return f"{count / 2**30:.3g}"


def arrays_table(found: Footprint) -> Table:
    """Every array: logical axes, how it is split, bytes on each device."""
    grid = _grid(
        "Arrays", "part", "path", "shape", "logical axes", "split over", "per device", right=5
    )
    for row in found.rows:
        axes = ", ".join("+".join(a) if isinstance(a, tuple) else str(a or "-") for a in row.axes)
        shape = "x".join(map(str, row.shape)) or "scalar"
        grid.add_row(row.part, row.path, shape, axes or "-", row.spec, size(row.each))
    return grid


def _grid(title: str, *columns: str, right: int = 1) -> Table:
    grid = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        grid.add_column(column, justify="right" if i >= right else "left", overflow="fold")
    return grid
