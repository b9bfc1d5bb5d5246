"""Further readers of one wire: another frozen LLM, with its own tokenizer and width, per adapter.

The encoder and its wire know nothing of them. An adapter turns the latents into a deep prefix (or
soft tokens) of its LLM, each into one entry or several; these stand where their text stands in
*that* LLM's tokens, which are ``stretch`` times as many.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from latent_jax import backbones
from latent_jax.backbones.config import DecoderConfig
from latent_jax.backbones.decoder import inverse_frequencies
from latent_jax.backbones.sink import sink_token
from latent_jax.core.errors import CheckpointError
from latent_jax.systems.latentwire.compressed import Latents
from latent_jax.systems.latentwire.config import TASKS, ModelConfig, ReaderConfig
from latent_jax.systems.latentwire.latents import behind_numbered, numbered
from latent_jax.systems.latentwire.model import Prefix, Wire, own_slots, unflatten_kv
from latent_jax.systems.latentwire.prompts import PromptBuilder, PromptConfig


class ReaderAdapter(nn.Module):
    """From the wire to another frozen LLM; all that is trained for it.

    Attributes:
      config: the compressor's shape, which names this reader.
      label: its name there.
      reader: architecture of its LLM.
      width: numbers per latent.
      sink: token before the latents; None for none.
    """

    config: ModelConfig
    label: str
    reader: DecoderConfig
    width: int
    sink: int | None = None

    def setup(self):
        c, r = self.config.readers[self.label], self.reader
        out = c.entries * (r.kv_floats_per_token if c.kind == "kv" else r.hidden_size)
        zeros, ones, small = nn.initializers.zeros, nn.initializers.ones, nn.initializers.normal
        # Of the latents, and of what the LLM itself makes of text: a linear map of raw numbers
        # would have to learn both first.
        self.in_mean = self.param("in_mean", zeros, (self.width,))
        self.in_scale = self.param("in_scale", ones, (self.width,))
        self.out_mean = self.param("out_mean", zeros, (out,))
        self.out_scale = self.param("out_scale", ones, (out,))
        self.map = self.param("map", small(self.width**-0.5), (self.width, out))
        if c.hidden:
            self.inner = self.param("inner", small(self.width**-0.5), (self.width, c.hidden))
            self.outer = self.param("outer", zeros, (c.hidden, out))
        self.tasks = self.param("tasks", small(0.02), (len(TASKS), r.hidden_size))
        if n := self.config.prompt_tokens:
            self.prompt = self.param("prompt", small(0.02), (n, r.hidden_size))
        self.stretch = self.param("stretch", ones, ())

    def prefix(self, wire: Wire, dtype=jnp.float32) -> Prefix:
        """Wire → what this reader gets: see `Compressor.prefix`."""
        c, r = self.config.readers[self.label], self.reader
        wire = own_slots(wire, self.config, self.label)
        x = (wire.z - self.in_mean) * self.in_scale
        y = x @ self.map
        if c.hidden:
            y = y + nn.gelu(x @ self.inner) @ self.outer
        y = (y * self.out_scale + self.out_mean).astype(dtype)
        y = y.reshape(len(y), y.shape[1] * c.entries, -1)
        # Spread over the span that the latent stands in the middle of.
        aside = ((jnp.arange(c.entries) + 0.5) / c.entries - 0.5) * self.config.ratio
        places = jnp.maximum(wire.positions[..., None] + aside, 0) * self.stretch
        positions = jnp.floor(places).astype(jnp.int32).reshape(y.shape[:2])
        mask = jnp.repeat(wire.mask, c.entries, axis=1)
        end = -(-wire.length // self.config.segment) * self.config.segment
        start = jnp.ceil(end * self.stretch).astype(jnp.int32)
        if c.positions == "ordinal":
            positions = numbered(mask)
            start = behind_numbered(wire.length, mask, self.config, c.private, c.entries)
        kv = embeds = None
        if c.kind == "kv":
            kv = unflatten_kv(y, r, inverse_frequencies(r), positions, mask)
        else:
            embeds = y
        sink = None if self.sink is None else jnp.int32(self.sink)
        return Prefix(kv, embeds, mask, positions, start, sink)

    def lead(self, task: Int[Array, " b"], asked: bool = False) -> Float[Array, "b n d"]:
        """See `Compressor.lead`."""
        if asked and self.config.prompt_tokens:
            return jnp.broadcast_to(self.prompt, (len(task), *self.prompt.shape))
        return self.tasks[task][:, None]

    def __call__(self, wire: Wire) -> Prefix:
        """Touches every parameter; used for initialisation."""
        self.lead(jnp.zeros((wire.z.shape[0],), jnp.int32))
        return self.prefix(wire)


@dataclasses.dataclass(frozen=True)
class Reader:
    """Another frozen LLM that reads a compressor's wire.

    Attributes:
      label: its name in ``model.readers``.
      backbone: the LLM.
      adapter: from the wire to it.
      builder: how questions are put to it.
    """

    label: str
    backbone: backbones.Backbone
    adapter: ReaderAdapter
    builder: PromptBuilder

    @property
    def config(self) -> ReaderConfig:
        """Its adapter and how much room it needs."""
        return self.adapter.config.readers[self.label]

    @property
    def sink(self) -> int | None:
        """Token before everything that it is shown."""
        return self.adapter.sink

    def latents(self, encoder: Latents) -> ReaderLatents:
        """The compressor as this reader receives from it, with the weights of ``encoder``."""
        own = encoder.params["readers"][self.label]
        return ReaderLatents(
            adapter=self.adapter, encoder=encoder, params=own, frozen=self.backbone.params
        )


@flax.struct.dataclass
class ReaderLatents:
    """A compressor whose wire another LLM reads; implements `compressed.Compressed`."""

    adapter: Any = flax.struct.field(pytree_node=False)
    encoder: Latents
    params: Any
    frozen: Any

    def compress(self, ids, mask):
        """See `Compressed.compress`; the ids are the encoder's."""
        return self.encoder.compress(ids, mask)

    def prefix(self, wire):
        """See `Compressed.prefix`."""
        return self.adapter.apply({"params": self.params}, wire, method="prefix")

    def received(self, wire):
        """See `Compressed.received`."""
        return own_slots(wire, self.adapter.config, self.adapter.label).mask

    def segments(self, wire):
        """See `Compressed.segments`."""
        return self.encoder.segments(wire)

    def task(self, name, batch):
        """See `Compressed.task`."""
        number = jnp.full((batch,), TASKS.index(name), jnp.int32)
        return self.adapter.apply(
            {"params": self.params}, number, asked=name == "answer", method="lead"
        )

    def instructed(self, given, name):
        """See `Compressed.instructed`: a further reader has none."""
        return given

    def for_task(self, name):
        """See `Compressed.for_task`: a further reader has one adapter for all tasks."""
        return self

    def deltas(self):
        """See `Compressed.deltas`: a further reader is always frozen."""
        return None


def latent_width(config: ModelConfig, encoder: DecoderConfig) -> int:
    """Numbers per latent (``d_z``)."""
    kv = config.encoder.output == "kv"
    return config.wire.d_z or (encoder.kv_floats_per_token if kv else encoder.hidden_size)


def open_reader(
    label: str,
    config: ModelConfig,
    encoder: backbones.Backbone,
    prompt: PromptConfig,
    backbone: backbones.Backbone | None = None,
    sha256: str = "",
) -> Reader:
    """Loads one of ``config.readers`` beside the encoder's LLM.

    Args:
      prompt: how questions are put where the reader has no layout of its own.
      backbone: the LLM, if it is loaded already.
      sha256: of the weights that the adapter was trained for, if known.

    Raises:
      BackboneError: its LLM cannot be loaded.
      CheckpointError: it is another than the adapter was trained for.
    """
    own = config.readers[label]
    backbone = backbone or backbones.load(own.name, dtype=encoder.dtype)
    if sha256 not in ("", backbone.sha256):
        raise CheckpointError(
            f"reader {label}: its adapter was trained for {own.name} ({sha256[:12]}), the model "
            f"that is here has other weights ({backbone.sha256[:12]})"
        )
    sink = sink_token(backbone.tokenizer) if config.sink else None
    width = latent_width(config, encoder.config)
    adapter = ReaderAdapter(config, label, backbone.config, width, sink)
    return Reader(label, backbone, adapter, PromptBuilder(backbone.tokenizer, own.prompt or prompt))
