"""A training step of LatentWire beside an in-context autoencoder (Ge et al. 2024) in torch.

Three programs train on the same texts with the same frozen reader: the peer (a `LlamaForCausalLM`
with low-rank deltas on text and memory tokens, whose last states the reader takes for soft
tokens), ours computing exactly that (``step``, whose loss and gradients are compared with the
peer's before any time), and ours as the packaged compressors are trained (``own``: keys and values
at memory positions behind the untouched text, which needs no backward pass over it).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from latent_jax.backbones.config import BackboneConfig
from latent_jax.bench import timing
from latent_jax.bench.backbone import torch_peer
from latent_jax.core.errors import ConfigError
from latent_jax.systems.latentwire.config import (
    AdapterConfig,
    EncoderConfig,
    LatentWireRun,
    ModelConfig,
)
from latent_jax.systems.latentwire.losses import batch_terms
from latent_jax.systems.latentwire.model import Compressor, num_latents

_TARGETS = ("q", "k", "v")


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of `latent-jax bench wire`."""

    model: str = dataclasses.field(default="smollm2", metadata={"help": "name or path"})
    batch: int = dataclasses.field(default=4, metadata={"help": "texts"})
    tokens: int = dataclasses.field(default=128, metadata={"help": "tokens of a text"})
    ratio: int = dataclasses.field(default=4, metadata={"help": "tokens per latent"})
    rank: int = dataclasses.field(default=64, metadata={"help": "of the low-rank deltas"})
    pairs: int = dataclasses.field(default=3, metadata={"help": "alternating timed pairs"})
    threads: int = dataclasses.field(default=2, metadata={"help": "threads of the peer"})
    seed: int = dataclasses.field(default=0, metadata={"help": "of texts and fresh weights"})

    def __post_init__(self) -> None:
        for name in ("batch", "tokens", "ratio", "rank", "pairs", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"bench wire --{name}: use at least 1")
        if self.tokens % self.ratio:
            raise ConfigError(
                f"bench wire --tokens {self.tokens} is no multiple of --ratio {self.ratio}"
            )


def model_config(options: Options, own: bool) -> ModelConfig:
    """The peer's method, or our own."""
    lora = dict(lora_rank=options.rank, lora_alpha=float(options.rank), lora_targets=_TARGETS)
    if own:
        encoder, adapter = EncoderConfig(slots="both", **lora), AdapterConfig("kv")
    else:
        encoder = EncoderConfig(output="hidden", view="text", lora_on="all", **lora)
        adapter = AdapterConfig("soft")
    return ModelConfig(
        ratio=float(options.ratio), segment=options.tokens, encoder=encoder, adapter=adapter,
        sink=False,
    )  # fmt: skip


class Ours:
    """One of our compressors: its loss, and its training step on fixed texts."""

    def __init__(self, options: Options, own: bool, backbone: Any, ids: np.ndarray):
        config = LatentWireRun(
            backbone=BackboneConfig(name=options.model), model=model_config(options, own)
        )
        model = Compressor(config.model, backbone.config)
        self.reader, whole = backbone.params, jnp.ones(ids.shape, bool)
        self.batch = {
            "context": jnp.asarray(ids), "context_mask": whole, "inputs": jnp.asarray(ids),
            "inputs_mask": whole, "supervised": whole,
            "task": jnp.zeros(len(ids), jnp.int32),
        }  # fmt: skip
        init = jax.jit(lambda key: model.init(key, self.reader, jnp.asarray(ids), whole)["params"])
        self.params = init(jax.random.key(options.seed))

        def loss(params: Any, reader: Any, batch: Mapping[str, Any]) -> jax.Array:
            terms = batch_terms(model, config, params, {"reader": reader}, batch, None)[0]
            return terms["reconstruct"].value

        self.gradients = jax.jit(jax.value_and_grad(loss))
        optimizer = optax.adamw(1e-4)
        self.state = optimizer.init(self.params)

        def step(params: Any, state: Any, reader: Any, batch: Any) -> Any:
            value, gradient = jax.value_and_grad(loss)(params, reader, batch)
            updates, state = optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), state, value

        self._step = jax.jit(step, donate_argnums=(0, 1))

    def step(self) -> Any:
        """One training step; its loss."""
        self.params, self.state, value = self._step(
            self.params, self.state, self.reader, self.batch
        )
        return value


class Peer:
    """The in-context autoencoder in torch, holding our reader and our fresh weights."""

    def __init__(self, options: Options, backbone: Any, params: Any, ids: np.ndarray):
        self.model = torch_peer(backbone.config, backbone.params, options.threads)
        import torch

        self.torch, self.ids, self.ratio = torch, torch.tensor(ids), options.ratio
        self.model.requires_grad_(False)
        self.tree = {
            f"{part}/{name}" if part == "lora" else part: torch.nn.Parameter(
                torch.tensor(np.asarray(leaf))
            )
            for part, found in params.items()
            for name, leaf in (found.items() if part == "lora" else ((None, found),))
        }
        self.adapted = False
        for i, layer in enumerate(self.model.model.layers):
            for name in _TARGETS:
                module = getattr(layer.self_attn, f"{name}_proj")
                module.register_forward_hook(self._delta(i, name))
        self.optimizer = torch.optim.AdamW(
            self.tree.values(), lr=1e-4, weight_decay=1e-4, foreach=True
        )

    def _delta(self, layer: int, name: str) -> Any:
        # alpha is the rank: the delta is not scaled.
        def add(_: Any, given: Any, out: Any) -> Any:
            if not self.adapted:
                return out
            a, b = self.tree[f"lora/{name}_a"][layer], self.tree[f"lora/{name}_b"][layer]
            return out + (given[0] @ a) @ b

        return add

    def _run(self, parts: list[Any], where: list[Any], seen: Any) -> Any:
        # Without a mask, positions that skip would be taken for several packed texts.
        torch = self.torch
        x = torch.cat(parts, 1)
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(x.dtype).min)
        return self.model.model(
            inputs_embeds=x, attention_mask=mask.expand(len(x), 1, -1, -1),
            position_ids=torch.cat(where).expand(len(x), -1), use_cache=False,
        ).last_hidden_state  # fmt: skip

    def loss(self) -> Any:
        """Nats per token of the texts, rebuilt from their memory tokens."""
        torch, ids = self.torch, self.ids
        b, t = ids.shape
        m = num_latents(t, self.ratio)
        text = self.model.model.embed_tokens(ids)
        memory = text.view(b, m, self.ratio, -1).mean(2) + self.tree["memory"]
        slots = torch.arange(m) * self.ratio + (self.ratio - 1) // 2
        # Text is causal; memory tokens see all of it, and each other.
        seen = torch.ones(t + m, t + m, dtype=torch.bool).tril()
        seen[t:] = True
        self.adapted = True
        latents = self._run([text, memory], [torch.arange(t), slots], seen)[:, t:]
        self.adapted = False
        lead = self.tree["tasks"][0].expand(b, 1, -1)
        said = self._run(
            [latents, lead, text[:, :-1]], [slots, t + torch.arange(t)],
            torch.ones(t + m, t + m, dtype=torch.bool).tril(),
        )[:, m:]  # fmt: skip
        logits = self.model.lm_head(said)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())

    def step(self) -> float:
        """One training step; its loss."""
        self.optimizer.zero_grad(set_to_none=True)
        value = self.loss()
        value.backward()
        self.optimizer.step()
        return value.item()


def parity(ours: Ours, peer: Peer) -> dict[str, float]:
    """Losses of both and the largest difference of a gradient over its tensor's largest value."""
    value, gradient = ours.gradients(ours.params, ours.reader, ours.batch)
    theirs = peer.loss()
    theirs.backward()
    apart = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        mine = np.asarray(leaf)
        grad = peer.tree[jax.tree_util.keystr(path, simple=True, separator="/")].grad.numpy()
        apart = max(apart, float(np.abs(mine - grad).max() / (np.abs(grad).max() + 1e-12)))
    return {
        "parity.ours": float(value), "parity.peer": theirs.item(),
        "parity.loss_difference": abs(float(value) - theirs.item()),
        "parity.gradient_difference": apart,
    }  # fmt: skip


def main(options: Options) -> dict[str, Any]:
    """Run the benchmark, print what a person reads, return flat results."""
    from rich.console import Console

    from latent_jax import backbones

    console = Console()
    backbone = backbones.load(options.model, dtype=jnp.float32)
    rng = np.random.default_rng(options.seed)
    ids = rng.integers(0, backbone.config.vocab_size, (options.batch, options.tokens), np.int64)
    same = Ours(options, False, backbone, ids)
    peer = Peer(options, backbone, same.params, ids)
    results: dict[str, Any] = {
        "options": dataclasses.asdict(options),
        "machine": timing.machine() | {"torch": peer.torch.__version__},
        **parity(same, peer),
    }
    console.print(
        f"loss {results['parity.ours']:.6f} and {results['parity.peer']:.6f}; largest relative "
        f"difference of a gradient {results['parity.gradient_difference']:.1e}"
    )
    for part, ours in (("step", same), ("own", Ours(options, True, backbone, ids))):
        pair = timing.alternate(ours.step, peer.step, pairs=options.pairs)
        results |= {f"throughput.{part}.{k}": v for k, v in pair.summary(ids.size).items()}
        results |= timing.memory(part, ours.step, peer.step)
        console.print(
            f"{part}: ours {results[f'throughput.{part}.ours_per_second']:,.0f} tokens/s, torch "
            f"{results[f'throughput.{part}.peer_per_second']:,.0f}; median ratio {pair.ratio:.2f} "
            f"({min(pair.ratios):.2f} to {max(pair.ratios):.2f}, {options.pairs} pairs); memory of "
            f"a step {results[f'memory.{part}.ours_bytes'] / 2**20:.0f} MiB, peer "
            f"{results[f'memory.{part}.peer_bytes'] / 2**20:.0f} MiB"
        )
    return results
