"""What a run records about itself: the machine, the history of runs, flat results."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latent_jax.core import files
from latent_jax.core.errors import RunError
from latent_jax.report.load import is_number
from latent_jax.report.names import HEADLINES

_PACKAGES = (
    "latent-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy",
)  # fmt: skip


def primary() -> bool:
    """True in the one process that writes files."""
    import jax

    return jax.process_index() == 0


def versions(packages: tuple[str, ...] = _PACKAGES) -> dict[str, str]:
    """Versions of the packages that a result depends on."""
    import latent_jax

    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name == "latent-jax":
                found[name] = latent_jax.__version__
    return found


def source_digest() -> str:
    """Short sha256 of the package's Python files, installed or checked out."""
    root, digest = Path(__file__).resolve().parent.parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def commit() -> str | None:
    """The commit of the checkout this package runs from, `+` when there are changes on top."""
    here = Path(__file__).resolve().parent

    def git(*args: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(here), *args], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        # An installed package may lie inside somebody else's repository.
        if not git("ls-files", "--", __file__):
            return None
        changed = "+" if git("status", "--porcelain") else ""
        return git("rev-parse", "--short=12", "HEAD") + changed
    except (OSError, subprocess.SubprocessError):
        return None


def environment() -> dict[str, Any]:
    """Versions, devices and commit; nothing that names the machine or its user."""
    import jax

    devices: dict[str, int] = {}
    for device in jax.devices():
        kind = f"{device.platform}: {device.device_kind}"
        devices[kind] = devices.get(kind, 0) + 1
    return {
        "versions": versions(),
        "devices": [f"{count} × {kind}" for kind, count in devices.items()],
        "processes": jax.process_count(),
        "cpu": machine(),
        "os": f"{platform.system()} {platform.machine()}",
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def machine() -> dict[str, Any]:
    """Model, cores and bytes of memory of this machine."""
    return {"model": _cpu_model(), "cores": _cores(), "memory_bytes": _memory()}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def peak_bytes() -> int:
    """Most memory used so far: of the fullest accelerator, or of this process on a CPU."""
    import resource

    import jax

    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peak = max((s.get("peak_bytes_in_use", 0) for s in stats), default=0)
    if peak:
        return int(peak)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024  # kilobytes everywhere else


def flat_numbers(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics as plain numbers and lists of them, in name order within their first part.

    Example:
      >>> import numpy as np
      >>> flat_numbers({"a.b": np.float32(0.5), "a.b.ci95": (0.25, np.float64(0.75)), "n": 3})
      {'a.b': 0.5, 'a.b.ci95': [0.25, 0.75], 'n': 3}
    """
    return {str(k): json.loads(json.dumps(v, default=files.plain)) for k, v in metrics.items()}


def headline(results: Mapping[str, Any], limit: int = 12) -> dict[str, Any]:
    """The single numbers of a result that a line of history holds, the telling ones first."""
    # Scores of answers that were cut or nudged are beside the point.
    aside = {"extract", "nudged"}
    numbers = {
        k: v for k, v in results.items() if is_number(v) and aside.isdisjoint(k.split("."))
    }
    first = [name for name in HEADLINES if name in numbers]
    first += [name for name in numbers if name.endswith(".latent")]
    return {name: numbers[name] for name in list(dict.fromkeys([*first, *numbers]))[:limit]}


def history(
    out: Path,
    what: str,
    config: Any,
    began: float,
    results: Mapping[str, Any],
    checkpoint: str | None = None,
) -> None:
    """Adds one line to `history.jsonl` in the `runs` directory.

    Args:
      out: the run's directory.
      what: `train` or `eval`.
      config: the resolved config.
      began: `time.perf_counter()` at the start, which no change of the clock moves.
      results: headline numbers.
      checkpoint: which one was evaluated.
    """
    if not primary():
        return
    from latent_jax.train.checkpoints import resume_hash

    full = out.resolve()
    folder = next((p for p in full.parents if p.name == "runs"), Path("runs"))
    row = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "what": what,
        "run": os.path.relpath(full, folder.resolve()),
        "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "config_hash": resume_hash(config),
        "commit": commit(),
        "seed": config.seed,
        "checkpoint": checkpoint,
        "seconds": round(time.perf_counter() - began, 1),
        "results": dict(results),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files.append_line(folder / "history.jsonl", {k: v for k, v in row.items() if v is not None})
    except (OSError, RunError) as error:
        print(f"warning: no line of history written: {error}", file=sys.stderr)
