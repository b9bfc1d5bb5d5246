"""`latent-jax info`: devices, versions, models and data that are at hand."""

from __future__ import annotations

import os

from rich.console import Console
from rich.table import Table

from latent_jax.commands.show import console
from latent_jax.core.errors import DataError, FetchError
from latent_jax.report.tables import size


def info() -> None:
    """Prints what a run on this machine would find."""
    out = console()
    _versions(out)
    _devices(out)
    _backbones(out)
    _data(out)


def _grid(title: str, *columns: str) -> Table:
    grid = Table(title=title, title_justify="left", show_header=bool(columns))
    for column in columns or ("", ""):
        grid.add_column(column, overflow="fold")
    return grid


def _versions(out: Console) -> None:
    from latent_jax.report import record

    grid = _grid("Versions")
    for name, version in record.versions().items():
        grid.add_row(name, version)
    commit = record.commit()
    if commit:
        grid.add_row("commit", commit)
    out.print(grid)


def _devices(out: Console) -> None:
    import jax

    grid = _grid("Devices", "device", "kind", "memory")
    try:
        for device in jax.devices():
            stats = device.memory_stats() or {}
            limit = stats.get("bytes_limit")
            grid.add_row(str(device), device.device_kind, size(limit) if limit else "")
    except RuntimeError as error:
        grid.add_row("none", " ".join(str(error).split())[:120], "")
    out.print(grid)


def _backbones(out: Console) -> None:
    from latent_jax.backbones import registry
    from latent_jax.core import fetch
    from latent_jax.core.pins import PINS

    grid = _grid("Models and data files", "name", "state", "what")
    for name, path in registry.PACKAGED.items():
        grid.add_row(name, "in the package" if path.exists() else "missing", "small reader")
    for name, item in PINS.items():
        try:
            path = fetch.cached(name)
        except FetchError as error:
            grid.add_row(name, str(error), item.title)
            continue
        state = f"in the cache, {size(item.size)}" if path else f"latent-jax fetch {name}"
        grid.add_row(name, state, f"{item.title} ({item.licence})")
    out.print(grid)
    out.print(f"cache: {fetch.cache_dir()} (LATENT_JAX_CACHE)", markup=False)


def _data(out: Console) -> None:
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
    for name, (relative, what) in wanted.items():
        found = root is not None and files.has_file(relative, root)
        grid.add_row(name, what, "found" if found else "not found")
    out.print(grid)
    where = os.environ.get(files.ENV_ROOT)
    out.print(f"data folder: {where or f'none ({files.ENV_ROOT} is not set)'}", markup=False)
