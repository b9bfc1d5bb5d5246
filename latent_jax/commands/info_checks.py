"""What `latent-jax info` finds wrong or missing, each with the command that mends it."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from latent_jax.core import fetch
from latent_jax.core.errors import DataError, FetchError
from latent_jax.core.pins import PINS
from latent_jax.data import files
from latent_jax.report.tables import size

# The demonstration on SmolLM2 peaks at 4.1 GB; a training on it at 6.
MEMORY = 6e9
_NVIDIA, _TPU = ("/dev/nvidiactl", "/dev/nvidia0"), ("/dev/accel0", "/dev/vfio/0")


class Problem(NamedTuple):
    """Something that is not as it should be.

    Attributes:
      what: in a sentence.
      mend: the command or setting that helps.
      needed: without it the packaged configurations do not run; else it only widens what does.
    """

    what: str
    mend: str
    needed: bool = True


def packages(
    required: Sequence[str] | None = None, version: Callable[[str], str] | None = None
) -> Iterator[Problem]:
    """Installed packages that are missing or outside of the range that this version asks for.

    Args:
      required: requirements; by default those of the installed package (a bare checkout has none).
      version: of an installed package, by name.
    """
    from packaging.requirements import Requirement

    version = version or importlib.metadata.version
    if required is None:
        try:
            required = importlib.metadata.requires("latent-jax") or ()
        except importlib.metadata.PackageNotFoundError:
            required = ()
    for line in required:
        asked = Requirement(line)
        if asked.marker is not None and not asked.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(asked.name)
        except importlib.metadata.PackageNotFoundError:
            yield Problem(f"{asked.name} is not installed", f"pip install '{asked}'")
            continue
        if not asked.specifier.contains(found, prereleases=True):
            yield Problem(
                f"{asked.name} {found} is installed, {asked.specifier} is needed",
                f"pip install '{asked}'",
            )


def devices(
    platforms: Sequence[str],
    error: str = "",
    environment: Mapping[str, str] | None = None,
    there: Callable[[str], bool] = os.path.exists,
) -> Iterator[Problem]:
    """Accelerators of this machine that JAX does not see.

    Args:
      platforms: of the devices that JAX sees; empty if it sees none.
      error: what JAX says then.
      environment: by default this process's.
      there: whether a device file exists.
    """
    environment = os.environ if environment is None else environment
    wanted = environment.get("JAX_PLATFORMS", "")
    if not platforms:
        setting = f" (JAX_PLATFORMS={wanted})" if wanted else ""
        yield Problem(
            f"JAX sees no device{setting}: {error or 'no reason given'}",
            "unset JAX_PLATFORMS" if wanted else "pip install -U jax",
        )
        return
    for what, marks, names, extra in (
        ("an NVIDIA GPU", _NVIDIA, ("gpu", "cuda"), "cuda"), ("a TPU", _TPU, ("tpu",), "tpu"),
    ):  # fmt: skip
        if any(map(there, marks)) and not set(platforms) & set(names):
            if wanted and not set(wanted.split(",")) & set(names):
                mend = f"unset JAX_PLATFORMS (it is {wanted})"
            else:
                mend = f"pip install 'latent-jax[{extra}]'"
            yield Problem(f"this machine has {what} that JAX does not use", mend, needed=False)


def memory(available: int | None) -> Iterator[Problem]:
    """Too little main memory for SmolLM2."""
    if available is not None and available < MEMORY:
        yield Problem(
            f"{size(available)} of memory are free, training on SmolLM2 takes {size(MEMORY)}",
            "end other programs, or use backbone.name=tiny (latentwire/tiny)", needed=False,
        )  # fmt: skip


def available_memory() -> int | None:
    """Bytes of main memory that a new program can have, where the system tells."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def cache() -> Iterator[Problem]:
    """Files that can be fetched, and whether the cache can take them."""
    folder = fetch.cache_dir()
    above = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not os.access(above, os.W_OK):
        yield Problem(
            f"the cache {folder} cannot be written", "export LATENT_JAX_CACHE=FOLDER"
        )
        return
    room = shutil.disk_usage(above).free
    for name, item in PINS.items():
        try:
            if fetch.cached(name) is not None:
                continue
        except FetchError as error:
            yield Problem(str(error), f"latent-jax fetch {name}", needed=False)
            continue
        if room < item.size + item.download_size:
            yield Problem(
                f"{item.title} is not in the cache, whose disk has {size(room)} left",
                "export LATENT_JAX_CACHE=FOLDER on a larger one", needed=False,
            )  # fmt: skip
        else:
            yield Problem(
                f"{item.title} is not in the cache ({size(item.download_size)} to download)",
                f"latent-jax fetch {name}", needed=False,
            )  # fmt: skip


def data(found: Mapping[str, bool]) -> Iterator[Problem]:
    """The data folder, and which sources it lacks.

    Args:
      found: optional source → whether its file is there.
    """
    where = f"export {files.ENV_ROOT}=FOLDER"
    try:
        root = files.data_root()
    except DataError as error:
        yield Problem(str(error), where)
        return
    missing = ", ".join(name for name, there in found.items() if not there)
    if root is None:
        yield Problem(
            f"no data folder: {missing} cannot be used; `embedded`, `lookup` and `pydoc` can",
            where, needed=False,
        )  # fmt: skip
    elif missing:
        yield Problem(
            f"{root} has no {missing}", f"put the files there, or {where}", needed=False
        )


def writable(folder: str | Path = ".") -> Iterator[Problem]:
    """Runs are written below the working folder."""
    if not os.access(folder, os.W_OK):
        yield Problem(
            "the working folder cannot be written, where runs/ would be", "cd elsewhere, or --out"
        )


def peers(find: Callable[[str], Any] | None = None) -> Iterator[Problem]:
    """What benchmarks compare with."""
    from importlib.util import find_spec

    missing = [n for n in ("torch", "vector_quantize_pytorch") if (find or find_spec)(n) is None]
    if missing:
        yield Problem(
            f"benchmarks run without their peers ({', '.join(missing)})",
            "pip install 'latent-jax[peers]'", needed=False,
        )  # fmt: skip
