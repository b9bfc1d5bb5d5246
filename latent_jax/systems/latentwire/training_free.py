"""Compressors that nobody trained: a selection of a frozen prefill, or pooled embeddings."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from latent_jax import data
from latent_jax.backbones import Backbone
from latent_jax.backbones.decoder import Decoder, inverse_frequencies
from latent_jax.backbones.sink import sink_kv
from latent_jax.core.errors import ConfigError
from latent_jax.systems.latentwire import baselines, heads
from latent_jax.systems.latentwire.config import AdapterConfig, EncoderConfig, ModelConfig
from latent_jax.systems.latentwire.model import Compressor, Prefix, Wire, flatten_kv, num_latents
from latent_jax.systems.latentwire.prompts import pad_rows

#: What can be kept of a text without having seen the question.
METHODS = ("kv_stride", "kv_topk", "kv_heads", "mean_pool", "pca")
#: Packaged passages that tell ``kv_heads`` how much each head of an LLM needs, and their length.
CALIBRATION, LONGEST = 32, 128


def model_config(method: str, ratio: float, segment: int) -> ModelConfig:
    """The shape of a training-free compressor.

    Raises:
      ConfigError: an unknown method, or one that needs the question.
    """
    if method == "kv_question":
        raise ConfigError(
            "method kv_question looks at the question before it selects: nothing can be stored "
            f"ahead of it; use one of {', '.join(METHODS)}"
        )
    if method not in METHODS:
        raise ConfigError(f"no training-free method {method!r}; known: {', '.join(METHODS)}")
    if not 1 <= ratio <= segment:
        raise ConfigError(f"ratio {ratio:g}: use 1 to {segment} tokens per latent (the segment)")
    if method == "kv_heads":
        return ModelConfig(ratio=ratio, segment=segment, encoder=EncoderConfig(slots="heads"))
    if method.startswith("kv"):
        return ModelConfig(ratio=ratio, segment=segment, encoder=EncoderConfig(slots="pooled"))
    hidden, soft = EncoderConfig(output="hidden"), AdapterConfig("soft")
    return ModelConfig(ratio=ratio, segment=segment, encoder=hidden, adapter=soft)


def measured(method: str, reader: Backbone, sink: int | None) -> dict[str, Array]:
    """What a method has to know about an LLM, found on packaged passages; mostly nothing."""
    if method != "kv_heads":
        return {}
    texts = list(dict.fromkeys(e.context for e in data.load_squad("embedded", "train")))
    rows = [reader.tokenizer.encode(text)[:LONGEST] for text in texts[:CALIBRATION]]
    ids, mask = pad_rows(rows, max(map(len, rows)), 0)
    batches = (
        {"context": ids[i : i + 8], "context_mask": mask[i : i + 8]} for i in range(0, len(ids), 8)
    )
    found = heads.calibrate(reader.decoder, reader.params, batches, sink, len(rows))
    return found._asdict()


class Selected(Compressor):
    """The arms of `baselines` with the wire of a trained compressor; nothing of it is trained.

    Attributes:
      method: of `METHODS`.
    """

    method: str = "kv_stride"

    def setup(self):
        """Without parameters, but for what `measured` finds."""
        self.own = self.reader
        if self.method == "kv_heads":
            self.body = Decoder(self.reader, parent=None)
            self.calibrated()
            self.factor = jnp.zeros(self.measured.centre.shape[:2])  # nothing to train

    def _raw(self, frozen, ids, mask, start=0, before=None) -> tuple[Array, Array, Array]:
        if self.method == "kv_heads":
            return super()._raw(frozen, ids, mask, start, before)
        (b, t), body = ids.shape, Decoder(self.reader, parent=None)
        ratio, sink = self.config.ratio, None if self.sink is None else jnp.int32(self.sink)
        if not self.method.startswith("kv"):
            found = baselines.pooled_prefix(self.method, body, frozen, ids, mask, ratio)
            return found.embeds, found.mask, found.positions
        text = body.apply({"params": frozen}, ids, method="embed")
        before = None if sink is None else sink_kv(body, frozen, sink, b)
        cache = body.apply({"params": frozen}, text, mask=mask, prefix=before).kv
        none = jnp.zeros((b, 0), jnp.int32), jnp.zeros((b, 0), bool)
        kept = baselines.selected_kv(
            self.method, body, frozen, cache, ids, mask, *none, ratio, sink
        )
        # Heads keep entries of different places. Rotation composes, so any common place serves to
        # take them off and put them back: the middle of the span, as every wire's.
        slot = jnp.arange(num_latents(t, ratio))
        positions = jnp.floor(slot * ratio + (ratio - 1) / 2).astype(jnp.int32)
        positions = jnp.broadcast_to(positions, kept.mask.shape)
        return flatten_kv(kept, inverse_frequencies(self.reader), positions), kept.mask, positions

    def prefix(
        self, wire: Wire, dtype=jnp.float32, frozen: Any = None, task: Any = None
    ) -> Prefix:
        """As a trained compressor's, but the prompt continues where the text ends."""
        return super().prefix(wire, dtype, frozen, task)._replace(start=wire.length)
