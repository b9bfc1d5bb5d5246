"""Text → latents → what a frozen reader is given.

The encoder is the frozen LLM itself: memory slots, one per span of text, read the text's keys and
values through LoRA'd projections. What the slots leave behind, per-layer keys and values or a
last hidden state, is put on the *wire* as one vector of width ``d_z`` per slot, and the adapter
turns the wire into a deep prefix or into soft tokens.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from latent_jax.backbones.config import DecoderConfig
from latent_jax.backbones.decoder import KV, Decoder, inverse_frequencies
from latent_jax.nn.lora import LoRA
from latent_jax.ops import attention, rope
from latent_jax.systems.latentwire.config import TASKS, ModelConfig


class Wire(NamedTuple):
    """Latents of a batch of texts; everything another process needs to read them.

    ``z[i, j]`` stands at ``positions[i, j]`` of a text of ``length[i]`` tokens; keys are stored
    before rotation, so a wire can be moved to another place in a longer context.
    """

    z: Float[Array, "b m z"]
    mask: Bool[Array, "b m"]
    positions: Int[Array, "b m"]
    length: Int[Array, " b"]


class Prefix(NamedTuple):
    """What the reader gets: a deep prefix, or soft tokens to put before the prompt.

    The prompt continues at rotary position ``start``: the latents stand where their text stood.
    """

    kv: KV | None
    embeds: Float[Array, "b m d"] | None
    mask: Bool[Array, "b m"]
    positions: Int[Array, "b m"]
    start: Int[Array, " b"]


def num_latents(tokens: int, ratio: float) -> int:
    """``ceil(tokens / ratio)``, robust to float error (12 / 1.2 is 10, not 11)."""
    return math.ceil(tokens / ratio - 1e-9)


def flatten_kv(kv: KV, inv_freq, positions) -> Float[Array, "b m z"]:
    """Post-RoPE keys and values → one vector per entry, keys un-rotated."""
    k = rope.rotate_layers(kv.k, -positions, inv_freq)
    z = jnp.stack([k, kv.v], axis=1)  # l 2 b m g d
    z = jnp.moveaxis(z, (2, 3), (0, 1))
    return z.reshape(*z.shape[:2], -1)


def unflatten_kv(z, config: DecoderConfig, inv_freq, positions, mask) -> KV:
    """Inverse of `flatten_kv` at (possibly other) positions."""
    shape = (config.num_layers, 2, config.num_kv_heads, config.head_dim)
    z = jnp.moveaxis(z.reshape(*z.shape[:2], *shape), (0, 1), (2, 3))
    return KV(rope.rotate_layers(z[:, 0], positions, inv_freq), z[:, 1], mask)


class Compressor(nn.Module):
    """Encoder, wire and adapter; everything trainable of LatentWire.

    Attributes:
      config: encoder, wire and adapter options.
      reader: architecture of the frozen LLM, which is also the encoder's body.
    """

    config: ModelConfig
    reader: DecoderConfig

    def setup(self):
        c, r = self.config, self.reader
        self.body = Decoder(r, remat=c.remat, parent=None)
        if c.encoder.lora_rank:
            e, shapes = c.encoder, r.projection_shapes
            self.lora = LoRA(
                {t: shapes[t] for t in e.lora_targets}, r.num_layers, e.lora_rank, e.lora_alpha
            )
        scale = nn.initializers.normal(0.02)
        self.memory = self.param("memory", scale, (r.hidden_size,))
        self.tasks = self.param("tasks", scale, (len(TASKS), r.hidden_size))
        width = r.kv_floats_per_token if c.encoder.output == "kv" else r.hidden_size
        if c.wire.d_z is not None:
            self.down = self.param("down", nn.initializers.orthogonal(), (width, c.wire.d_z))
            out = r.kv_floats_per_token if c.adapter.kind == "kv" else r.hidden_size
            self.up = self.param("up", nn.initializers.orthogonal(), (c.wire.d_z, out))
            # Per-dimension centre and spread of the encoder's output and of what the reader
            # expects; keys are an order of magnitude larger than values, so neither PCA nor a
            # linear map works on raw numbers.
            zeros, ones = nn.initializers.zeros, nn.initializers.ones
            self.in_mean = self.param("in_mean", zeros, (width,))
            self.in_scale = self.param("in_scale", ones, (width,))
            self.out_mean = self.param("out_mean", zeros, (out,))
            self.out_scale = self.param("out_scale", ones, (out,))

    def _raw(self, frozen, ids, mask) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Encoder output at the memory slots, their mask and positions."""
        c, r = self.config, self.reader
        b, t = ids.shape
        m = num_latents(t, c.ratio)
        slot = jnp.arange(m)
        length = mask.sum(-1)
        valid = slot[None] * c.ratio < length[:, None]
        # Middle of the slot's span, as an integer position the reader has seen in pretraining.
        positions = jnp.floor(slot * c.ratio + (c.ratio - 1) / 2).astype(jnp.int32)
        positions = jnp.broadcast_to(positions, (b, m))
        text = self.body.apply({"params": frozen}, ids, method="embed")

        # A slot starts as the mean embedding of its span: on the embedding manifold, and already
        # about its text.
        span = (jnp.arange(t) // c.ratio).astype(jnp.int32)
        weight = (span[None, :] == slot[:, None])[None] & mask[:, None, :]
        weight = weight / jnp.maximum(weight.sum(-1, keepdims=True), 1)
        memory = self.memory + jnp.einsum("bmt,btd->bmd", weight, text) * c.encoder.span_mean
        memory = memory.astype(text.dtype)

        lora = self.lora() if c.encoder.lora_rank else None
        run = lambda *a, **k: self.body.apply({"params": frozen}, *a, **k)  # noqa: E731
        if c.encoder.lora_on == "memory":
            prefix = jax.lax.stop_gradient(run(text, mask=mask).kv)
            seen = jnp.broadcast_to(valid[:, None, :], (b, m, m))
            out = run(memory, positions, valid, seen, prefix, lora)
            kv, hidden = out.kv, out.hidden
        else:
            both = jnp.concatenate([mask, valid], axis=1)
            own = attention.causal_mask(mask) if c.encoder.causal else mask[:, None, :]
            own = jnp.broadcast_to(own, (b, t, t))
            seen = jnp.zeros((b, t + m, t + m), bool)
            seen = seen.at[:, :t, :t].set(own).at[:, t:, :].set(both[:, None, :])
            where = jnp.concatenate([jnp.broadcast_to(jnp.arange(t), (b, t)), positions], axis=1)
            out = run(jnp.concatenate([text, memory], axis=1), where, both, seen, None, lora)
            kv = KV(out.kv.k[:, :, t:], out.kv.v[:, :, t:], valid)
            hidden = out.hidden[:, t:]
        if c.encoder.output == "kv":
            return flatten_kv(kv, inverse_frequencies(r), positions), valid, positions
        return hidden, valid, positions

    def compress(self, frozen, ids: Int[Array, "b t"], mask: Bool[Array, "b t"]) -> Wire:
        """Compresses right-padded texts.

        Texts longer than ``segment`` tokens are cut into segments that are compressed
        independently; ``t`` must then be a multiple of ``segment``.
        """
        c = self.config
        b, t = ids.shape
        n = max(1, t // c.segment)
        cut = lambda x: x.reshape(b * n, t // n)  # noqa: E731
        z, valid, positions = self._raw(frozen, cut(ids), cut(mask))
        if c.wire.d_z is not None:
            z = ((z - self.in_mean) * self.in_scale) @ self.down
        m = z.shape[1]
        offset = (jnp.arange(n) * (t // n))[None, :, None]
        positions = positions.reshape(b, n, m) + offset
        return Wire(
            z.reshape(b, n * m, -1),
            valid.reshape(b, n * m),
            positions.reshape(b, n * m),
            mask.sum(-1),
        )

    def prefix(self, wire: Wire, dtype=jnp.float32) -> Prefix:
        """Wire → what the reader gets."""
        c, r = self.config, self.reader
        z = wire.z
        if c.wire.d_z is not None:
            z = (z @ self.up) * self.out_scale + self.out_mean
        z = z.astype(dtype)
        kv = embeds = None
        if c.adapter.kind == "kv":
            kv = unflatten_kv(z, r, inverse_frequencies(r), wire.positions, wire.mask)
        else:
            embeds = z
        return Prefix(kv, embeds, wire.mask, wire.positions, wire.length)

    @nn.nowrap
    def informative(self, wire: Wire) -> Float[Array, "b m f"]:
        """The part of a latent that tells texts apart.

        Keys carry a large constant part in every Llama-like model (even two unrelated texts' keys
        have a cosine above 0.9), so a wire of raw keys and values is judged by its values.
        """
        c, r = self.config, self.reader
        if c.wire.d_z is not None or c.encoder.output != "kv":
            return wire.z
        shape = (r.num_layers, 2, r.num_kv_heads * r.head_dim)
        return wire.z.reshape(*wire.z.shape[:2], *shape)[:, :, :, 1].reshape(*wire.z.shape[:2], -1)

    def task_embedding(self, task: Int[Array, " b"]) -> Float[Array, "b 1 d"]:
        """The learned vector that tells the reader what to do with the latents."""
        return self.tasks[task][:, None]

    def encoder_output(self, frozen, ids, mask):
        """Raw encoder output and slot mask, for fitting the bottleneck."""
        raw, valid, _ = self._raw(frozen, ids, mask)
        return raw, valid

    def __call__(self, frozen, ids, mask) -> Prefix:
        """Touches every parameter; used for initialisation."""
        self.task_embedding(jnp.zeros((ids.shape[0],), jnp.int32))
        return self.prefix(self.compress(frozen, ids, mask))


def read(
    body: Decoder,
    frozen,
    prefix: Prefix,
    embeds: Float[Array, "b t d"],
    mask: Bool[Array, "b t"],
) -> Float[Array, "b t d"]:
    """Hidden states of a right-padded prompt that follows the latents (teacher-forced path)."""
    t = embeds.shape[1]
    positions = prefix.start[:, None] + jnp.arange(t)
    if prefix.kv is not None:
        return body.apply({"params": frozen}, embeds, positions, mask, prefix=prefix.kv).hidden
    m = prefix.embeds.shape[1]
    out = body.apply(
        {"params": frozen},
        jnp.concatenate([prefix.embeds.astype(embeds.dtype), embeds], axis=1),
        jnp.concatenate([prefix.positions, positions], axis=1),
        jnp.concatenate([prefix.mask, mask], axis=1),
    )
    return out.hidden[:, m:]
