"""One training step of the spacing transformer beside a torch twin, on the CPU, in one process.

Both sides hold the same weights and read the same windows: near gaps, learned kernels of physical
distance, rotary attention, a mixture of Gaussians at every position, AdamW. The two losses and the
largest difference of any gradient are printed before any time.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from latent_jax.bench import timing
from latent_jax.core.errors import BackboneError, ConfigError
from latent_jax.ops import mdn
from latent_jax.systems.spacing.config import SpacingModelConfig
from latent_jax.systems.spacing.model import SpacingModel

_REACH, _HEIGHTS = 140.0, (11.5, 0.5, 9.0, 14.0)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of `latent-jax bench mdn`."""

    layers: int = dataclasses.field(default=6, metadata={"help": "transformer blocks"})
    width: int = dataclasses.field(default=256, metadata={"help": "residual stream"})
    heads: int = dataclasses.field(default=8, metadata={"help": "attention heads"})
    batch: int = dataclasses.field(default=16, metadata={"help": "windows"})
    window: int = dataclasses.field(default=256, metadata={"help": "gaps"})
    pairs: int = dataclasses.field(default=5, metadata={"help": "alternating timed pairs"})
    threads: int = dataclasses.field(default=2, metadata={"help": "threads of the peer"})

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            if getattr(self, f.name) < 1:
                raise ConfigError(f"bench mdn --{f.name}: use at least 1")


def model_config(options: Options) -> SpacingModelConfig:
    """The architecture both sides build."""
    return SpacingModelConfig(
        layers=options.layers, heads=options.heads, width=options.width, ff=4 * options.width
    )


def torch_twin(model: SpacingModel, params: Any, threads: int) -> Any:
    """The same network in plain torch, holding our weights; maps windows to the mean NLL.

    Raises:
      BackboneError: torch is not installed.
    """
    try:
        import torch
        import torch.nn.functional as functional
    except ImportError as error:
        raise BackboneError(
            f"the peer needs torch ({error}): pip install latent-jax[peers]"
        ) from error
    torch.set_num_threads(threads)
    c = model.config
    d = c.width // c.heads
    tree = {
        jax.tree_util.keystr(path, simple=True, separator="/"): torch.nn.Parameter(
            torch.tensor(np.asarray(leaf))
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    frequencies = torch.tensor(model.frequencies())

    def linear(x: Any, name: str) -> Any:
        y = x @ tree[f"{name}/kernel"]
        return y + tree[f"{name}/bias"] if f"{name}/bias" in tree else y

    def norm(x: Any, name: str) -> Any:
        shape = x.shape[-1:]
        return functional.layer_norm(x, shape, tree[f"{name}/scale"], tree[f"{name}/bias"], 1e-6)

    def rotate(x: Any, at: Any) -> Any:
        angle = at[:, None, :, None] * frequencies
        cos, sin = angle.cos(), angle.sin()
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def embed(gaps: Any, log_height: Any) -> Any:
        b, t = gaps.shape
        past = functional.pad(gaps - 1, (t - 1, 0)).unfold(1, t, 1).flip(-1)
        j = torch.arange(1, t + 1)
        distance = 2 * math.pi * j / log_height[:, None]
        knots = c.embed.knots
        u = (distance[..., None] * ((knots + 1) / model.reach) - torch.arange(knots)).abs()
        inner, outer = 2 / 3 - u**2 + u**3 / 2, (2 - u).clamp(min=0) ** 3 / 6
        kernels = torch.where(u < 1, inner, outer) @ tree["gaps/kernels"][0]
        summaries = past @ kernels + tree["gaps/offset"]
        there = 2 * math.pi * model.context / model.reach
        span = (j * (there / log_height[:, None]) + 1e-3).floor().long().clamp(1, model.context)
        gate = tree["gaps/gate"][span - 1]
        line = (summaries[..., : gate.shape[-1]] * gate).sum(-1)
        line = line + tree["gaps/level"][span - 1] + 1
        mean, std, least, most = model.heights
        level = (log_height.clamp(least, most) - mean) / std
        extra = torch.stack([span / model.context, level[:, None].expand(b, t)], -1)
        parts = [past[..., : c.embed.near], summaries, extra]
        spread = tree["gaps/spread"][span - 1]
        return linear(torch.cat(parts, -1), "gaps/embed"), line[..., None], spread[..., None]

    def loss(gaps: Any, log_height: Any) -> Any:
        x, line, spread = embed(gaps[:, :-1], log_height)
        b, t, _ = x.shape
        at = 2 * math.pi / log_height[:, None] * torch.arange(t)
        for i in range(c.layers):
            name = f"block_{i}"
            qkv = linear(norm(x, f"{name}/attention_norm"), f"{name}/qkv")
            q, k, v = qkv.view(b, t, 3, c.heads, d).permute(2, 0, 3, 1, 4)
            seen = functional.scaled_dot_product_attention(
                rotate(q, at), rotate(k, at), v, is_causal=True
            )
            x = x + linear(seen.transpose(1, 2).reshape(b, t, -1), f"{name}/out")
            y = linear(norm(x, f"{name}/mlp_norm"), f"{name}/up")
            x = x + linear(functional.gelu(y, approximate="tanh"), f"{name}/down")
        logits, mean, scale = linear(x, "head").chunk(3, -1)
        mean = line + spread.exp() * mean
        scale = functional.softplus(scale + spread) + c.head.floor
        z = (gaps[:, 1:, None] - mean) / scale
        parts = logits.log_softmax(-1) - z**2 / 2 - scale.log() - 0.5 * math.log(2 * math.pi)
        return -parts.logsumexp(-1).mean()

    return loss, tree


def main(options: Options) -> dict[str, Any]:
    """Run the benchmark, print what a person reads, return flat results."""
    from rich.console import Console

    console = Console()
    c = model_config(options)
    model = SpacingModel(c, _REACH, _HEIGHTS, options.window - 1)
    rng = np.random.default_rng(0)
    gaps = rng.gamma(6, 1 / 6, (options.batch, options.window)).astype(np.float32)
    height = rng.uniform(11, 12, options.batch).astype(np.float32)
    inputs = jnp.asarray(gaps), jnp.asarray(height)
    params = jax.jit(model.init)(jax.random.key(0), inputs[0][:, :-1], inputs[1])["params"]

    def loss(params: Any, gaps: Any, height: Any) -> Any:
        raw = model.apply({"params": params}, gaps[:, :-1], height).raw
        density = mdn.from_raw(raw, c.head.floor)
        return -jnp.mean(mdn.log_prob(density, gaps[:, 1:]))

    twin, tree = torch_twin(model, params, options.threads)
    import torch

    batch = torch.tensor(gaps), torch.tensor(height)
    value, gradient = jax.jit(jax.value_and_grad(loss))(params, *inputs)
    theirs = twin(*batch)
    theirs.backward()
    apart = max(
        float(np.abs(np.asarray(leaf) - tree[name].grad.numpy()).max())
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradient)
        for name in [jax.tree_util.keystr(path, simple=True, separator="/")]
    )
    results: dict[str, Any] = {
        "options": dataclasses.asdict(options),
        "machine": timing.machine() | {"torch": torch.__version__},
        "parity.loss_difference": abs(float(value) - theirs.item()),
        "parity.gradient_difference": apart,
    }
    console.print(
        f"loss {float(value):.6f} and {theirs.item():.6f}; largest difference of a gradient "
        f"{apart:.1e}"
    )
    optimizer = optax.adamw(1e-4)
    state = {"params": params, "opt": optimizer.init(params)}
    peer_optimizer = torch.optim.AdamW(tree.values(), lr=1e-4, weight_decay=1e-4, foreach=True)

    @jax.jit
    def step(params: Any, opt: Any, gaps: Any, height: Any) -> Any:
        value, gradient = jax.value_and_grad(loss)(params, gaps, height)
        updates, opt = optimizer.update(gradient, opt, params)
        return optax.apply_updates(params, updates), opt, value

    def ours() -> Any:
        state["params"], state["opt"], value = step(state["params"], state["opt"], *inputs)
        return value

    def peer() -> Any:
        peer_optimizer.zero_grad(set_to_none=True)
        value = twin(*batch)
        value.backward()
        peer_optimizer.step()
        return value.item()

    pair = timing.alternate(ours, peer, pairs=options.pairs, warmup=2)
    units = options.batch * (options.window - 1)
    results |= {f"throughput.step.{k}": v for k, v in pair.summary(units).items()}
    results["memory.peak_bytes"] = timing.peak_rss_bytes()
    console.print(
        f"train step, {options.layers} layers, width {options.width}, batch {options.batch} x "
        f"{options.window}: ours {results['throughput.step.ours_per_second']:,.0f} targets/s, "
        f"torch {results['throughput.step.peer_per_second']:,.0f}; median ratio {pair.ratio:.2f} "
        f"({min(pair.ratios):.2f} to {max(pair.ratios):.2f}, {options.pairs} pairs)"
    )
    return results
