"""Prefill and decode of a frozen LLM beside transformers + torch on the CPU, in one process.

Both sides hold the same fp32 weights (the peer is a `LlamaForCausalLM` filled from our tree), get
the same prompts, compute logits at the last position only, and decode greedily for the same
number of steps. The largest difference of their logits is printed before any time.

Decode time is that of a whole generation minus that of its prefill, for both.
"""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latent_jax.bench import timing
from latent_jax.core import trees
from latent_jax.core.errors import BackboneError, ConfigError


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of `latent-jax bench backbone`."""

    model: str = dataclasses.field(default="smollm2", metadata={"help": "name or path"})
    prompt_tokens: int = dataclasses.field(default=256, metadata={"help": "tokens per prompt"})
    batch: int = dataclasses.field(default=4, metadata={"help": "prompts"})
    new_tokens: int = dataclasses.field(default=64, metadata={"help": "decoded tokens"})
    pairs: int = dataclasses.field(default=5, metadata={"help": "alternating timed pairs"})
    threads: int = dataclasses.field(default=2, metadata={"help": "threads of the peer"})
    seed: int = dataclasses.field(default=0, metadata={"help": "of the prompts"})
    peer: bool = dataclasses.field(default=True, metadata={"help": "compare with torch"})

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "batch", "pairs", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"bench backbone --{name.replace('_', '-')}: use at least 1")
        if self.new_tokens < 2:
            raise ConfigError("bench backbone --new-tokens: use at least 2")


def torch_peer(config: Any, params: Any, threads: int) -> Any:
    """A transformers `LlamaForCausalLM` holding our weights in fp32.

    Args:
        config: our `DecoderConfig` (Llama or Mistral shape, no rope scaling).
        params: our parameter tree.
        threads: torch threads.

    Raises:
        BackboneError: torch is not installed, or the architecture is not Llama's.
    """
    try:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise BackboneError(
            f"the peer needs torch and transformers ({error}): pip install latent-jax[peers], or "
            "use --no-peer"
        ) from error
    if config.qkv_bias or config.qk_norm or config.rope_scaling is not None:
        raise BackboneError(f"the peer covers plain Llama shapes, not {config.family!r}")
    torch.set_num_threads(threads)
    hf = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position,
        rms_norm_eps=config.norm_eps,
        rope_theta=config.rope_theta,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tie_embeddings,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(hf)
    model.to_empty(device="cpu")
    model.tie_weights()
    fill(model, params)
    # Non-persistent buffers (rotary frequencies) are not in a state dict: build them again.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=hf)
    return model.eval()


def fill(model: Any, params: Any) -> None:
    """Copy our parameter tree into a `LlamaForCausalLM`, every tensor exactly once."""
    import torch

    layers = params["layers"]
    names = {"model.embed_tokens.weight": np.asarray(params["embed"])}
    names["model.norm.weight"] = np.asarray(params["final_norm"]["scale"])
    if "head" in params:
        names["lm_head.weight"] = np.asarray(params["head"]).T
    blocks = {
        "input_layernorm": layers["attn_norm"]["scale"],
        "post_attention_layernorm": layers["mlp_norm"]["scale"],
    }
    for ours, theirs in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("o", "o_proj")):
        blocks[f"self_attn.{theirs}"] = layers[ours]["kernel"]
    for ours in ("gate", "up", "down"):
        blocks[f"mlp.{ours}_proj"] = layers[ours]["kernel"]
    for name, stacked in blocks.items():
        for i, leaf in enumerate(np.asarray(stacked)):
            names[f"model.layers.{i}.{name}.weight"] = leaf.T if leaf.ndim == 2 else leaf
    with torch.no_grad():
        for name, target in model.named_parameters():
            value = names.pop(name)
            target.copy_(torch.tensor(np.ascontiguousarray(value, np.float32)))
    if names:
        raise BackboneError(f"the peer has no place for {sorted(names)}")


def main(options: Options) -> dict[str, Any]:
    """Run the benchmark, print a table, return flat results."""
    from rich.console import Console

    from latent_jax import backbones
    from latent_jax.backbones.generate import generate_ids

    console = Console()
    before = timing.rss_bytes()
    backbone = backbones.load(options.model, dtype=jnp.float32)
    config, decoder, params = backbone.config, backbone.decoder, backbone.params
    rng = np.random.default_rng(options.seed)
    ids = rng.integers(0, config.vocab_size, (options.batch, options.prompt_tokens), np.int64)

    def ours(new: int) -> Any:
        embeds = backbone.embed(ids)
        return generate_ids(decoder, params, embeds, max_new_tokens=new).tokens

    jax.block_until_ready(ours(1))
    jax.block_until_ready(ours(options.new_tokens))
    results: dict[str, Any] = {
        "options": dataclasses.asdict(options),
        "machine": timing.machine(),
        "memory.ours_bytes": timing.rss_bytes() - before,
    }
    work = {
        "prefill": options.batch * options.prompt_tokens,
        "decode": options.batch * (options.new_tokens - 1),
    }
    if not options.peer:
        first = [timing.once(lambda: ours(1)) for _ in range(options.pairs)]
        whole = [timing.once(lambda: ours(options.new_tokens)) for _ in range(options.pairs)]
        seconds = {"prefill": np.median(first), "decode": np.median(whole) - np.median(first)}
        for part, units in work.items():
            results[f"throughput.{part}.ours_per_second"] = float(units / seconds[part])
            console.print(f"{part}: {units / seconds[part]:.1f} tokens/s")
        results["memory.peak_bytes"] = timing.peak_rss_bytes()
        return results

    import torch

    before = timing.rss_bytes()
    model = torch_peer(config, params, options.threads)
    batch = torch.tensor(ids)

    def peer(new: int) -> Any:
        with torch.inference_mode():
            return peer_generate(model, batch, new)

    results |= parity(backbone, model, ids[:, : min(64, options.prompt_tokens)], console)
    same = np.mean(np.asarray(ours(options.new_tokens)) == peer(options.new_tokens).numpy())
    results["parity.greedy_token_agreement"] = float(same)
    console.print(f"greedy tokens equal to the peer's: {same:.4f}")
    results["memory.peer_bytes"] = timing.rss_bytes() - before
    results["machine"] |= {"torch": torch.__version__, "peer_threads": str(torch.get_num_threads())}

    prefill = timing.alternate(lambda: ours(1), lambda: peer(1), pairs=options.pairs)
    whole = timing.alternate(
        lambda: ours(options.new_tokens), lambda: peer(options.new_tokens), pairs=options.pairs
    )
    decode = timing.Pair(
        tuple(t - np.median(prefill.ours) for t in whole.ours),
        tuple(t - np.median(prefill.peer) for t in whole.peer),
    )
    for part, pair in (("prefill", prefill), ("decode", decode)):
        for name, value in pair.summary(work[part]).items():
            results[f"throughput.{part}.{name}"] = float(value)
    results["matmul_per_second"] = product_rate()
    per_token = 2 * trees.count_params(params["layers"])
    for side in ("ours", "peer"):
        rate = results[f"throughput.prefill.{side}_per_second"] * per_token
        results[f"prefill.{side}_share_of_matmul"] = rate / results["matmul_per_second"]
    results["memory.peak_bytes"] = timing.peak_rss_bytes()
    show(results, options, console)
    return results


def product_rate(size: int = 2048, rounds: int = 7) -> float:
    """Operations per second of one large fp32 matrix product, the better of both libraries.

    Prefill is made of such products: no program can be faster than this rate over the operations
    of its layers.
    """
    import torch

    x = np.random.default_rng(0).standard_normal((size, size), np.float32)
    ours, theirs = jnp.asarray(x), torch.tensor(x)
    product = jax.jit(jnp.matmul)
    pair = timing.alternate(
        lambda: product(ours, ours), lambda: torch.mm(theirs, theirs), pairs=rounds
    )
    return 2 * size**3 / min(*pair.ours, *pair.peer)


def peer_generate(model: Any, ids: Any, new: int) -> Any:
    """The peer's greedy decoding: forward passes with its own cache, last position's logits only.

    A bare loop over `forward` leaves out the overhead of `transformers.generate`, so the peer is
    at its best.
    """
    import torch

    out = model(ids, use_cache=True, logits_to_keep=1)
    tokens = [out.logits[:, -1].argmax(-1, keepdim=True)]
    for _ in range(new - 1):
        out = model(
            tokens[-1], past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1
        )
        tokens.append(out.logits[:, -1].argmax(-1, keepdim=True))
    return torch.cat(tokens, dim=1)


def parity(backbone: Any, model: Any, ids: np.ndarray, console: Any) -> dict[str, float]:
    """Largest difference of the two models' logits on `ids`, and how often their argmax agrees."""
    import torch

    with torch.inference_mode():
        theirs = model(torch.tensor(ids)).logits.numpy()
    ours = np.asarray(backbone.logits(ids))
    largest = float(np.max(np.abs(ours - theirs)))
    agree = float(np.mean(ours.argmax(-1) == theirs.argmax(-1)))
    console.print(f"logits: largest difference {largest:.2e}, argmax equal at {agree:.4f}")
    if not np.isfinite(largest) or largest > 0.05:
        warnings.warn(
            f"the peers disagree by {largest:.3g}: the times compare two models", stacklevel=2
        )
    return {"parity.max_abs_difference": largest, "parity.argmax_agreement": agree}


def show(results: dict[str, Any], options: Options, console: Any) -> None:
    """Print the table a person reads."""
    from rich.table import Table

    table = Table(
        title=f"{Path(options.model).name} fp32, batch {options.batch}, "
        f"{options.prompt_tokens} prompt + {options.new_tokens} new tokens, "
        f"{options.pairs} alternated pairs"
    )
    for column in (
        "",
        "ours, tokens/s",
        "torch",
        "median ratio",
        "min … max",
        "best ratio",
    ):
        table.add_column(column, justify="right")
    for part in ("prefill", "decode"):
        r = {
            k.rsplit(".", 1)[1]: v
            for k, v in results.items()
            if k.startswith(f"throughput.{part}.")
        }
        table.add_row(
            part,
            f"{r['ours_per_second']:.1f}",
            f"{r['peer_per_second']:.1f}",
            f"{r['ratio']:.2f}x",
            f"{r['ratio_min']:.2f} … {r['ratio_max']:.2f}",
            f"{r['ratio_of_best']:.2f}x",
        )
    console.print(table)
    console.print(
        f"one 2048-wide matrix product: {results['matmul_per_second'] / 1e9:.0f} GFLOP/s; prefill "
        f"reaches {results['prefill.ours_share_of_matmul']:.2f} of it, the peer "
        f"{results['prefill.peer_share_of_matmul']:.2f}"
    )
    console.print(
        f"memory: ours {results['memory.ours_bytes'] / 2**20:.0f} MiB, "
        f"peer {results['memory.peer_bytes'] / 2**20:.0f} MiB, "
        f"peak of the process {results['memory.peak_bytes'] / 2**20:.0f} MiB; "
        f"load average at the start {results['machine']['load_average']}"
    )
