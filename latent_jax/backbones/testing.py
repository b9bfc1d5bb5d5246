"""Tiny random models of every family, for tests and dry runs: shapes of a real model, none of its
cost."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from latent_jax.backbones.architectures import param_shapes
from latent_jax.backbones.backbone import Backbone
from latent_jax.backbones.config import FAMILIES, DecoderConfig, RopeScaling
from latent_jax.backbones.decoder import Decoder
from latent_jax.backbones.tokenizer import ByteTokenizer
from latent_jax.core.errors import BackboneError


def tiny_config(family: str = "llama", **overrides: Any) -> DecoderConfig:
    """A decoder config with two or three small layers that uses every option of its family.

    Args:
        family: one of `FAMILIES`, or "llama3" for Llama with rope scaling and an untied head.
        overrides: fields to replace.

    Raises:
        BackboneError: unknown family.

    Example:
        >>> tiny_config("qwen2").qkv_bias
        True
    """
    base = DecoderConfig(
        family="llama",
        vocab_size=97,
        hidden_size=48,
        num_layers=3,
        num_heads=6,
        num_kv_heads=2,
        head_dim=8,
        intermediate_size=80,
        max_position=512,
        rope_theta=10_000.0,
        norm_eps=1e-5,
        tie_embeddings=True,
    )
    if family == "llama3":
        scaling = RopeScaling(
            factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=64
        )
        base = dataclasses.replace(
            base, rope_theta=500_000.0, rope_scaling=scaling, tie_embeddings=False
        )
    elif family == "mistral":
        base = dataclasses.replace(base, family="mistral", num_heads=4, tie_embeddings=False)
    elif family == "qwen2":
        base = dataclasses.replace(base, family="qwen2", qkv_bias=True, norm_eps=1e-6)
    elif family == "qwen3":
        # Qwen3's head size is not hidden / heads.
        base = dataclasses.replace(base, family="qwen3", qk_norm=True, head_dim=16, norm_eps=1e-6)
    elif family == "gemma3":
        base = dataclasses.replace(
            base, family="gemma3", qk_norm=True, head_dim=16, norm_eps=1e-6, post_norms=True,
            activation="gelu_tanh", embed_scale=48**0.5, local_theta=100.0, global_every=2,
            query_scale=12**-0.5,
        )  # fmt: skip
    elif family != "llama":
        known = ", ".join((*FAMILIES, "llama3"))
        raise BackboneError(f"no tiny config for family {family!r}: choose from {known}")
    return dataclasses.replace(base, **overrides)


def random_params(config: DecoderConfig, key: Array, dtype: Any = jnp.float32) -> Any:
    """Random parameters with every leaf non-trivial (norm scales and biases too), so that a swap
    shows.

    Args:
        config: architecture.
        key: PRNG key.
        dtype: of all leaves.

    Returns:
        The decoder's parameter tree.
    """
    shapes = param_shapes(config)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(shapes)
    filled = []
    for i, (path, leaf) in enumerate(leaves):
        noise = jax.random.normal(jax.random.fold_in(key, i), leaf.shape, jnp.float32)
        name = jax.tree_util.keystr(path)
        if "norm" in name:
            value = 1.0 + 0.2 * noise
        elif "bias" in name:
            value = 0.3 * noise
        elif "embed" in name:
            value = 0.5 * noise
        else:
            value = noise * leaf.shape[-2] ** -0.5
        filled.append(value.astype(dtype))
    return jax.tree_util.tree_unflatten(treedef, filled)


@functools.cache
def byte_reader(layers: int = 2) -> Backbone:
    """A random reader whose tokens are bytes, made once."""
    config = tiny_config(num_layers=layers, vocab_size=262)
    params = random_params(config, jax.random.key(0))
    return Backbone("tiny", config, params, ByteTokenizer(), "0" * 64, Decoder(config))
