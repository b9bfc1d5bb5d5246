"""Residual VQ beside vector-quantize-pytorch, in one process; its scaling; its distortion.

Both sides start from the same codebooks and get the same vectors; how often their indices agree is
printed before any time. A training step is forward, backward to the input, and the codebooks'
moving average. `--table` instead trains quantisers of white Gaussian noise and prints their error
beside the rate-distortion bound.
"""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latent_jax.bench import rvq_table, timing
from latent_jax.core.errors import BackboneError, ConfigError
from latent_jax.nn.residual_vq import ResidualVQ
from latent_jax.nn.vq_config import Ramp, ResetConfig, VQConfig
from latent_jax.nn.vq_torch import export_state


def _option(default: Any, about: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": about})


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of `latent-jax bench rvq`."""

    rows: int = _option(16384, "vectors")
    dim: int = _option(256, "their width")
    stages: int = _option(8, "depth")
    codes: int = _option(1024, "codes per stage")
    pairs: int = _option(5, "alternating timed pairs")
    threads: int = _option(2, "threads of the peer")
    seed: int = _option(0, "of vectors and codebooks")
    peer: bool = _option(True, "compare with torch")
    scaling: bool = _option(False, "time other numbers of vectors, codes and stages too")
    table: bool = _option(False, "only the distortion of N(0, I)")
    table_steps: int = _option(300, "its training steps per part, of 1024 vectors")

    def __post_init__(self) -> None:
        for name in ("rows", "dim", "stages", "codes", "pairs", "threads", "table_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"bench rvq --{name.replace('_', '-')}: use at least 1")


SETTINGS = VQConfig(
    init="random", decay=0.9, commitment=Ramp(1.0), reset=ResetConfig(fraction=0.0)
)


class Ours:
    """Our quantiser with its state, as the two programs that are timed."""

    def __init__(self, options: Options):
        self.module = ResidualVQ(options.dim, options.codes, options.stages, SETTINGS)
        key = jax.random.key(options.seed)
        rows = jax.random.normal(key, (options.rows, options.dim))
        self.x, self.weight = rows, jnp.roll(rows, 1, 0)
        self.variables = jax.jit(self.module.init)(jax.random.fold_in(key, 1), rows[:1])

        def loss(x: jax.Array, variables: Any) -> tuple[jax.Array, Any]:
            out, new = self.module.apply(variables, x, train=True, mutable=["codebook"])
            return jnp.sum(out.quantized * self.weight) + out.loss, new

        self._step = jax.jit(jax.grad(loss, has_aux=True), donate_argnums=(1,))
        self._encode = jax.jit(lambda v, x: self.module.apply(v, x)[:2])

    def step(self) -> Any:
        """One training step."""
        grad, self.variables = self._step(self.x, self.variables)
        return grad

    def encode(self) -> Any:
        """Vectors and digits in evaluation mode."""
        return self._encode(self.variables, self.x)


class Peer:
    """The torch library from the same codebooks."""

    def __init__(self, options: Options, ours: Ours):
        try:
            import torch
            from vector_quantize_pytorch import ResidualVQ as TorchVQ
        except ImportError as error:
            raise BackboneError(
                f"the peer needs torch and vector-quantize-pytorch ({error}): pip install "
                "latent-jax[peers], or use --no-peer"
            ) from error
        self.torch = torch
        torch.set_num_threads(options.threads)
        # Straight-through, as ours: the rotation trick would only slow it down.
        self.module = TorchVQ(
            dim=options.dim, num_quantizers=options.stages, codebook_size=options.codes,
            decay=SETTINGS.decay, rotation_trick=False,
        )  # fmt: skip
        state = export_state(ours.module, ours.variables)
        self.module.load_state_dict({k: torch.tensor(v) for k, v in state.items()})
        self.x = torch.tensor(np.asarray(ours.x))[None]
        self.weight = torch.tensor(np.asarray(ours.weight))[None]

    def step(self) -> Any:
        """One training step."""
        self.module.train()
        x = self.x.clone().requires_grad_()
        quantized, _, loss = self.module(x)
        ((quantized * self.weight).sum() + loss.sum()).backward()
        return x.grad.numpy()

    def encode(self) -> Any:
        """Vectors and digits in evaluation mode."""
        self.module.eval()
        with self.torch.inference_mode():
            quantized, indices, _ = self.module(self.x)
        return quantized[0].numpy(), indices[0].numpy()


def parity(ours: Ours, peer: Peer) -> dict[str, float]:
    """Agreement of indices, and the largest difference of vectors where all indices agree."""
    (a, i), (b, j) = ours.encode(), peer.encode()
    same = np.asarray(i) == j
    whole = same.all(-1)
    gap = np.abs(np.asarray(a)[whole] - b[whole]).max() if whole.any() else float("nan")
    return {"parity.index_agreement": float(same.mean()), "parity.max_abs_difference": float(gap)}


def scaling(options: Options) -> dict[str, float]:
    """Seconds of our training step when one size at a time is halved."""
    out = {}
    half = {f: max(1, getattr(options, f) // 2) for f in ("rows", "codes", "stages")}
    for name, changed in {"": {}, **{f: {f: n} for f, n in half.items()}}.items():
        run = Ours(dataclasses.replace(options, **changed))
        jax.block_until_ready(run.step())
        times = [timing.once(run.step) for _ in range(options.pairs)]
        label = f"half_{name}" if name else "whole"
        out[f"scaling.{label}.seconds"] = statistics.median(times)
    return out


def table(options: Options, console: Any) -> dict[str, float]:
    """Trains and prints the distortion table."""
    from rich.table import Table

    steps, fit = options.table_steps, rvq_table.train
    plain = (rvq_table.settings(False, 0.95, 1), steps, 1024)
    runs = {
        "reference": [plain],
        "stage-wise": [plain, (rvq_table.settings(False, 0.99, 1), 2 * steps, 4096)],
        "joint, beam 8": [plain, (rvq_table.settings(True, 0.98, 8), 2 * steps, 1024)],
    }
    shown = Table(title=f"squared error per dimension, N(0, I), D=16, K=64, seed {options.seed}")
    for column in ("training", "encoding", "1", "2", "3", "4 stages", "least perplexity"):
        shown.add_column(column, justify="right")
    limits = [rvq_table.bound(s + 1) for s in range(rvq_table.STAGES)]
    shown.add_row("bound", "", *(f"{x:.4f}" for x in limits), "")
    results: dict[str, float] = {}
    for name, schedule in runs.items():
        variables = fit(schedule, options.seed)
        for beam in (1, 2, 4, 8):
            error, perplexity = rvq_table.evaluate(variables, beam)
            how = "greedy" if beam == 1 else f"beam {beam}"
            figures = [f"{x:.4f}" for x in error]
            shown.add_row(name, how, *figures, f"{perplexity.min():.1f}")
            for stage, value in enumerate(error):
                results[f"mse.{name.replace(', ', '_')}.{how}.{stage + 1}"] = float(value)
    console.print(shown)
    return results


def main(options: Options) -> dict[str, Any]:
    """Run the benchmark, print a table, return flat results."""
    from rich.console import Console

    console = Console()
    results: dict[str, Any] = {
        "options": dataclasses.asdict(options),
        "machine": timing.machine(),
    }
    if options.table:
        return results | table(options, console)
    ours = Ours(options)
    if options.peer:
        peer = Peer(options, ours)
        results["machine"] |= {
            "torch": peer.torch.__version__, "peer_threads": str(peer.torch.get_num_threads())
        }  # fmt: skip
        results |= parity(ours, peer)
        console.print(
            f"indices equal at {results['parity.index_agreement']:.6f}, vectors within "
            f"{results['parity.max_abs_difference']:.1e} where they are"
        )
    for part in ("step", "encode"):
        run = getattr(ours, part)
        if not options.peer:
            jax.block_until_ready(run())
            seconds = statistics.median(timing.once(run) for _ in range(options.pairs))
            results[f"throughput.{part}.ours_per_second"] = options.rows / seconds
            console.print(f"{part}: {options.rows / seconds:.0f} vectors/s")
            continue
        other = getattr(peer, part)
        pair = timing.alternate(run, other, pairs=options.pairs)
        results |= {f"throughput.{part}.{k}": v for k, v in pair.summary(options.rows).items()}
        results |= timing.memory(part, run, other)
        console.print(
            f"{part}: ours {statistics.median(pair.ours):.2f} s, peer "
            f"{statistics.median(pair.peer):.2f} s, {pair.ratio:.2f}x faster (median of pairs; "
            f"{min(pair.ratios):.2f} to {max(pair.ratios):.2f}); peak memory ours "
            f"{results[f'memory.{part}.ours_bytes'] / 2**20:.0f} MiB, peer "
            f"{results[f'memory.{part}.peer_bytes'] / 2**20:.0f} MiB, "
            f"{results[f'memory.{part}.ratio']:.2f} of the peer's"
        )
    if options.scaling:
        results |= scaling(options)
        whole = results["scaling.whole.seconds"]
        for name in ("rows", "codes", "stages"):
            share = results[f"scaling.half_{name}.seconds"] / whole
            console.print(f"half the {name}: {share:.2f} of the time")
    console.print(f"load average at the start {results['machine']['load_average']}")
    return results
