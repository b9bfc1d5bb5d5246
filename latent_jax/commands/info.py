"""`latent-jax info`: devices, versions, models and data that are at hand, and what is missing."""

from __future__ import annotations

import os
from collections.abc import Iterable

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from latent_jax.commands import info_checks as checks
from latent_jax.commands.info_checks import Problem
from latent_jax.commands.show import console
from latent_jax.core.errors import DataError, FetchError
from latent_jax.report.tables import size


def info() -> None:
    """Prints what a run on this machine would find, what is missing, and what gets it."""
    out = console()
    problems = [
        *_versions(out), *_devices(out), *_backbones(out), *data(out), *checks.writable(),
        *checks.peers(),
    ]  # fmt: skip
    _advice(out, problems)


def _grid(title: str, *columns: str) -> Table:
    grid = Table(title=title, title_justify="left", show_header=bool(columns))
    for column in columns or ("", ""):
        grid.add_column(column, overflow="fold")
    return grid


def _versions(out: Console) -> Iterable[Problem]:
    from latent_jax.report import record

    grid = _grid("Versions")
    for name, version in record.versions().items():
        grid.add_row(name, version)
    commit = record.commit()
    if commit:
        grid.add_row("commit", commit)
    out.print(grid)
    return checks.packages()


def _devices(out: Console) -> Iterable[Problem]:
    import jax

    from latent_jax.report import record

    grid, platforms, said = _grid("Devices", "device", "kind", "memory"), [], ""
    try:
        for device in jax.devices():
            limit = (device.memory_stats() or {}).get("bytes_limit")
            grid.add_row(str(device), device.device_kind, size(limit) if limit else "the machine's")
            platforms.append(device.platform)
    except RuntimeError as error:
        said = " ".join(str(error).split())[:120]
        grid.add_row("none", escape(said), "")
    machine, free = record.machine(), checks.available_memory()
    memory = size(machine["memory_bytes"]) if machine["memory_bytes"] else "unknown"
    memory += f", {size(free)} free" if free is not None else ""
    grid.add_row("machine", f"{machine['model']}, {machine['cores']} cores", memory)
    out.print(grid)
    return [*checks.devices(platforms, said), *checks.memory(free)]


def _backbones(out: Console) -> Iterable[Problem]:
    from latent_jax.backbones import registry
    from latent_jax.core import fetch
    from latent_jax.core.pins import PINS
    from latent_jax.systems.latentwire.assets import packaged

    grid = _grid("Models, compressors and data files", "name", "state", "what")
    for name, path in registry.PACKAGED.items():
        state = "in the package" if path.exists() else "missing"
        grid.add_row(name, state, "tiny reader for first steps and tests")
    for name in packaged():
        grid.add_row(name, "in the package", "trained LatentWire compressor, for smollm2")
    for name, item in PINS.items():
        what = f"{item.title} ({item.licence})"
        try:
            path = fetch.cached(name)
        except FetchError as error:
            grid.add_row(name, escape(str(error)), what)
            continue
        state = f"in the cache, {size(item.size)}" if path else "not in the cache"
        grid.add_row(name, state, what)
    out.print(grid)
    out.print(f"cache: {fetch.cache_dir()} (LATENT_JAX_CACHE)\n", markup=False)
    return checks.cache()


def data(out: Console) -> Iterable[Problem]:
    """Prints which data sources are at hand; returns what is wrong with the data folder."""
    from latent_jax.data import files, squad, text

    grid = _grid("Data", "source", "kind", "state")
    try:
        root = files.data_root()
    except DataError as error:
        out.print(str(error), markup=False)
        root = None
    grid.add_row("embedded", "questions, text", "in the package")
    grid.add_row("lookup", "questions", "generated")
    grid.add_row("pydoc", "text", "in Python")
    wanted = {"squad": (squad.SQUAD_FILES["train"], "questions")}
    wanted["qed"] = (squad.QED_FILES["train"], "questions")
    wanted |= {name: (path, "text") for name, path in text.ROOT_FILES.items()}
    found = {}
    for name, (relative, what) in wanted.items():
        found[name] = root is not None and files.has_file(relative, root)
        grid.add_row(name, what, "found" if found[name] else "not found")
    out.print(grid)
    where = os.environ.get(files.ENV_ROOT)
    out.print(f"data folder: {where or f'none ({files.ENV_ROOT} is not set)'}\n", markup=False)
    return checks.data(found)


def _advice(out: Console, problems: list[Problem]) -> None:
    """What to do, what is needed first."""
    needed = [p for p in problems if p.needed]
    for title, chosen in (
        ("To be mended", needed), ("Optional", [p for p in problems if not p.needed]),
    ):  # fmt: skip
        if chosen:
            grid = _grid(title, "what", "command")
            for problem in chosen:
                grid.add_row(escape(problem.what), escape(problem.mend))
            out.print(grid)
    if not needed:
        out.print("Nothing that is needed is missing. A first run: latent-jax run latentwire/tiny")
