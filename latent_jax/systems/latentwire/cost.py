"""What a stored wire costs beside the text itself: bytes, key/value memory, prefill."""

from __future__ import annotations

import dataclasses
import gzip
import math
from collections.abc import Sequence

import numpy as np

from latent_jax.backbones.config import DecoderConfig
from latent_jax.backbones.first_layers import first_config
from latent_jax.backbones.head_entries import elimination_flops
from latent_jax.systems.latentwire.api import LatentWire
from latent_jax.systems.latentwire.message import Message
from latent_jax.systems.latentwire.model_config import MAIN
from latent_jax.systems.latentwire.vectors import LONGEST


@dataclasses.dataclass(frozen=True)
class Cost:
    """Sizes of some texts, as text and as latents.

    Attributes:
      tokens: of all texts.
      latents: of all texts.
      header: bytes of the wire that are neither scales nor payload.
      scales: bytes of the scales.
      payload: bytes of the numbers.
      text_bytes: of the texts in UTF-8.
      gzip_bytes: of the texts together, gzipped at level 9.
      text_kv_bytes: keys and values that the reader holds for the whole texts.
      latent_kv_bytes: those that it holds for the latents that it is given, of which an adapter
        may make several entries each.
      text_flops: prefill of the whole texts, every time they are read.
      latent_flops: prefill of the latents (0 where they are keys and values already).
      encode_flops: compressing, once.
    """

    tokens: int
    latents: int
    header: int
    scales: int
    payload: int
    text_bytes: int
    gzip_bytes: int
    text_kv_bytes: int
    latent_kv_bytes: int
    text_flops: float
    latent_flops: float
    encode_flops: float

    @property
    def wire_bytes(self) -> int:
        """The stored wire's size."""
        return self.header + self.scales + self.payload

    def verdict(self) -> str:
        """Which of the three is saved, and which is not."""
        kv, flops = self.text_kv_bytes / self.latent_kv_bytes, self.text_flops - self.latent_flops
        size = self.wire_bytes / self.text_bytes
        bytes_ = (
            f"and bytes ({1 / size:.1f}x fewer than UTF-8)" if size < 1
            else f"not bytes ({size:,.1f}x the UTF-8 text)"
        )  # fmt: skip
        memory = f"key/value memory ({kv:.1f}x) and " if kv > 1 else ""
        if not memory:
            bytes_ = f"not key/value memory where it is read; {bytes_}"
        return (
            f"saved: {memory}{flops / 1e9:.3g} GFLOP of prefill per reading (encoding: "
            f"{self.encode_flops / 1e9:.3g} once); {bytes_}"
        )


def prefill_flops(config: DecoderConfig, tokens: int, before: int = 0) -> float:
    """Multiply-adds of a causal prefill, counted as two each, without embedding and logits.

    Args:
      config: the reader.
      tokens: new tokens.
      before: entries that all of them see.
    """
    seen = before * tokens + tokens * (tokens + 1) / 2
    attention = 4 * config.num_layers * config.num_heads * config.head_dim * seen
    return 2.0 * config.num_params(embedding=False) * tokens + attention


def byte_flops(width: int, layers: int, tokens: int) -> float:
    """Multiply-adds of `vectors.ByteEncoder`, two each: every token takes room for its longest."""
    n = LONGEST * tokens
    return layers * (2.0 * 8 * width**2 * n + 4 * width * n**2)


def cost(wire: LatentWire, message: Message, texts: Sequence[str], bits: str = "fp32") -> Cost:
    """Sizes of texts and of their latents.

    Args:
      wire: the compressor.
      message: its latents of ``texts``.
      texts: what was compressed.
      bits: number format of the wire.
    """
    c = wire.config
    reader, size = wire.backbone.config, wire.backbone.dtype.itemsize
    per_token = reader.kv_floats_per_token * size
    lengths, latents = np.asarray(message.length).tolist(), message.latents
    text = "".join(texts).encode()
    heads = c.encoder.slots == "heads"  # the text is read again behind itself
    none = [0] * len(latents)
    slots = {"pooled": none, "states": none, "anchor": none, "heads": lengths}.get(
        c.encoder.slots, latents
    )
    segment, encoder = c.segment, first_config(reader, c.encoder.layers)
    if wire.separate is not None:  # counted in the reader's tokens
        encoder = wire.separate.body.config
    # Segments are compressed alone.
    parts = [min(segment, n - at) for n in lengths for at in range(0, n, segment)]

    def alone(tokens: int) -> float:
        """Beside what the LLM runs over."""
        if heads:
            return elimination_flops(reader, tokens)
        if c.encoder.slots == "bytes":
            return byte_flops(reader.hidden_size, c.encoder.byte_layers, tokens)
        return 0.0

    # The reader runs over the latents' places.
    soft = c.adapter.kind in ("soft", "coprocessor") or c.adapter.onto_soft
    read = lengths
    if (wire.method is not None and soft) or c.encoder.slots in ("bytes", "embedded"):
        read = slots = none  # embeddings only, or no LLM's: none of its layers runs
    others = sum(c.private_slots.values()) - c.private_slots[MAIN]
    places = [
        (m - others * math.ceil(n / segment)) * c.adapter.entries
        for n, m in zip(lengths, latents, strict=True)
    ]
    # Heads that keep few entries are padded to the places of those that keep many.
    held, per_latent = lengths if heads else places, per_token
    if c.adapter.kind == "cross":  # keys and values of the blocks alone
        per_latent = per_token // reader.num_layers * len(c.adapter.depths)
    return Cost(
        sum(lengths), sum(latents), *message.size(bits), len(text), len(gzip.compress(text, 9)),
        sum(lengths) * per_token, sum(held) * per_latent,
        text_flops=sum(prefill_flops(reader, n) for n in lengths),
        latent_flops=sum(prefill_flops(reader, m) for m in places) if soft else 0.0,
        encode_flops=sum(
            prefill_flops(encoder, n) + prefill_flops(encoder, m, n)
            for n, m in zip(read, slots, strict=True)
        ) + sum(alone(n) for n in parts),
    )  # fmt: skip
