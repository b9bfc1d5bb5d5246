"""What a stored wire costs beside the text itself: bytes, key/value memory, prefill."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from latent_jax.backbones.architectures import param_shapes
from latent_jax.backbones.config import DecoderConfig
from latent_jax.backbones.decoder import Decoder
from latent_jax.backbones.head_entries import elimination_flops
from latent_jax.core.flops import matmul_flops
from latent_jax.systems.latentwire.api import LatentWire
from latent_jax.systems.latentwire.message import Message
from latent_jax.systems.latentwire.model_config import MAIN


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
      latent_flops: making of the latents what the reader holds (0 where they are keys and values
        already).
      encode_flops: compressing, once, with every part of the compressor.
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


@functools.lru_cache(maxsize=1024)
def prefill_flops(config: DecoderConfig, tokens: int) -> float:
    """Operations of the matrix products of a prefill, two per multiply-add, without logits.

    Counted as the program runs: tokens that a causal mask hides are multiplied too.
    """
    x = jax.ShapeDtypeStruct((1, tokens, config.hidden_size), jnp.float32)

    def run(params, x):
        out = Decoder(config).apply({"params": params}, x)
        return (out.hidden, out.kv.k), None

    return matmul_flops(run, param_shapes(config), x)[0]


def compressor_flops(latents: Any, tokens: int) -> tuple[float, float]:
    """Operations of the matrix products of every part of a compressor, on one text.

    Args:
      latents: a `Compressed`.
      tokens: of the text; beyond a segment, whole segments.

    Returns:
      Of compressing it, and of making of its wire what the reader is given.
    """
    ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, tokens), jnp.bool_)

    def encode(latents, ids, mask):
        wire = latents.compress(ids, mask)
        return wire.z, wire

    def read(latents, wire):
        given = latents.prefix(wire)
        return (given.kv, given.embeds), None

    encoding, wire = matmul_flops(encode, latents, ids, mask)
    return encoding, matmul_flops(read, latents, wire)[0]


class Reading(NamedTuple):
    """What texts cost where they are read, and what compressing them costs; see `Cost`."""

    text_kv_bytes: int
    latent_kv_bytes: int
    text_flops: float
    latent_flops: float
    encode_flops: float


def reading(wire: LatentWire, lengths: Sequence[int], latents: Sequence[int]) -> Reading:
    """Costs that depend on the sizes of texts alone.

    Args:
      wire: the compressor.
      lengths: tokens of each text.
      latents: of each text.
    """
    c, reader = wire.config, wire.backbone.config
    per_token = reader.kv_floats_per_token * wire.backbone.dtype.itemsize
    heads, segment = c.encoder.slots == "heads", c.segment
    # Segments are compressed alone, unless each is told of those before it.
    parts = [min(segment, n - at) for n in lengths for at in range(0, n, segment)]
    if c.encoder.carry:
        parts = [n if n <= segment else segment * -(-n // segment) for n in lengths]
    spent = {n: compressor_flops(wire.latents, n) for n in set(parts)}
    encode, read = (sum(spent[n][which] for n in parts) for which in (0, 1))
    if heads:  # most of leaving entries out is no matrix product
        encode += sum(elimination_flops(reader, n) for n in parts)
    others = sum(c.private_slots.values()) - c.private_slots[MAIN]
    places = [
        (m - others * math.ceil(n / segment)) * c.adapter.entries
        for n, m in zip(lengths, latents, strict=True)
    ]
    if c.adapter.kind == "soft":  # the reader runs over them
        read += sum(prefill_flops(reader, m) for m in places)
    # Heads that keep few entries are padded to the places of those that keep many.
    most = c.encoder.places or segment
    held = [min(n, most) for n in parts] if heads else places
    per_latent = per_token
    if c.adapter.kind == "cross":  # keys and values of the blocks alone
        per_latent = per_token // reader.num_layers * len(c.adapter.depths)
    return Reading(
        sum(lengths) * per_token, sum(held) * per_latent,
        sum(prefill_flops(reader, n) for n in lengths), read, encode,
    )  # fmt: skip


def cost(wire: LatentWire, message: Message, texts: Sequence[str], bits: str = "fp32") -> Cost:
    """Sizes of texts and of their latents.

    Args:
      wire: the compressor.
      message: its latents of ``texts``.
      texts: what was compressed.
      bits: number format of the wire.
    """
    lengths, latents = np.asarray(message.length).tolist(), message.latents
    text = "".join(texts).encode()
    return Cost(
        sum(lengths), sum(latents), *message.size(bits), len(text), len(gzip.compress(text, 9)),
        *reading(wire, lengths, latents),
    )  # fmt: skip
