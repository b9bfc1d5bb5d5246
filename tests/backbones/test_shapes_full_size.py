"""Real models at full size, by shape only: parameter counts equal the published ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from latent_jax.backbones.architectures import ARCHITECTURES, param_shapes
from latent_jax.backbones.decoder import KV, Decoder

# From each model's card.
PUBLISHED = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M-Instruct": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1_711_376_384,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "google/gemma-3-270m": 268_098_176,
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameter_count_is_the_published_one(name):
    cfg, published = ARCHITECTURES[name], PUBLISHED[name]
    shapes = param_shapes(cfg)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == published
    assert cfg.num_params() == published
    layers = jax.tree.leaves(shapes["layers"])
    assert all(leaf.shape[0] == cfg.num_layers for leaf in layers)


@pytest.mark.parametrize(
    "name", ["meta-llama/Llama-3.1-8B", "Qwen/Qwen2.5-7B", "Qwen/Qwen3-0.6B"]
)
def test_output_shapes(name):
    cfg = ARCHITECTURES[name]
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
