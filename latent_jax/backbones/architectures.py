"""Architectures that are known by name, and models without their weights, for planning."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from latent_jax.backbones import registry
from latent_jax.backbones.backbone import Backbone
from latent_jax.backbones.config import BackboneConfig, DecoderConfig, RopeScaling
from latent_jax.backbones.decoder import Decoder
from latent_jax.backbones.tokenizer import ByteTokenizer
from latent_jax.core import fetch
from latent_jax.core.errors import BackboneError


def _of(
    family: str, vocab: int, hidden: int, layers: int, heads: int, kv: int, inner: int, **more: Any
) -> DecoderConfig:
    head_dim = more.pop("head_dim", hidden // heads)
    window = more.pop("window", 8192)
    return DecoderConfig(
        family, vocab, hidden, layers, heads, kv, head_dim, inner, window, **more
    )


_LLAMA3: dict[str, Any] = dict(window=131_072, rope_theta=500_000.0)
_LLAMA31 = RopeScaling(8.0, 1.0, 4.0, 8192)
_LLAMA32 = RopeScaling(32.0, 1.0, 4.0, 8192)
_QWEN2: dict[str, Any] = dict(window=32_768, qkv_bias=True, norm_eps=1e-6, rope_theta=1e6)
_UNTIED: dict[str, Any] = dict(tie_embeddings=False)

# Hub id -> the shapes in its config.json.
ARCHITECTURES: dict[str, DecoderConfig] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": _of(
        "llama", 49_152, 576, 30, 9, 3, 1536, rope_theta=1e5
    ),
    "HuggingFaceTB/SmolLM2-360M-Instruct": _of(
        "llama", 49_152, 960, 32, 15, 5, 2560, rope_theta=1e5
    ),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": _of(
        "llama", 49_152, 2048, 24, 32, 32, 8192, rope_theta=1.3e5
    ),
    "meta-llama/Llama-3.2-1B": _of(
        "llama", 128_256, 2048, 16, 32, 8, 8192, rope_scaling=_LLAMA32, **_LLAMA3
    ),
    "meta-llama/Llama-3.1-8B": _of(
        "llama", 128_256, 4096, 32, 32, 8, 14_336, rope_scaling=_LLAMA31, **_LLAMA3, **_UNTIED
    ),
    "mistralai/Mistral-7B-v0.1": _of("mistral", 32_000, 4096, 32, 32, 8, 14_336, **_UNTIED),
    "Qwen/Qwen2.5-0.5B": _of("qwen2", 151_936, 896, 24, 14, 2, 4864, **_QWEN2),
    "Qwen/Qwen2.5-7B": _of("qwen2", 152_064, 3584, 28, 28, 4, 18_944, **_QWEN2, **_UNTIED),
    "Qwen/Qwen3-0.6B": _of(
        "qwen3", 151_936, 1024, 28, 16, 8, 3072, head_dim=128, qk_norm=True, norm_eps=1e-6,
        window=40_960, rope_theta=1e6,
    ),
    "google/gemma-3-270m": _of(
        "gemma3", 262_144, 640, 18, 4, 1, 2048, head_dim=256, qk_norm=True, norm_eps=1e-6,
        window=512, rope_theta=1e6, post_norms=True, activation="gelu_tanh",
        embed_scale=640**0.5, local_theta=10_000.0, global_every=6,
    ),
}  # fmt: skip

# What a name that is fetched stands for, where it has not been.
_FETCHED = {
    "smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct", "gemma3": "google/gemma-3-270m",
}  # fmt: skip


def param_shapes(config: DecoderConfig, dtype: Any = jnp.float32) -> Any:
    """Parameter tree of shapes and dtypes; nothing is allocated, whatever the size."""
    decoder = Decoder(config)

    def init() -> Any:
        x = jnp.zeros((1, 2, config.hidden_size))
        return decoder.init(jax.random.key(0), x)["params"]

    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), jax.eval_shape(init))


def skeleton(wanted: BackboneConfig) -> Backbone:
    """A model whose parameters are shapes: enough to plan a run, in no memory.

    A model that lies on this machine is looked up there (and brings its tokenizer); otherwise its
    name must be one of `ARCHITECTURES`, and bytes stand for its tokens. Nothing is downloaded.

    Raises:
      BackboneError: neither.
    """
    name = wanted.name
    known = _FETCHED.get(name, name)
    if known in ARCHITECTURES and not (name in _FETCHED and fetch.cached(name)):
        config, tokenizer, sha256 = ARCHITECTURES[known], ByteTokenizer(), ""
    elif name in registry.PACKAGED or name in _FETCHED or registry.is_path(name):
        config, tokenizer, sha256 = registry.outline(name)
    else:
        raise BackboneError(
            f"{name}: its architecture is not known here; give a directory or file, or one of "
            f"{', '.join([*registry.PACKAGED, *_FETCHED, *ARCHITECTURES])}."
        )
    params = param_shapes(config, jnp.dtype(wanted.dtype))
    return Backbone(name, config, params, tokenizer, sha256, Decoder(config))
