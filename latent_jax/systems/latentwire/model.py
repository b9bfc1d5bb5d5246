"""Text → latents → what a frozen reader is given.

What the encoder's slots leave behind, per-layer keys and values or a last hidden state, is put on
the *wire* as one vector of width ``d_z`` per slot, and the adapter turns the wire into a deep
prefix or into soft tokens.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from latent_jax.backbones.decoder import KV, Decoder, inverse_frequencies
from latent_jax.core.types import Mean
from latent_jax.nn.lora import placed
from latent_jax.ops.fsq import fsq_bound
from latent_jax.systems.latentwire import codes, heads, onto_soft, reader_lora
from latent_jax.systems.latentwire.adapters import Adapter
from latent_jax.systems.latentwire.carry import carried
from latent_jax.systems.latentwire.config import TASKS
from latent_jax.systems.latentwire.coprocessor import Coprocessor, carried_by
from latent_jax.systems.latentwire.cross_adapter import CrossAdapter
from latent_jax.systems.latentwire.encoder import Encoder
from latent_jax.systems.latentwire.gist_head import GistHead
from latent_jax.systems.latentwire.latents import (
    Prefix,
    Wire,
    behind_numbered,
    expanded,
    flatten_kv,
    numbered,
    own_slots,
    split_segments,
    unflatten_kv,
)
from latent_jax.systems.latentwire.pool import num_latents
from latent_jax.systems.latentwire.reading import read
from latent_jax.systems.latentwire.task_adapter import TaskAdapter
from latent_jax.systems.latentwire.vectors import Refiner

__all__ = [
    "Compressor", "Prefix", "Wire", "flatten_kv", "num_latents", "own_slots", "read",
    "split_segments", "unflatten_kv",
]  # fmt: skip


class Compressor(Encoder):
    """Encoder, wire and adapter; everything trainable of LatentWire.

    Attributes:
      config: encoder, wire and adapter options.
      reader: architecture of the frozen LLM, which is also the encoder's body.
      sink: token before the encoder's text and before the latents, usually BOS; None for none.
      carrier: tokens of ``adapter.carrier``.
      separate: of ``encoder.backbone``; None where the reader encodes.
    """

    def setup(self):
        super().setup()
        c, r = self.config, self.reader
        if c.encoder.refiner:
            self.refiner = Refiner(c.encoder.refiner)
        if not c.adapter.plain:
            self.adapter = Adapter(c.adapter)
        if c.adapter.kind == "cross":
            self.cross = CrossAdapter(c.adapter, r)
        if c.adapter.kind == "coprocessor":
            self.coprocessor = Coprocessor(r, c.adapter.hidden)
        if c.gist_layers:
            self.gist = GistHead(r.hidden_size, c.gist_layers, c.segment)
        if c.reader_lora.rank:
            self.reader_lora = reader_lora.make(c.reader_lora, r)
        scale = nn.initializers.normal(0.02)
        self.tasks = self.param("tasks", scale, (len(TASKS), r.hidden_size))
        if c.prompt_tokens:
            self.prompt = self.param("prompt", scale, (c.prompt_tokens, r.hidden_size))
        if c.wire.d_z is not None:
            start, width = nn.initializers.orthogonal(), self.width
            self.down = self.param("down", start, (width, c.wire.d_z))
            if c.wire.levels:
                spread = nn.initializers.ones
                self.level_scale = self.param("level_scale", spread, (c.wire.d_z,))
            if c.wire.codes:
                self.rvq = codes.quantiser(c.wire.d_z, c.wire.codes, c.wire.stages)
            deep = c.adapter.kind == "kv"
            out = (r.kv_floats_per_token if deep else r.hidden_size) * c.adapter.entries
            if c.adapter.linear:
                self.up = self.param("up", start, (c.wire.d_z, out))
            # Per-dimension centre and spread of the encoder's output and of what the reader
            # expects; keys are an order of magnitude larger than values, so neither PCA nor a
            # linear map works on raw numbers.
            zeros, ones = nn.initializers.zeros, nn.initializers.ones
            self.in_mean = self.param("in_mean", zeros, (width,))
            self.in_scale = self.param("in_scale", ones, (width,))
            if c.adapter.linear:
                self.out_mean = self.param("out_mean", zeros, (out,))
                self.out_scale = self.param("out_scale", ones, (out,))
            if c.adapter.task_rank:
                self.task_adapter = TaskAdapter(len(TASKS), out, c.adapter.task_rank)
            if c.adapter.onto_soft:
                self.soft = self.param("soft", start, (c.wire.d_z, r.hidden_size))
                self.soft_mean = self.param("soft_mean", zeros, (r.hidden_size,))
                self.onto = self.param("onto", zeros, (r.num_layers,))

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
            z, digits = self._rounded(z, valid)
        if c.wire.codes:
            z, digits = self._coded(z, valid, train)
        return Wire(z, valid, positions, mask.sum(-1), digits)

    def _coded(self, z: Float[Array, "b m z"], valid: Bool[Array, "b m"], train: bool):
        """Latents as sums of codes, and the digits of these."""
        out = self.rvq(z, valid, train=train)
        if train:
            power = jnp.sum(jnp.square(z.astype(jnp.float32)) * valid[..., None])
            self.sow(codes.TOLD, "commitment", out.losses["commitment"])
            error = Mean(out.metrics["quantisation_error"].sum, power)
            self.sow(codes.TOLD, "wire_error", error)
            self.sow(codes.TOLD, "codes_used", out.metrics["perplexity"][0])
            return out.quantized, out.indices
        return codes.straight(z, self.from_digits(out.indices)), out.indices

    def _rounded(self, z: Float[Array, "b m z"], valid: Bool[Array, "b m"]):
        """Every number on one of a few levels (FSQ, Mentzer et al. 2023), at its own scale; and
        which level, from 0.
        """
        scale, levels = jax.lax.stop_gradient(self.level_scale), self.config.wire.levels
        x = fsq_bound(z.astype(jnp.float32)[..., None] / scale[:, None], (levels,))[..., 0]
        half = levels // 2
        digits = (jnp.round(x) + half).astype(jnp.int32)
        z = codes.straight(x / half * scale, self.from_digits(digits))
        return z, jnp.where(valid[..., None], digits, -1)

    def from_digits(self, digits: Int[Array, "*b s"]) -> Float[Array, "*b z"]:
        """The latents that digits stand for: codes, of which -1 adds nothing, or levels."""
        if self.config.wire.codes:
            return self.rvq.decode(digits)
        return codes.level_values(self.config.wire.levels)[digits] * jax.lax.stop_gradient(
            self.level_scale
        )

    def prefix(self, wire: Wire, dtype=jnp.float32, frozen=None, task=None) -> Prefix:
        """Wire → what the reader gets.

        Args:
          wire: of `compress`.
          dtype: of what the reader gets.
          frozen: the LLM's parameters, for adapters that look at its vocabulary or run it.
          task: number of each text's, where tasks add something of their own; None: what they
            all share.
        """
        c, r = self.config, self.reader
        wire = own_slots(wire, c)
        sink = None if self.sink is None else jnp.int32(self.sink)
        start = wire.length
        if c.follow == "segment":
            start = -(-wire.length // c.segment) * c.segment
        if ordinal := c.adapter.positions == "ordinal":
            wire = wire._replace(positions=numbered(wire.mask))
            real = jnp.repeat(wire.mask, c.adapter.entries, axis=1)
            sizes = c, c.private, c.adapter.entries, c.follow
            start = behind_numbered(wire.length, real, *sizes)
        if c.adapter.kind == "cross":
            kv = self.cross(wire, dtype)
            return Prefix(kv, None, wire.mask, wire.positions, start, sink)
        if c.adapter.kind == "coprocessor":
            body = Decoder(r, remat=c.remat, parent=None)
            cache = carried_by(body, frozen, self.carrier, wire, self.sink, dtype)
            kv = self.coprocessor(wire, cache)
            return Prefix(kv, None, wire.mask, wire.positions, start, sink)
        z = wire.z
        if c.wire.d_z is not None:
            y = z @ self.up
            if task is not None and c.adapter.task_rank:
                y = y + self.task_adapter(z, task)
            z = y * self.out_scale + self.out_mean
        if c.adapter.entries > 1:
            wire, z = expanded(wire, z, c.adapter.entries, c.ratio)
            if ordinal:
                wire = wire._replace(positions=numbered(wire.mask))
        if not c.adapter.plain:
            z = self.adapter(wire.z, z, wire.mask, None if frozen is None else frozen["embed"])
        z = z.astype(dtype)
        if c.encoder.slots == "heads":
            # Its entries stand where their tokens stood: what follows them is at the text's end.
            sent = wire._replace(z=z)
            kv = heads.decode(r, self._known(), sent, c.segment, c.ratio, c.encoder.places)
            return Prefix(kv, None, wire.mask, wire.positions, wire.length, sink)
        kv = embeds = None
        if c.adapter.kind == "kv":
            kv = unflatten_kv(z, r, inverse_frequencies(r), wire.positions, wire.mask)
            if c.adapter.onto_soft:
                soft = (wire.z @ self.soft + self.soft_mean).astype(dtype)
                body = Decoder(r, remat=c.remat, parent=None)
                kv = onto_soft.onto(body, frozen, soft, wire, kv, self.onto, self.sink)
        else:
            embeds = z
        return Prefix(kv, embeds, wire.mask, wire.positions, start, sink)

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
        return placed(self.reader_lora(), self.reader.num_layers)

    def filled_in(self, wire: Wire, x: Float[Array, "b t d"], real, masked) -> Array:
        """What `GistHead` says of the tokens of one segment each."""
        return self.gist(wire.z, wire.mask, wire.positions, x, real, masked)

    def encoder_output(self, frozen, ids, mask):
        """Raw encoder output and slot mask, for fitting the bottleneck."""
        raw, valid, _ = self._raw(frozen, ids, mask)
        return raw, valid

    def __call__(self, frozen, ids, mask) -> Prefix:
        """Touches every parameter; used for initialisation."""
        task = jnp.zeros((ids.shape[0],), jnp.int32)
        self.lead(task)
        self.deltas()
        wire = self.compress(frozen, ids, mask)
        if self.config.gist_layers:
            width = min(ids.shape[1], self.config.segment)
            private = sum(self.config.private_slots.values())
            one = split_segments(wire, self.config.segment, self.config.ratio, private)
            real = jnp.ones((len(one.z), width), bool)
            self.filled_in(one, jnp.zeros((*real.shape, self.reader.hidden_size)), real, real)
        return self.instructed(self.prefix(wire, frozen=frozen, task=task), task)

