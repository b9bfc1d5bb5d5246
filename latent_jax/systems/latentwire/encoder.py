"""Text → what the encoder's slots leave behind.

The encoder is the frozen LLM itself (or its first layers), with one slot per span of text: slots
read the text's keys and values through LoRA'd projections or trained layers, or pool those of their
own span linearly. Other slots sum up vectors of the LLM's, or of the text's bytes.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from latent_jax.backbones.config import DecoderConfig
from latent_jax.backbones.decoder import KV, Decoder, inverse_frequencies
from latent_jax.backbones.first_layers import first_config, first_params
from latent_jax.backbones.sink import behind, repeat, sink_kv
from latent_jax.nn.lora import LoRA
from latent_jax.ops import attention
from latent_jax.systems.latentwire import codes, full_encoder, heads
from latent_jax.systems.latentwire.anchor_encoder import AnchorEncoder, alignment, semantic_anchor
from latent_jax.systems.latentwire.latents import flatten_kv
from latent_jax.systems.latentwire.model_config import ModelConfig
from latent_jax.systems.latentwire.pool import KVPool, num_latents, real_slots, span_means, spans
from latent_jax.systems.latentwire.separate_encoder import Body, separate_states
from latent_jax.systems.latentwire.vectors import LONGEST, ByteEncoder, VectorPool


class Encoder(nn.Module):
    """Slots over texts; what `Compressor` puts on the wire.

    Attributes:
      config: encoder, wire and adapter options.
      reader: architecture of the frozen LLM, which is also the encoder's body.
      sink: token before the encoder's text and before the latents, usually BOS; None for none.
      carrier: tokens of ``adapter.carrier``.
      separate: of ``encoder.backbone``; None where the reader encodes.
    """

    config: ModelConfig
    reader: DecoderConfig
    sink: int | None = None
    carrier: tuple[int, ...] = ()
    separate: Body | None = None

    def setup(self):
        c, r = self.config, self.reader
        # The LLM, or what encodes of it.
        layers = 0 if c.encoder.backbone else c.encoder.layers
        own = self.own = first_config(r, layers)
        self.body = Decoder(own, remat=c.remat, parent=None)
        if c.encoder.pools:
            self.pool = KVPool(own, c.ratio, c.encoder.pool_start)
        if c.encoder.slots == "both":
            # Closed at first: the pooled slots learn undisturbed by what memory slots start with.
            self.gate = self.param("gate", nn.initializers.zeros, (own.num_layers,))
        if c.encoder.slots == "heads":
            self.calibrated()
            each = r.num_layers, r.num_kv_heads
            self.factor = self.param("factor", nn.initializers.zeros, each)
            if n := c.rebuild_entries:
                shape = (r.num_layers, n, r.num_kv_heads, 2 * r.head_dim)
                self.asking = self.param("asking", nn.initializers.normal(0.02), shape)
        if c.encoder.vectors:
            self.pool = VectorPool(c.encoder.pooler, c.ratio, c.segment)
        if c.encoder.slots == "anchor":
            e = c.encoder
            self.pool = AnchorEncoder(e.anchor_width, e.anchor_layers, c.ratio, c.segment)
        if c.encoder.slots == "bytes":
            blank = jnp.full((r.vocab_size, LONGEST), -1.0)
            self.spelling = self.param("spelling", lambda _: blank)  # `vectors.spelling`, measured
            self.bytes = ByteEncoder(r.hidden_size, c.encoder.byte_layers)
        if c.encoder.whole:
            hidden = c.encoder.output == "hidden"
            self.moved = self.param(full_encoder.PART, lambda _: full_encoder.blank(own, hidden))
        if c.encoder.adapts:
            e, shapes = c.encoder, r.projection_shapes
            self.lora = LoRA(
                {t: shapes[t] for t in e.lora_targets}, own.num_layers, e.lora_rank, e.lora_alpha
            )
        scale = nn.initializers.normal(0.02)
        if c.encoder.remembers:
            self.memory = self.param("memory", scale, (r.hidden_size,))
        if private := sum(c.private_slots.values()):
            self.private = self.param("private", scale, (private, r.hidden_size))

    @property
    def width(self) -> int:
        """Numbers that a slot leaves behind."""
        kv = self.config.encoder.output == "kv"
        if self.separate is not None and self.config.encoder.slots == "states":
            return self.separate.config.hidden_size
        return self.own.kv_floats_per_token if kv else self.reader.hidden_size

    def calibrated(self) -> None:
        """Parameters that texts replace (`heads.calibrate`)."""
        blank = heads.Calibration.blank(self.reader)._asdict()
        made = {name: self.param(name, lambda _, x=x: x) for name, x in blank.items()}
        self.measured = heads.Calibration(**made)

    def _known(self) -> heads.Calibration:
        found = jax.lax.stop_gradient(self.measured)  # measured, not trained
        return found._replace(profile=found.profile * jnp.exp(self.factor)[..., None])

    def _raw(
        self, frozen, ids, mask, start: int = 0, before: KV | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Encoder output at the slots, their mask and positions.

        Args:
          start: where the segment begins in its text.
          before: keys and values that it is read behind (`encoder.carry`).
        """
        c, r = self.config, self.own
        if self.separate is None:
            frozen = first_params(frozen, c.encoder.layers)
        b, t = ids.shape
        m = num_latents(t, c.ratio)
        slot = jnp.arange(m)
        valid = real_slots(mask.sum(-1), t, c.ratio)
        # Middle of the slot's span, as an integer position the reader has seen in pretraining.
        positions = jnp.floor(slot * c.ratio + (c.ratio - 1) / 2).astype(jnp.int32)
        positions = jnp.broadcast_to(start + positions, (b, m))
        if c.encoder.slots == "heads":
            sink = None if self.sink is None else jnp.int32(self.sink)
            z = heads.encode(
                self.body, frozen, self._known(), ids, mask, valid, sink, c.encoder.places
            )
            return z, valid, positions
        if c.encoder.slots == "bytes":
            spelled = jax.lax.stop_gradient(self.spelling)[ids].astype(jnp.int32)
            return self.pool(self.bytes(spelled, mask), mask), valid, positions
        if self.separate is not None and c.encoder.slots == "states":
            states = separate_states(self.separate, frozen, ids, mask)
            return self.pool(states, mask), valid, positions
        text = self.body.apply({"params": frozen}, ids, method="embed")
        if c.encoder.slots == "embedded":
            return self.pool(text, mask), valid, positions
        sink = None
        if self.sink is not None:
            sink = sink_kv(self.body, frozen, jnp.int32(self.sink), b)
        first, places = behind(sink, before), jnp.broadcast_to(start + jnp.arange(t), (b, t))
        if c.encoder.slots in ("states", "anchor"):
            if self.separate is not None:
                states = separate_states(self.separate, frozen, ids, mask)
            else:
                states = self._states(frozen, text, mask, places, first)
            if c.encoder.slots == "states":
                return self.pool(states, mask), valid, positions
            anchor = semantic_anchor(states, mask)
            z, _, said = self.pool(text, mask, anchor)
            self.sow(codes.TOLD, "anchor", alignment(said, anchor, mask.any(-1)))
            return z, valid, positions
        if c.encoder.lora_on == "all" and c.encoder.slots == "memory":
            kv, hidden = self._adapted(frozen, text, mask, places, valid, positions, first)
        else:
            run = self.body.apply({"params": frozen}, text, places, mask, prefix=first).kv
            if before is None:  # else what was carried learns from what the text makes of it
                run = jax.lax.stop_gradient(run)
            kv, hidden = self._untouched(frozen, run, text, valid, positions, sink, first)
            if any(c.private_slots.values()):
                cache = behind(first, run)
                own, there, where = self._private(frozen, cache, text, mask, start)
                kv = KV(
                    jnp.concatenate([kv.k, own.kv.k], axis=2),
                    jnp.concatenate([kv.v, own.kv.v], axis=2),
                    jnp.concatenate([valid, there], axis=1),
                )
                if hidden is not None:
                    hidden = jnp.concatenate([hidden, own.hidden], 1)
                valid, positions = kv.mask, jnp.concatenate([positions, where], 1)
        if c.encoder.output == "kv":
            return flatten_kv(kv, inverse_frequencies(r), positions), valid, positions
        return hidden, valid, positions

    def _trained(self, frozen) -> tuple[Any, Any]:
        """Weights of the layers that are trained, and what is added to their projections."""
        if self.config.encoder.whole:
            return full_encoder.added(frozen, self.moved), None
        return frozen, self.lora() if self.config.encoder.adapts else None

    def _states(self, frozen, text, mask, places, first) -> Float[Array, "b t d"]:
        """The LLM's last states on texts, adapted or not."""
        e = self.config.encoder
        seen = None if e.causal else jnp.broadcast_to(mask[:, None], (*mask.shape, mask.shape[1]))
        own, lora = self._trained(frozen)
        return self.body.apply({"params": own}, text, places, mask, seen, first, lora).hidden

    def _private(self, frozen, cache: KV, text, mask, start):
        """Slots of single readers, which see all of the segment, spread evenly over it."""
        p, length = len(self.private), mask.sum(-1, keepdims=True)
        where = start + jnp.floor((jnp.arange(p) + 0.5) * length / p).astype(jnp.int32)
        there = jnp.broadcast_to(length > 0, where.shape)
        slots = jnp.broadcast_to(self.private, (len(mask), *self.private.shape)).astype(text.dtype)
        own, lora = self._trained(frozen)
        seen = jnp.broadcast_to(there[:, None, :], (*where.shape, p))
        out = self.body.apply({"params": own}, slots, where, there, seen, cache, lora)
        return out, there, where

    def _memory(self, text, mask, m) -> Float[Array, "b m d"]:
        """Inputs of memory slots: the mean embedding of the span, on the embedding manifold and
        already about its text, plus one learned vector.
        """
        mean = span_means(text, mask, m, self.config.ratio)
        return (self.memory + mean * self.config.encoder.span_mean).astype(text.dtype)

    def _untouched(self, frozen, cache: KV, text, valid, positions, sink, first):
        """Slots over the cache of the unadapted LLM: no backward pass over the text."""
        c = self.config
        b, m = valid.shape
        pooled = kv = hidden = None
        if c.encoder.pools:
            pooled = self.pool(cache, valid, positions)
        if c.encoder.remembers:
            memory = self._memory(text, cache.mask, m)
            weights, lora = self._trained(frozen)
            prefix, rows = behind(first, cache), (b, m)
            if c.encoder.view == "span":
                # Each slot is a row of its own, behind the few tokens of its span.
                prefix, rows = behind(repeat(sink, m), spans(cache, c.ratio)), (b * m, 1)
            own = valid.reshape(rows)
            seen = jnp.broadcast_to(own[:, None, :], (*rows, rows[1]))
            out = self.body.apply(
                {"params": weights}, memory.reshape(*rows, -1), positions.reshape(rows), own, seen,
                prefix, lora,
            )  # fmt: skip
            shape = (out.kv.k.shape[0], b, m, *out.kv.k.shape[3:])
            kv = KV(out.kv.k.reshape(shape), out.kv.v.reshape(shape), valid)
            hidden = out.hidden.reshape(b, m, -1)
        if pooled is not None and kv is not None:
            gate = self.gate[:, None, None, None, None].astype(text.dtype)
            return KV(pooled.k + gate * kv.k, pooled.v + gate * kv.v, valid), hidden
        return (kv if pooled is None else pooled), hidden

    def _adapted(self, frozen, text, mask, places, valid, positions, first):
        """Text and slots in one pass of the adapted LLM."""
        c = self.config
        (b, t), m = mask.shape, valid.shape[1]
        both = jnp.concatenate([mask, valid], axis=1)
        own = attention.causal_mask(mask) if c.encoder.causal else mask[:, None, :]
        own = jnp.broadcast_to(own, (b, t, t))
        seen = jnp.zeros((b, t + m, t + m), bool)
        seen = seen.at[:, :t, :t].set(own).at[:, t:, :].set(both[:, None, :])
        where = jnp.concatenate([places, positions], axis=1)
        x = jnp.concatenate([text, self._memory(text, mask, m)], axis=1)
        weights, lora = self._trained(frozen)
        out = self.body.apply({"params": weights}, x, where, both, seen, first, lora)
        return KV(out.kv.k[:, :, t:], out.kv.v[:, :, t:], valid), out.hidden[:, t:]
