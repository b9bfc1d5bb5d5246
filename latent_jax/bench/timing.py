"""Timing two programs side by side: alternating runs, paired ratios, peak memory.

A machine's speed drifts (frequency, neighbours), so the unit is the *pair*: A and B run back to
back, each pair gives one ratio, and the median of the ratios is what is reported. Absolute times
are shown beside it for orientation.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Pair:
    """Times of two programs run alternately.

    Attributes:
        ours: seconds of each run of A.
        peer: seconds of each run of B, in the same order.
    """

    ours: tuple[float, ...]
    peer: tuple[float, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        """peer / ours of each pair: above 1 means A is faster."""
        return tuple(b / a for a, b in zip(self.ours, self.peer, strict=True))

    @property
    def ratio(self) -> float:
        """Median of the paired ratios."""
        return statistics.median(self.ratios)

    def summary(self, units: float) -> dict[str, float]:
        """Flat figures for a report; `units` (such as tokens) is the work of one run."""
        return {
            "ours_per_second": units / statistics.median(self.ours),
            "peer_per_second": units / statistics.median(self.peer),
            "ratio": self.ratio,
            "ratio_of_best": min(self.peer) / min(self.ours),
            "ratio_min": min(self.ratios),
            "ratio_max": max(self.ratios),
            "pairs": float(len(self.ours)),
        }


def once(fn: Callable[[], Any]) -> float:
    """Seconds of one call, with asynchronous results waited for."""
    start = time.perf_counter()
    jax.block_until_ready(fn())
    return time.perf_counter() - start


def alternate(
    ours: Callable[[], Any], peer: Callable[[], Any], *, pairs: int, warmup: int = 1
) -> Pair:
    """Run A B B A A B … and keep the times of each.

    Every timed run comes straight after an untimed one of the same program: what the other leaves
    behind (its own shape of the freed heap, threads that still spin) is not charged to it. On a
    CPU that is no small thing: a step of 0.85 s takes 1.9 s as the first after torch.

    Args:
        ours: program A.
        peer: program B.
        pairs: number of timed pairs; which comes first changes from pair to pair.
        warmup: untimed runs of each before (compilation, page faults).

    Returns:
        The paired times.
    """
    for _ in range(warmup):
        once(ours)
        once(peer)
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(pairs):
        for which in (0, 1) if i % 2 == 0 else (1, 0):
            program = (ours, peer)[which]
            once(program)
            times[which].append(once(program))
    return Pair(tuple(times[0]), tuple(times[1]))


def peak_rss_bytes() -> int:
    """Peak resident set size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def rss_bytes() -> int:
    """Resident set size of this process now, in bytes (the peak where /proc is missing)."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    return peak_rss_bytes()


def _give_back() -> None:
    """Returns freed memory to the system: kept, it would be used again and not be seen to grow."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def peak_of(run: Callable[[], Any]) -> float:
    """Bytes by which one call raises this process's memory at its highest; NaN where unknown."""
    try:
        _give_back()
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = rss_bytes()
        jax.block_until_ready(run())
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("VmHWM")) - before
    except OSError:
        return float("nan")


def memory(part: str, ours: Callable[[], Any], peer: Callable[[], Any]) -> dict[str, float]:
    """`peak_of` both programs and their ratio, as flat results below ``memory.<part>``."""
    found = {"ours": peak_of(ours), "peer": peak_of(peer)}
    out = {f"memory.{part}.{who}_bytes": value for who, value in found.items()}
    known = found["peer"] > 0  # a peer that fits into what is there already was not measured
    return out | {f"memory.{part}.ratio": found["ours"] / found["peer"] if known else float("nan")}


def machine() -> dict[str, str]:
    """What a figure was measured on: processor, cores, devices, versions."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return {
        "processor": name,
        "cores": str(
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        ),
        "devices": ", ".join(f"{d.platform}:{d.device_kind}" for d in jax.devices()),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "load_average": f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "",
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }
