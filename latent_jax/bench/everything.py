"""Every benchmark in one process, beside what the machine itself can do.

The peak is measured and not taken from a data sheet: a matrix product for arithmetic and a copy for
memory, timed before and after the benchmarks, so that a busy or throttled machine shows.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from latent_jax import bench
from latent_jax.bench import timing
from latent_jax.core.errors import ConfigError, UserError
from latent_jax.report import record

# A minute instead of many: sizes at which nothing but the code is tried.
_QUICK = {
    "backbone": ["--prompt-tokens", "32", "--batch", "2", "--new-tokens", "4", "--pairs", "1"],
    "mdn": ["--layers", "2", "--batch", "4", "--window", "64", "--pairs", "1"],
    "mega": ["--blocks", "16", "--budget", "256", "--new-tokens", "2", "--pairs", "1",
             "--grow-to", "0"],
    "rvq": ["--rows", "1024", "--stages", "2", "--pairs", "1"],
    "scaling": ["--model", "tiny", "--tokens", "16", "--rows", "256", "--codes", "32",
                "--repeats", "1"],
    "wire": ["--batch", "2", "--tokens", "32", "--pairs", "1"],
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of `latent-jax bench all`."""

    only: str = dataclasses.field(
        default="backbone,wire,mdn,rvq,mega,scaling",
        metadata={"help": "which, separated by commas"},
    )
    quick: bool = dataclasses.field(default=False, metadata={"help": "small sizes, one pair"})
    matmul: int = dataclasses.field(default=2048, metadata={"help": "width of the timed product"})
    copy_megabytes: int = dataclasses.field(default=256, metadata={"help": "size of the copy"})

    def __post_init__(self) -> None:
        for name in ("matmul", "copy_megabytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"bench all --{name.replace('_', '-')}: use at least 1")
        known = [name for name in bench.names() if name != "all"]
        unknown = [name for name in self.names if name not in known]
        if unknown:
            raise ConfigError(
                f"bench all --only: no {unknown[0]!r}; choose from {', '.join(known)}"
            )

    @property
    def names(self) -> list[str]:
        """The benchmarks, in order."""
        return [name.strip() for name in self.only.split(",") if name.strip()]


def measured_peak(width: int, megabytes: int, repeats: int = 5) -> dict[str, float]:
    """What this machine does at its best, of ``repeats`` tries.

    Args:
      width: of a square product, in fp32 on a CPU and bf16 elsewhere.
      megabytes: of the array that is copied.

    Returns:
      ``matmul_flops`` (operations/s) and ``copy_bytes`` (bytes read and written per second).
    """
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    a = jnp.ones((width, width), dtype)
    product = jax.jit(lambda x: x @ x)
    many = jnp.zeros(megabytes * 10**6 // 4, jnp.float32)
    copy = jax.jit(lambda x: x + 1.0)

    def best(fn: Any) -> float:
        timing.once(fn)
        return min(timing.once(fn) for _ in range(repeats))

    return {
        "matmul_flops": 2 * width**3 / best(lambda: product(a)),
        "copy_bytes": 2 * many.nbytes / best(lambda: copy(many)),
    }


def main(options: Options) -> dict[str, Any]:
    """Runs them, prints one table, returns flat results; what cannot run here is named."""
    console = Console()
    results: dict[str, Any] = {
        "options": dataclasses.asdict(options), "environment": record.environment(),
        "machine": timing.machine(),
    }  # fmt: skip

    def peak(when: str) -> None:
        found = measured_peak(options.matmul, options.copy_megabytes)
        results.update({f"peak.{when}.{name}": value for name, value in found.items()})

    peak("before")
    for name in options.names:
        console.rule(name)
        try:
            found = bench.run(name, _QUICK.get(name, []) if options.quick else [])
        except (UserError, ImportError) as error:
            results[f"{name}.skipped"] = " ".join(str(error).split())
            console.print(f"skipped: {results[f'{name}.skipped']}", markup=False)
            continue
        results |= {f"{name}.{key}": value for key, value in found.items() if key != "machine"}
    peak("after")
    console.print(table(results))
    for line in about(results):
        console.print(line, markup=False, highlight=False)
    return results


def table(results: Mapping[str, Any]) -> Table:
    """One row per comparison with a peer."""
    grid = Table(title="Against the peers, medians of paired ratios", title_justify="left")
    for i, column in enumerate(("", "ours /s", "peer /s", "ratio", "min … max", "memory")):
        grid.add_column(column, justify="right" if i else "left")
    for key in [k for k in results if k.endswith(".ratio") and ".throughput." in k]:
        part = key.removesuffix(".ratio")
        memory = results.get(part.replace(".throughput.", ".memory.") + ".ratio")
        grid.add_row(
            part.replace(".throughput.", " "), f"{results[part + '.ours_per_second']:,.4g}",
            f"{results[part + '.peer_per_second']:,.4g}", f"{results[key]:.2f}x",
            f"{results[part + '.ratio_min']:.2f} … {results[part + '.ratio_max']:.2f}",
            "" if memory is None else f"{memory:.2f}x",
        )  # fmt: skip
    return grid


def about(results: Mapping[str, Any]) -> list[str]:
    """Where and with what this was measured, and how fast the machine was."""
    environment, machine = results["environment"], results["machine"]
    versions = ", ".join(f"{name} {v}" for name, v in environment["versions"].items())
    speeds = [
        f"{when}: product {results[f'peak.{when}.matmul_flops'] / 1e9:,.0f} GFLOP/s, copy "
        f"{results[f'peak.{when}.copy_bytes'] / 1e9:,.1f} GB/s"
        for when in ("before", "after")
    ]
    return [
        f"{machine['processor']}, {machine['cores']} cores, {json.dumps(environment['devices'])}, "
        f"load {machine['load_average']}",
        f"{versions}; commit {environment['commit']}; {environment['date']}",
        "; ".join(speeds),
    ]
