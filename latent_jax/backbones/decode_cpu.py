"""One-token decoder steps laid out for CPUs: the same mathematics as `Decoder`, other memory.

A decode step is bound by reading every weight once for a handful of rows. Measured on XLA's CPU
backend (SmolLM2 shapes, 4 rows), what the general decoder does there costs more than twice that:

- `rows @ W` packs all of W for a few rows; `Wᵀ @ rowsᵀ` with Wᵀ stored row by row streams it (2×).
  So weights are transposed once per model and activations are kept as [features, rows].
- A scan over stacked layers copies each layer's slice of weights and cache before using it. So
  every layer has its own arrays, and the loop over layers is unrolled.
- A cache [rows, entries, heads, d] is transposed for every product; heads before entries is not.

Query/key/value and gate/up are fused and low-rank deltas merged while transposing, at no further
cost. Accelerators keep the general decoder: their matrix units have none of these problems.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from latent_jax.backbones.config import DecoderConfig
from latent_jax.backbones.decoder import KV, inverse_frequencies
from latent_jax.ops import rope
from latent_jax.ops.attention import MASKED

# Families whose layer is the one written below.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

# Below this many bytes of layer weights compiling an unrolled step costs more than it saves; above
# this many rows it was not measured to be faster.
SMALLEST_MODEL = 32 * 2**20
MOST_ROWS = 64


class LayerCache(NamedTuple):
    """One layer's keys and values, entries before the last axis."""

    k: Float[Array, "b g s d"]
    v: Float[Array, "b g s d"]
    bias: Float[Array, "b g s"] | None = None


def pays(config: DecoderConfig, params: Any, rows: int, new_tokens: int) -> bool:
    """Whether this layout is implemented and worth its set-up for a call.

    Args:
        config: architecture.
        params: concrete parameters (their placement is looked at).
        rows: batch size.
        new_tokens: tokens to decode.
    """
    if config.family not in FAMILIES or rows > MOST_ROWS or new_tokens < 8:
        return False
    leaves = jax.tree.leaves(params["layers"])
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return False
    if sum(leaf.nbytes for leaf in leaves) < SMALLEST_MODEL:
        return False
    devices = set().union(*(leaf.devices() for leaf in leaves if isinstance(leaf, jax.Array)))
    return len(devices) <= 1 and all(
        d.platform == "cpu" for d in devices or jax.local_devices()[:1]
    )


def lay_out(config: DecoderConfig, params: Any, lora: Any, dtype: Any) -> list[dict[str, Any]]:
    """Per-layer weights for `step`, from the decoder's stacked tree.

    Args:
        config: architecture.
        params: the decoder's parameters.
        lora: low-rank deltas as `Decoder` takes them, merged into the kernels here.
        dtype: compute dtype.

    Returns:
        One dict per layer: `qkv` [H·d + 2·G·d, hidden], `o`, `gate_up` [2·f, hidden], `down`, the
        norms, and with Qwen2 the fused `bias`.
    """
    dtype = jnp.dtype(dtype)
    return [
        _lay_out_layer(config, dtype, params["layers"], lora or {}, jnp.int32(i))
        for i in range(config.num_layers)
    ]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _lay_out_layer(
    config: DecoderConfig, dtype: Any, stacked: Any, lora: Any, i: Int[Array, ""]
) -> dict[str, Any]:
    """Layer `i`; the index is traced, so that one small program serves all layers."""

    def kernel(name: str) -> Array:
        w = stacked[name]["kernel"][i]
        if name in lora:
            delta = lora[name]["a"][i].astype(jnp.float32) @ lora[name]["b"][i].astype(jnp.float32)
            w = w + delta.astype(w.dtype)
        return w.T.astype(dtype)

    layer = {
        "qkv": jnp.concatenate([kernel(n) for n in ("q", "k", "v")], axis=0),
        "o": kernel("o"),
        "gate_up": jnp.concatenate([kernel(n) for n in ("gate", "up")], axis=0),
        "down": kernel("down"),
    }
    for name in ("attn_norm", "mlp_norm", *(("q_norm", "k_norm") if config.qk_norm else ())):
        layer[name] = stacked[name]["scale"][i]
    if config.qkv_bias:
        layer["bias"] = jnp.concatenate([stacked[n]["bias"][i] for n in ("q", "k", "v")])
        layer["bias"] = layer["bias"].astype(dtype)
    return layer


# The layout of the last model decoded, by the identity of its weights: (ids, dtype) -> layers.
_laid_out: dict[Any, list[dict[str, Any]]] = {}


def laid_out(config: DecoderConfig, params: Any, lora: Any, dtype: Any) -> list[dict[str, Any]]:
    """`lay_out`, remembered for the last model used without low-rank deltas.

    The copy takes the layers' size once more and goes away with the weights it was made from.
    """
    if lora is not None:
        return lay_out(config, params, lora, dtype)
    leaves = jax.tree.leaves(params["layers"])
    key = (config, tuple(id(leaf) for leaf in leaves), jnp.dtype(dtype))
    if key not in _laid_out:
        _laid_out.clear()
        _laid_out[key] = lay_out(config, params, None, dtype)
        weakref.finalize(leaves[0], _laid_out.pop, key, None)
    return _laid_out[key]


def lay_out_cache(cache: KV) -> list[LayerCache]:
    """A stacked cache as one contiguous pair of arrays per layer."""
    biases = [None] * len(cache.k)
    if cache.bias is not None:
        biases = [bias.transpose(0, 2, 1) for bias in cache.bias]
    return [
        LayerCache(k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), bias)
        for k, v, bias in zip(cache.k, cache.v, biases, strict=True)
    ]


def _norm(x: Array, scale: Array, eps: float, axis: int) -> Array:
    x32 = x.astype(jnp.float32)
    x32 *= jax.lax.rsqrt(jnp.mean(x32 * x32, axis=axis, keepdims=True) + eps)
    shape = [1] * x.ndim
    shape[axis] = -1
    return (x32 * scale.reshape(shape)).astype(x.dtype)


def _matmul(w: Float[Array, "o i"], x: Float[Array, "i b"]) -> Float[Array, "o b"]:
    # The barrier keeps XLA from turning a later transpose into the slow operand order.
    return jax.lax.optimization_barrier(w @ x)


def _attend(
    q: Float[Array, "b h d"], cache: LayerCache, valid: Bool[Array, "b s"]
) -> Float[Array, "b h d"]:
    b, h, d = q.shape
    g = cache.k.shape[1]
    q = (q * d**-0.5).reshape(b, g, h // g, d)
    logits = jnp.einsum("bgrd,bgsd->bgrs", q, cache.k, preferred_element_type=jnp.float32)
    if cache.bias is not None:
        logits = jnp.maximum(logits + cache.bias[:, :, None], MASKED)
    logits = jnp.where(valid[:, None, None], logits, MASKED)
    weights = jax.nn.softmax(logits, axis=-1).astype(cache.v.dtype)
    return jnp.einsum("bgrs,bgsd->bgrd", weights, cache.v).reshape(b, h, d)


def step(
    config: DecoderConfig,
    layers: list[dict[str, Any]],
    final_norm: Float[Array, " d"],
    embeds: Float[Array, "b d"],
    positions: Int[Array, " b"],
    caches: list[LayerCache],
    valid: Bool[Array, "b s"],
    slot: Int[Array, ""],
) -> tuple[Float[Array, "d b"], list[LayerCache]]:
    """One new token of every row.

    Args:
        config: architecture.
        layers: from `lay_out`.
        final_norm: scale of the last norm.
        embeds: the tokens' embeddings.
        positions: their rotary positions.
        caches: from `lay_out_cache`; `slot` is written.
        valid: entries each row may see, the new one included.
        slot: where the new keys and values go.

    Returns:
        (hidden states after the final norm, features first; caches).
    """
    c, b = config, embeds.shape[0]
    heads, groups, d = c.num_heads, c.num_kv_heads, c.head_dim
    inv_freq = jnp.asarray(inverse_frequencies(c))
    x = embeds.T
    updated = []
    for w, cache in zip(layers, caches, strict=True):
        qkv = _matmul(w["qkv"], _norm(x, w["attn_norm"], c.norm_eps, 0)).T
        if c.qkv_bias:
            qkv = qkv + w["bias"]
        qkv = qkv.reshape(b, 1, heads + 2 * groups, d)
        q, k, v = jnp.split(qkv, np.cumsum([heads, groups]), axis=2)
        if c.qk_norm:
            q, k = _norm(q, w["q_norm"], c.norm_eps, 3), _norm(k, w["k_norm"], c.norm_eps, 3)
        q = rope.rotate(q, positions[:, None], inv_freq)
        k = rope.rotate(k, positions[:, None], inv_freq)
        at = (0, 0, slot, 0)
        cache = LayerCache(
            jax.lax.dynamic_update_slice(cache.k, k.transpose(0, 2, 1, 3), at),
            jax.lax.dynamic_update_slice(cache.v, v.transpose(0, 2, 1, 3), at),
            cache.bias,
        )
        updated.append(cache)
        out = _attend(q[:, 0], cache, valid)
        x = x + _matmul(w["o"], out.reshape(b, -1).T)
        gate_up = _matmul(w["gate_up"], _norm(x, w["mlp_norm"], c.norm_eps, 0))
        gate, up = jnp.split(gate_up, 2, axis=0)
        x = x + _matmul(w["down"], jax.nn.silu(gate) * up)
    return _norm(x, final_norm, c.norm_eps, 0), updated


def unembed(config: DecoderConfig, params: Any, hidden: Float[Array, "d b"]) -> Float[Array, "b v"]:
    """Logits, fp32. An untied head [d, v] is used as it is: transposing it would double it."""
    if config.tie_embeddings and hidden.shape[1] == 1:  # one row: XLA's own matrix-vector product
        logits = params["embed"].astype(hidden.dtype) @ hidden[:, 0]
        return logits.astype(jnp.float32)[None]
    if config.tie_embeddings:
        return _matmul(params["embed"].astype(hidden.dtype), hidden).astype(jnp.float32).T
    return (hidden.T @ params["head"].astype(hidden.dtype)).astype(jnp.float32)
