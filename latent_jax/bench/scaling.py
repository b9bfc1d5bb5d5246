"""How time grows with batch, length, codes, stages and devices: ours alone, one size at a time.

The frozen reader runs forward, and backward to its inputs (what training an interface to it costs);
the quantiser takes a training step. Every row doubles one size: 2 is proportional, below it
something is amortised. Devices keep their own batch, so that 1 is perfect.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from latent_jax.bench import rvq, timing
from latent_jax.core.errors import ConfigError
from latent_jax.sharding import MeshConfig, make_mesh


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of `latent-jax bench scaling`."""

    model: str = dataclasses.field(default="smollm2", metadata={"help": "name or path"})
    batch: int = dataclasses.field(default=2, metadata={"help": "texts, where they do not grow"})
    tokens: int = dataclasses.field(default=128, metadata={"help": "of a text, likewise"})
    rows: int = dataclasses.field(default=4096, metadata={"help": "quantised vectors"})
    dim: int = dataclasses.field(default=256, metadata={"help": "their width"})
    codes: int = dataclasses.field(default=512, metadata={"help": "per stage"})
    stages: int = dataclasses.field(default=4, metadata={"help": "depth"})
    doublings: int = dataclasses.field(default=2, metadata={"help": "of each size"})
    repeats: int = dataclasses.field(default=3, metadata={"help": "timed runs; their median"})
    seed: int = dataclasses.field(default=0, metadata={"help": "of what is computed on"})

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            if f.type == "int" and f.name != "seed" and getattr(self, f.name) < 1:
                raise ConfigError(f"bench scaling --{f.name}: use at least 1")


def _seconds(run: Callable[[], Any], repeats: int) -> float:
    timing.once(run)
    return statistics.median(timing.once(run) for _ in range(repeats))


def reader(options: Options) -> Callable[[int, int, int], float]:
    """Seconds of the frozen reader, forward and backward, by texts, their tokens and devices."""
    from latent_jax import backbones

    backbone = backbones.load(options.model, dtype=jnp.float32)
    decoder, rng = backbone.decoder, np.random.default_rng(options.seed)

    def loss(embeds: jax.Array, params: Any) -> jax.Array:
        return jnp.mean(decoder.apply({"params": params}, embeds).hidden ** 2)

    step = jax.jit(jax.value_and_grad(loss))

    def seconds(batch: int, tokens: int, devices: int = 1) -> float:
        mesh = make_mesh(MeshConfig(data=devices), jax.devices()[:devices])
        shape = (batch * devices, tokens, backbone.config.hidden_size)
        x = rng.standard_normal(shape, np.float32) * 0.05
        with jax.set_mesh(mesh):
            x = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
            params = jax.device_put(backbone.params, NamedSharding(mesh, PartitionSpec()))
            return _seconds(lambda: step(x, params), options.repeats)

    return seconds


def quantiser(options: Options) -> Callable[..., float]:
    """Seconds of a training step of the residual VQ, by other ``codes``, ``stages`` or ``rows``."""
    base = rvq.Options(
        rows=options.rows, dim=options.dim, stages=options.stages, codes=options.codes,
        seed=options.seed, peer=False,
    )  # fmt: skip
    return lambda **other: _seconds(
        rvq.Ours(dataclasses.replace(base, **other)).step, options.repeats
    )


def main(options: Options) -> dict[str, Any]:
    """Run the benchmark, print a table, return flat results."""
    from rich.console import Console
    from rich.table import Table

    factors = [2**i for i in range(options.doublings + 1)]
    forward, quantise, b, t = reader(options), quantiser(options), options.batch, options.tokens
    sweeps: dict[str, dict[int, float]] = {
        "reader.batch": {b * f: forward(b * f, t) for f in factors},
        "reader.tokens": {t * f: forward(b, t * f) for f in factors},
        "reader.devices": {f: forward(b, t, f) for f in factors if f <= len(jax.devices())},
        "rvq.rows": {n: quantise(rows=n) for n in (options.rows * f for f in factors)},
        "rvq.codes": {n: quantise(codes=n) for n in (options.codes * f for f in factors)},
        "rvq.stages": {n: quantise(stages=n) for n in (options.stages * f for f in factors)},
    }
    results: dict[str, Any] = {
        "options": dataclasses.asdict(options), "machine": timing.machine(),
    }  # fmt: skip
    shown = Table(title=f"seconds, median of {options.repeats}", title_justify="left")
    for i, column in enumerate(("", "sizes", "seconds", "a doubling costs")):
        shown.add_column(column, justify="right" if i else "left")
    for name, found in sweeps.items():
        times = list(found.values())
        ratios = [after / before for before, after in zip(times, times[1:], strict=False)]
        results |= {f"scaling.{name}.{n}.seconds": s for n, s in found.items()}
        if ratios:
            results[f"scaling.{name}.per_doubling"] = statistics.geometric_mean(ratios)
        shown.add_row(
            name, " ".join(map(str, found)), " ".join(f"{s:.3g}" for s in times),
            " ".join(f"{r:.2f}x" for r in ratios) or "one device",
        )  # fmt: skip
    Console().print(shown)
    return results
