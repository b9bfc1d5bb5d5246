"""Real models at full size, by shape only: parameter counts equal the published ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from latent_jax.backbones.config import DecoderConfig, RopeScaling
from latent_jax.backbones.decoder import KV, Decoder
from latent_jax.backbones.testing import param_shapes


def config(family, vocab, hidden, layers, heads, kv, inter, **more):
    head_dim = more.pop("head_dim", hidden // heads)
    return DecoderConfig(
        family, vocab, hidden, layers, heads, kv, head_dim, inter, more.pop("window", 8192), **more
    )


LLAMA31 = RopeScaling(8.0, 1.0, 4.0, 8192)
LLAMA32 = RopeScaling(32.0, 1.0, 4.0, 8192)
UNTIED = dict(tie_embeddings=False)
QWEN2 = dict(qkv_bias=True, norm_eps=1e-6, rope_theta=1e6)

# Shapes from each model's config.json, counts from its model card.
MODELS = {
    "SmolLM2-135M": (config("llama", 49152, 576, 30, 9, 3, 1536), 134_515_008),
    "SmolLM2-360M": (config("llama", 49152, 960, 32, 15, 5, 2560), 361_821_120),
    "SmolLM2-1.7B": (config("llama", 49152, 2048, 24, 32, 32, 8192), 1_711_376_384),
    "Llama-3.2-1B": (
        config("llama", 128256, 2048, 16, 32, 8, 8192, window=131072, rope_scaling=LLAMA32),
        1_235_814_400,
    ),
    "Llama-3.1-8B": (
        config(
            "llama", 128256, 4096, 32, 32, 8, 14336, window=131072, rope_scaling=LLAMA31, **UNTIED
        ),
        8_030_261_248,
    ),
    "Mistral-7B-v0.1": (config("mistral", 32000, 4096, 32, 32, 8, 14336, **UNTIED), 7_241_732_096),
    "Qwen2.5-0.5B": (config("qwen2", 151936, 896, 24, 14, 2, 4864, **QWEN2), 494_032_768),
    "Qwen2.5-7B": (
        config("qwen2", 152064, 3584, 28, 28, 4, 18944, **QWEN2, **UNTIED),
        7_615_616_512,
    ),
    "Qwen3-0.6B": (
        config("qwen3", 151936, 1024, 28, 16, 8, 3072, head_dim=128, qk_norm=True, norm_eps=1e-6),
        596_049_920,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_parameter_count_is_the_published_one(name):
    cfg, published = MODELS[name]
    shapes = param_shapes(cfg)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == published
    assert cfg.num_params() == published
    layers = jax.tree.leaves(shapes["layers"])
    assert all(leaf.shape[0] == cfg.num_layers for leaf in layers)


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "Qwen2.5-7B", "Qwen3-0.6B"])
def test_output_shapes(name):
    cfg, _ = MODELS[name]
    decoder = Decoder(cfg)
    b, t, m = 2, 5, 3

    def run(params, x, prefix):
        out = decoder.apply({"params": params}, x, prefix=prefix)
        return out, decoder.apply({"params": params}, out.hidden, method="unembed")

    entry = jax.ShapeDtypeStruct(
        (cfg.num_layers, b, m, cfg.num_kv_heads, cfg.head_dim), jnp.bfloat16
    )
    prefix = KV(entry, entry, jax.ShapeDtypeStruct((b, m), bool))
    x = jax.ShapeDtypeStruct((b, t, cfg.hidden_size), jnp.bfloat16)
    out, logits = jax.eval_shape(run, param_shapes(cfg), x, prefix)
    assert out.hidden.shape == (b, t, cfg.hidden_size) and out.hidden.dtype == jnp.bfloat16
    assert out.kv.k.shape == (cfg.num_layers, b, t, cfg.num_kv_heads, cfg.head_dim)
    assert out.kv.v.shape == out.kv.k.shape and out.kv.k.dtype == jnp.bfloat16
    assert logits.shape == (b, t, cfg.vocab_size) and logits.dtype == jnp.float32
