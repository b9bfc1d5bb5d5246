"""One decoder for every Llama-like family: embeddings in, hidden states and keys/values out.

There is a single memory mechanism. A KV cache, a deep prefix of latents and a selected subset of
another prefill are all a `KV` that the decoder reads and never writes; each call returns the `KV`
of its own tokens and the caller decides what to keep.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from latent_jax.backbones import cross_blocks
from latent_jax.backbones.config import DecoderConfig
from latent_jax.backbones.cross_blocks import CrossBlocks
from latent_jax.ops import attention, rope
from latent_jax.sharding.rules import constrain


class KV(NamedTuple):
    """Keys (post-RoPE) and values of ``m`` entries in every layer, and which of them are valid.

    As a prefix its mask may also be ``[b t m]``: what each of the call's tokens sees of it. A
    prefix may weigh its entries: ``bias`` is added to their logits, and `MASKED` hides an entry
    from one head of one layer, so that heads may hold different numbers of them. ``cross`` are
    blocks in front of some layers that read a memory of their own, beside the entries.
    """

    k: Float[Array, "l b m g d"]
    v: Float[Array, "l b m g d"]
    mask: Bool[Array, "b m"] | Bool[Array, "b t m"]
    bias: Float[Array, "l b m g"] | None = None
    cross: CrossBlocks | None = None


class DecoderOutput(NamedTuple):
    """``hidden`` is after the final norm; ``kv`` holds the call's own tokens only."""

    hidden: Float[Array, "b t d"]
    kv: KV


class _Norm(nn.Module):
    eps: float

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        x32 *= jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (x32 * scale).astype(x.dtype)


class _Dense(nn.Module):
    """``x @ kernel (+ bias)`` with an optional low-rank delta handed in by the caller.

    The delta is an argument and not a parameter, so that one frozen tree serves as encoder (with
    LoRA) and as reader (without) in the same step.
    """

    features: int
    use_bias: bool = False

    @nn.compact
    def __call__(self, x, lora=None):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        y = x @ kernel.astype(x.dtype)
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)
        if lora is not None:
            # Small: gathered whole, except along what the kernel's own product is split by.
            out = None if self.name in ("o", "down") else "heads"
            a, b = constrain(lora["a"], None, None), constrain(lora["b"], None, out)
            y += (x @ a.astype(x.dtype)) @ b.astype(x.dtype)
        return y


class _Layer(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self, x, lora, prefix_k, prefix_v, prefix_bias, inv_freq, cross, shared):
        c = self.config
        positions, mask, prefix_mask, memory_mask = shared
        if cross is not None:
            own = cross_blocks.CrossBlocks(*cross, memory_mask)
            x = cross_blocks.apply(x, own, positions, inv_freq, c.norm_eps)
        b, t, _ = x.shape
        lora = lora or {}

        def dense(name, features, inputs, bias=False):
            return _Dense(features, bias, name=name)(inputs, lora.get(name))

        h = _Norm(c.norm_eps, name="attn_norm")(x)
        q = dense("q", c.num_heads * c.head_dim, h, c.qkv_bias)
        k = dense("k", c.num_kv_heads * c.head_dim, h, c.qkv_bias)
        v = dense("v", c.num_kv_heads * c.head_dim, h, c.qkv_bias)
        q = _by_heads(q.reshape(b, t, c.num_heads, c.head_dim), c)
        k = _by_heads(k.reshape(b, t, c.num_kv_heads, c.head_dim), c)
        v = _by_heads(v.reshape(b, t, c.num_kv_heads, c.head_dim), c)
        if c.qk_norm:
            q, k = _Norm(c.norm_eps, name="q_norm")(q), _Norm(c.norm_eps, name="k_norm")(k)
        q, k = rope.rotate(q, positions, inv_freq), rope.rotate(k, positions, inv_freq)
        out = attention.attend(
            q, k, v, mask, prefix_k, prefix_v, prefix_mask, prefix_bias, c.query_scale
        )
        out = dense("o", c.hidden_size, out.reshape(b, t, -1))
        if c.post_norms:
            out = _Norm(c.norm_eps, name="attn_post_norm")(out)
        x = constrain(x + out, *_STREAM)

        h = _Norm(c.norm_eps, name="mlp_norm")(x)
        gate = dense("gate", c.intermediate_size, h)
        up = dense("up", c.intermediate_size, h)
        inner = constrain(_ACTIVATIONS[c.activation](gate) * up, "batch", "length", "mlp")
        out = dense("down", c.hidden_size, inner)
        if c.post_norms:
            out = _Norm(c.norm_eps, name="mlp_post_norm")(out)
        return constrain(x + out, *_STREAM), (k, v)


_ACTIVATIONS = {"silu": nn.silu, "gelu_tanh": functools.partial(nn.gelu, approximate=True)}

# The residual stream is split by examples alone: each device then gathers a layer's weights, and
# never trades parts of activations with the others.
_STREAM = ("batch", "length", None)


def _by_heads(x, config: DecoderConfig):
    """Keeps ``[b t heads d]`` split by groups of heads, where the mesh divides them; else whole."""
    mesh = jax.sharding.get_abstract_mesh()
    split = not mesh.empty and config.num_kv_heads % mesh.shape.get("tensor", 1) == 0
    return constrain(x, "batch", "length", "heads" if split else None, None)


class Decoder(nn.Module):
    """Decoder over input embeddings.

    Attributes:
      config: the architecture.
      remat: recompute each layer's activations in the backward pass.
    """

    config: DecoderConfig
    remat: bool = False

    def setup(self):
        c = self.config
        self.embedding = self.param(
            "embed", nn.initializers.normal(0.02), (c.vocab_size, c.hidden_size)
        )
        if not c.tie_embeddings:
            self.head = self.param(
                "head", nn.initializers.lecun_normal(), (c.hidden_size, c.vocab_size)
            )
        layer = nn.remat(_Layer, prevent_cse=False) if self.remat else _Layer
        self.layers = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, 0, 0, 0, 0, nn.broadcast),
            length=c.num_layers,
        )(c)
        self.final_norm = _Norm(c.norm_eps)

    @property
    def inv_freq(self):
        """Rotary inverse frequencies of this architecture; see `inverse_frequencies`."""
        return inverse_frequencies(self.config)

    def __call__(
        self,
        inputs_embeds: Float[Array, "b t d"],
        positions: Int[Array, "b t"] | None = None,
        mask: Bool[Array, "b t"] | None = None,
        attention_mask: Bool[Array, "b t t"] | None = None,
        prefix: KV | None = None,
        lora: Any = None,
    ) -> DecoderOutput:
        """Runs all layers.

        Args:
          inputs_embeds: token embeddings or soft tokens; their dtype is the compute dtype.
          positions: rotary positions, ``0..t-1`` by default.
          mask: valid tokens (left or right padding), all by default; attention is causal over them.
          attention_mask: replaces the causal mask among the call's own tokens.
          prefix: keys and values that every token sees, or those that its mask says.
          lora: ``{projection: {'a': [l, in, r], 'b': [l, r, out]}}`` for any of q, k, v, o, gate,
            up, down.
        """
        b, t, _ = inputs_embeds.shape
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(t), (b, t))
        if mask is None:
            mask = jnp.ones((b, t), bool)
        if attention_mask is None:
            attention_mask = attention.causal_mask(mask)
        pk, pv, pm, bias, cross = (None,) * 5 if prefix is None else prefix
        waves = jnp.asarray(self.inv_freq)
        waves = jnp.broadcast_to(waves, (self.config.num_layers, waves.shape[-1]))
        inputs_embeds = constrain(inputs_embeds, *_STREAM)
        shared = (positions, attention_mask, pm, None if cross is None else cross.mask)
        blocks = None if cross is None else (cross.on, cross.weights, cross.k, cross.v)
        x, (k, v) = self.layers(inputs_embeds, lora, pk, pv, bias, waves, blocks, shared)
        return DecoderOutput(self.final_norm(x), KV(k, v, mask))

    def embed(self, ids: Int[Array, "b t"], dtype=None) -> Float[Array, "b t d"]:
        """Input embeddings of token ids."""
        table = constrain(self.embedding, "vocab", None)
        x = constrain(jnp.take(table, ids, axis=0), *_STREAM)
        return x if dtype is None else x.astype(dtype)

    def unembed(self, hidden: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """Logits of hidden states, fp32."""
        tied = self.config.tie_embeddings
        axes = ("vocab", None) if tied else (None, "vocab")
        table = constrain(self.embedding if tied else self.head, *axes)
        logits = jnp.einsum(
            "btd,vd->btv" if tied else "btd,dv->btv", hidden, table.astype(hidden.dtype),
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        if tied and self.config.embed_scale != 1:
            logits = logits / self.config.embed_scale
        return constrain(logits, "batch", "length", "vocab")


def inverse_frequencies(config: DecoderConfig):
    """Rotary inverse frequencies of an architecture, ``[head_dim / 2]`` float32; ``[layers,
    head_dim / 2]`` where layers differ.
    """
    s = config.rope_scaling
    if config.local_theta is not None:
        thetas = [
            config.local_theta if (i + 1) % config.global_every else config.rope_theta
            for i in range(config.num_layers)
        ]
        return np.stack([rope.inverse_frequencies(config.head_dim, t) for t in thetas])
    if s is None:
        return rope.inverse_frequencies(config.head_dim, config.rope_theta)
    return rope.inverse_frequencies(
        config.head_dim,
        config.rope_theta,
        factor=s.factor,
        low_freq_factor=s.low_freq_factor,
        high_freq_factor=s.high_freq_factor,
        original_max_position=s.original_max_position,
    )
