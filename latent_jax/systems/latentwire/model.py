"""Text → latents → what a frozen reader is given.

The encoder is the frozen LLM itself, with one slot per span of text: slots read the text's keys and
values through LoRA'd projections, or pool those of their own span linearly. What the slots leave
behind, per-layer keys and values or a last hidden state, is put on the *wire* as one vector of
width ``d_z`` per slot, and the adapter turns the wire into a deep prefix or into soft tokens.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from latent_jax.backbones.config import DecoderConfig
from latent_jax.backbones.decoder import KV, Decoder, inverse_frequencies
from latent_jax.backbones.first_layers import first_config, first_params
from latent_jax.backbones.sink import behind, repeat, sink_kv
from latent_jax.core.types import Mean
from latent_jax.nn.lora import LoRA
from latent_jax.ops import attention
from latent_jax.ops.fsq import fsq_bound
from latent_jax.ops.vq import straight_through
from latent_jax.systems.latentwire import codes, heads, reader_lora
from latent_jax.systems.latentwire.adapters import Adapter
from latent_jax.systems.latentwire.carry import carried
from latent_jax.systems.latentwire.config import TASKS, ModelConfig
from latent_jax.systems.latentwire.latents import (
    Prefix,
    Wire,
    expanded,
    flatten_kv,
    own_slots,
    split_segments,
    unflatten_kv,
)
from latent_jax.systems.latentwire.pool import KVPool, num_latents, span_means, spans
from latent_jax.systems.latentwire.reading import read
from latent_jax.systems.latentwire.vectors import LONGEST, ByteEncoder, Refiner, VectorPool

__all__ = [
    "Compressor", "Prefix", "Wire", "flatten_kv", "num_latents", "own_slots", "read",
    "split_segments", "unflatten_kv",
]  # fmt: skip


class Compressor(nn.Module):
    """Encoder, wire and adapter; everything trainable of LatentWire.

    Attributes:
      config: encoder, wire and adapter options.
      reader: architecture of the frozen LLM, which is also the encoder's body.
      sink: token before the encoder's text and before the latents, usually BOS; None for none.
    """

    config: ModelConfig
    reader: DecoderConfig
    sink: int | None = None

    def setup(self):
        c, r = self.config, self.reader
        own = self.own = first_config(r, c.encoder.layers)  # the LLM, or what encodes of it
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
        if c.encoder.slots == "bytes":
            blank = jnp.full((r.vocab_size, LONGEST), -1.0)
            self.spelling = self.param("spelling", lambda _: blank)  # `vectors.spelling`, measured
            self.bytes = ByteEncoder(r.hidden_size, c.encoder.byte_layers)
        if c.encoder.refiner:
            self.refiner = Refiner(c.encoder.refiner)
        if not c.adapter.plain:
            self.adapter = Adapter(c.adapter)
        if c.encoder.adapts:
            e, shapes = c.encoder, r.projection_shapes
            self.lora = LoRA(
                {t: shapes[t] for t in e.lora_targets}, own.num_layers, e.lora_rank, e.lora_alpha
            )
        if c.reader_lora.rank:
            self.reader_lora = reader_lora.make(c.reader_lora, r)
        scale = nn.initializers.normal(0.02)
        if c.encoder.remembers:
            self.memory = self.param("memory", scale, (r.hidden_size,))
        if private := sum(c.private_slots.values()):
            self.private = self.param("private", scale, (private, r.hidden_size))
        self.tasks = self.param("tasks", scale, (len(TASKS), r.hidden_size))
        if c.prompt_tokens:
            self.prompt = self.param("prompt", scale, (c.prompt_tokens, r.hidden_size))
        width = own.kv_floats_per_token if c.encoder.output == "kv" else r.hidden_size
        if c.wire.d_z is not None:
            self.down = self.param("down", nn.initializers.orthogonal(), (width, c.wire.d_z))
            if c.wire.levels:
                spread = nn.initializers.ones
                self.level_scale = self.param("level_scale", spread, (c.wire.d_z,))
            if c.wire.codes:
                self.rvq = codes.quantiser(c.wire.d_z, c.wire.codes, c.wire.stages)
            out = r.kv_floats_per_token if c.adapter.kind == "kv" else r.hidden_size
            out *= c.adapter.entries
            self.up = self.param("up", nn.initializers.orthogonal(), (c.wire.d_z, out))
            # Per-dimension centre and spread of the encoder's output and of what the reader
            # expects; keys are an order of magnitude larger than values, so neither PCA nor a
            # linear map works on raw numbers.
            zeros, ones = nn.initializers.zeros, nn.initializers.ones
            self.in_mean = self.param("in_mean", zeros, (width,))
            self.in_scale = self.param("in_scale", ones, (width,))
            self.out_mean = self.param("out_mean", zeros, (out,))
            self.out_scale = self.param("out_scale", ones, (out,))

    def _raw(
        self, frozen, ids, mask, start: int = 0, before: KV | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Encoder output at the slots, their mask and positions.

        Args:
          start: where the segment begins in its text.
          before: keys and values that it is read behind (`encoder.carry`).
        """
        c, r = self.config, self.own
        frozen = first_params(frozen, c.encoder.layers)
        b, t = ids.shape
        m = num_latents(t, c.ratio)
        slot = jnp.arange(m)
        valid = slot[None] * c.ratio < mask.sum(-1)[:, None]
        # Middle of the slot's span, as an integer position the reader has seen in pretraining.
        positions = jnp.floor(slot * c.ratio + (c.ratio - 1) / 2).astype(jnp.int32)
        positions = jnp.broadcast_to(start + positions, (b, m))
        if c.encoder.slots == "heads":
            sink = None if self.sink is None else jnp.int32(self.sink)
            z = heads.encode(self.body, frozen, self._known(), ids, mask, valid, sink)
            return z, valid, positions
        if c.encoder.slots == "bytes":
            codes = jax.lax.stop_gradient(self.spelling)[ids].astype(jnp.int32)
            return self.pool(self.bytes(codes, mask), mask), valid, positions
        text = self.body.apply({"params": frozen}, ids, method="embed")
        if c.encoder.slots == "embedded":
            return self.pool(text, mask), valid, positions
        sink = None
        if self.sink is not None:
            sink = sink_kv(self.body, frozen, jnp.int32(self.sink), b)
        first, places = behind(sink, before), jnp.broadcast_to(start + jnp.arange(t), (b, t))
        if c.encoder.slots == "states":
            states = self._states(frozen, text, mask, places, first)
            return self.pool(states, mask), valid, positions
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

    def _states(self, frozen, text, mask, places, first) -> Float[Array, "b t d"]:
        """The LLM's last states on texts, adapted or not."""
        e = self.config.encoder
        seen = None if e.causal else jnp.broadcast_to(mask[:, None], (*mask.shape, mask.shape[1]))
        lora = self.lora() if e.adapts else None
        return self.body.apply({"params": frozen}, text, places, mask, seen, first, lora).hidden

    def _private(self, frozen, cache: KV, text, mask, start):
        """Slots of single readers, which see all of the segment, spread evenly over it."""
        p, length = len(self.private), mask.sum(-1, keepdims=True)
        where = start + jnp.floor((jnp.arange(p) + 0.5) * length / p).astype(jnp.int32)
        there = jnp.broadcast_to(length > 0, where.shape)
        slots = jnp.broadcast_to(self.private, (len(mask), *self.private.shape)).astype(text.dtype)
        lora = self.lora() if self.config.encoder.lora_rank else None
        seen = jnp.broadcast_to(there[:, None, :], (*where.shape, p))
        out = self.body.apply({"params": frozen}, slots, where, there, seen, cache, lora)
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
            lora = self.lora() if c.encoder.lora_rank else None
            prefix, rows = behind(first, cache), (b, m)
            if c.encoder.view == "span":
                # Each slot is a row of its own, behind the few tokens of its span.
                prefix, rows = behind(repeat(sink, m), spans(cache, c.ratio)), (b * m, 1)
            own = valid.reshape(rows)
            seen = jnp.broadcast_to(own[:, None, :], (*rows, rows[1]))
            out = self.body.apply(
                {"params": frozen}, memory.reshape(*rows, -1), positions.reshape(rows), own, seen,
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
        lora = self.lora() if c.encoder.lora_rank else None
        out = self.body.apply({"params": frozen}, x, where, both, seen, first, lora)
        return KV(out.kv.k[:, :, t:], out.kv.v[:, :, t:], valid), out.hidden[:, t:]

    def compress(
        self, frozen, ids: Int[Array, "b t"], mask: Bool[Array, "b t"], train: bool = False
    ) -> Wire:
        """Compresses right-padded texts.

        Texts longer than ``segment`` tokens are cut into segments that are compressed
        independently, or one after another (``encoder.carry``); ``t`` must then be a multiple of
        ``segment``. In training codebooks move, where their collection is mutable.
        """
        c = self.config
        b, t = ids.shape
        n = max(1, t // c.segment)
        if c.encoder.carry and n > 1:
            return carried(self, frozen, ids, mask, n, train)
        cut = lambda x: x.reshape(b * n, t // n)  # noqa: E731
        wire = self.encoded(frozen, cut(ids), cut(mask), train)
        offset = jnp.tile(jnp.arange(n) * (t // n), b)[:, None]
        wire = wire._replace(positions=wire.positions + offset, length=None)
        joined = lambda x: x.reshape(b, n * x.shape[1], *x.shape[2:])  # noqa: E731
        return jax.tree.map(joined, wire)._replace(length=mask.sum(-1))

    def encoded(
        self, frozen, ids, mask, train: bool = False, start: int = 0, before: KV | None = None
    ) -> Wire:
        """The wire of one segment each; see `_raw`."""
        c, digits = self.config, None
        z, valid, positions = self._raw(frozen, ids, mask, start, before)
        if c.wire.d_z is not None:
            z = ((z - self.in_mean) * self.in_scale) @ self.down
        if c.encoder.refiner:
            z = self.refiner(z, valid, positions - start)
        if c.wire.levels:
            z = self._rounded(z)
        if c.wire.codes:
            z, digits = self._coded(z, valid, train)
        return Wire(z, valid, positions, mask.sum(-1), digits)

    def _coded(self, z: Float[Array, "b m z"], valid: Bool[Array, "b m"], train: bool):
        """Latents as sums of codes, and the digits of these."""
        out = self.rvq(z, valid, train=train)
        if not train:  # to the last bit what whoever has only the digits makes of them
            return self.from_digits(out.indices), out.indices
        power = jnp.sum(jnp.square(z.astype(jnp.float32)) * valid[..., None])
        self.sow(codes.TOLD, "commitment", out.losses["commitment"])
        self.sow(codes.TOLD, "wire_error", Mean(out.metrics["quantisation_error"].sum, power))
        self.sow(codes.TOLD, "codes_used", out.metrics["perplexity"][0])
        return out.quantized, out.indices

    def from_digits(self, digits: Int[Array, "b m s"]) -> Float[Array, "b m z"]:
        """The latents that digits stand for; -1 adds nothing."""
        return self.rvq.decode(digits)

    def _rounded(self, z: Float[Array, "b m z"]) -> Float[Array, "b m z"]:
        """Every number on one of a few levels (FSQ, Mentzer et al. 2023), at its own scale."""
        scale, levels = jax.lax.stop_gradient(self.level_scale), (self.config.wire.levels,)
        x = fsq_bound(z.astype(jnp.float32)[..., None] / scale[:, None], levels)[..., 0]
        return straight_through(x, jnp.round(x)) / (levels[0] // 2) * scale

    def prefix(self, wire: Wire, dtype=jnp.float32, frozen=None) -> Prefix:
        """Wire → what the reader gets.

        Args:
          wire: of `compress`.
          dtype: of what the reader gets.
          frozen: the LLM's parameters, for adapters that look at its vocabulary.
        """
        c, r = self.config, self.reader
        wire = own_slots(wire, c)
        z = wire.z
        if c.wire.d_z is not None:
            z = (z @ self.up) * self.out_scale + self.out_mean
        if c.adapter.entries > 1:
            wire, z = expanded(wire, z, c.adapter.entries, c.ratio)
        if not c.adapter.plain:
            z = self.adapter(wire.z, z, wire.mask, None if frozen is None else frozen["embed"])
        z = z.astype(dtype)
        sink = None if self.sink is None else jnp.int32(self.sink)
        if c.encoder.slots == "heads":
            # Its entries stand where their tokens stood: what follows them is at the text's end.
            kv = heads.decode(r, self._known(), wire._replace(z=z), c.segment, c.ratio)
            return Prefix(kv, None, wire.mask, wire.positions, wire.length, sink)
        kv = embeds = None
        if c.adapter.kind == "kv":
            kv = unflatten_kv(z, r, inverse_frequencies(r), wire.positions, wire.mask)
        else:
            embeds = z
        start = wire.length
        if c.follow == "segment":
            start = -(-wire.length // c.segment) * c.segment
        return Prefix(kv, embeds, wire.mask, wire.positions, start, sink)

    def calibrated(self) -> None:
        """Parameters that texts replace (`heads.calibrate`)."""
        blank = heads.Calibration.blank(self.reader)._asdict()
        made = {name: self.param(name, lambda _, x=x: x) for name, x in blank.items()}
        self.measured = heads.Calibration(**made)

    def _known(self) -> heads.Calibration:
        found = jax.lax.stop_gradient(self.measured)  # measured, not trained
        return found._replace(profile=found.profile * jnp.exp(self.factor)[..., None])

    def softened(self, frozen, ids: Int[Array, "b t"], mask: Bool[Array, "b t"]) -> Prefix:
        """What latents of heads are trained as: the whole cache, weighed (`heads.soften`)."""
        sink = None if self.sink is None else jnp.int32(self.sink)
        kv = heads.soften(self.body, frozen, self.factor, ids, mask, self.config.ratio, sink)
        where = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        return Prefix(kv, None, mask, where, mask.sum(-1), sink)

    @nn.nowrap
    def informative(self, wire: Wire) -> Float[Array, "b m f"]:
        """The part of a latent that tells texts apart.

        Keys carry a large constant part in every Llama-like model (even two unrelated texts' keys
        have a cosine above 0.9), so a wire of raw keys and values is judged by its values.
        """
        c, r = self.config, self.reader
        standard = c.encoder.slots == "heads"  # what is common to all texts is taken off
        if standard or c.wire.d_z is not None or c.encoder.output != "kv":
            return wire.z
        shape = (r.num_layers, 2, r.num_kv_heads * r.head_dim)
        return wire.z.reshape(*wire.z.shape[:2], *shape)[:, :, :, 1].reshape(*wire.z.shape[:2], -1)

    def lead(self, task: Int[Array, " b"], asked: bool = False) -> Float[Array, "b n d"]:
        """The learned vectors that tell the reader what to do with the latents.

        Args:
          task: number of `TASKS`, each with a vector of its own.
          asked: all are questions; those may have a longer prompt (``prompt_tokens``).
        """
        if asked and self.config.prompt_tokens:
            return jnp.broadcast_to(self.prompt, (len(task), *self.prompt.shape))
        return self.tasks[task][:, None]

    def instructed(self, prefix, task: Int[Array, " b"]):
        """A prefix, or anything else with ``kv`` and ``start``, with what rows of the task
        ``reconstruct`` have learned to ask for their text with (`heads.asked`).
        """
        if not self.config.rebuild_entries:
            return prefix
        known = jax.lax.stop_gradient(self.measured)
        asked = task == TASKS.index("reconstruct")
        return heads.asked(self.reader, known, self.asking, prefix, asked)

    def deltas(self) -> Any:
        """What is added to the main reader's projections behind latents; None: it is frozen."""
        if not self.config.reader_lora.rank:
            return None
        return reader_lora.for_all(self.reader_lora(), self.reader.num_layers)

    def encoder_output(self, frozen, ids, mask):
        """Raw encoder output and slot mask, for fitting the bottleneck."""
        raw, valid, _ = self._raw(frozen, ids, mask)
        return raw, valid

    def __call__(self, frozen, ids, mask) -> Prefix:
        """Touches every parameter; used for initialisation."""
        task = jnp.zeros((ids.shape[0],), jnp.int32)
        self.lead(task)
        self.deltas()
        prefix = self.prefix(self.compress(frozen, ids, mask), frozen=frozen)
        return self.instructed(prefix, task)

