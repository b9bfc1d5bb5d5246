"""The wire and what a reader is given of it, as arrays."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from latent_jax.backbones.config import DecoderConfig
from latent_jax.backbones.decoder import KV
from latent_jax.ops import rope
from latent_jax.systems.latentwire.model_config import MAIN, ModelConfig
from latent_jax.systems.latentwire.pool import num_latents


class Wire(NamedTuple):
    """Latents of a batch of texts; everything another process needs to read them.

    ``z[i, j]`` stands at ``positions[i, j]`` of a text of ``length[i]`` tokens; keys are stored
    before rotation, so a wire can be moved to another place in a longer context. Of a discrete wire
    there are the ``digits`` that ``z`` is made of; -1 at padding.
    """

    z: Float[Array, "b m z"]
    mask: Bool[Array, "b m"]
    positions: Int[Array, "b m"]
    length: Int[Array, " b"]
    digits: Int[Array, "b m s"] | None = None


class Prefix(NamedTuple):
    """What the reader gets: a deep prefix, or soft tokens to put before the prompt.

    The latents stand where their text stood and the prompt continues at rotary position ``start``,
    the end of the last segment: a token is then always as far from the latents that hold it,
    however long its text (with the text's own end, what is learned at 16 tokens fails at 32).
    ``sink``, if any, is the token that stands before them (`latent_jax.backbones.sink`).
    """

    kv: KV | None
    embeds: Float[Array, "b m d"] | None
    mask: Bool[Array, "b m"]
    positions: Int[Array, "b m"]
    start: Int[Array, " b"]
    sink: Int[Array, ""] | None = None


def own_slots(wire: Wire, config: ModelConfig, reader: str = MAIN) -> Wire:
    """What one reader is given of a wire: the latents that all share, and its private ones.

    Every segment is laid out as ``[shared | private of each reader in turn]``.
    """
    layout = config.private_slots
    if not any(layout.values()):
        return wire
    private, before = sum(layout.values()), 0
    for name, own in layout.items():
        if name == reader:
            break
        before += own
    total = wire.z.shape[1]
    n = max(1, total // (num_latents(config.segment, config.ratio) + private))
    each = total // n
    shared = each - private
    kept = np.r_[:shared, shared + before : shared + before + own]
    at = (np.arange(n)[:, None] * each + kept).reshape(-1)
    return Wire(wire.z[:, at], wire.mask[:, at], wire.positions[:, at], wire.length)


def numbered(mask: Bool[Array, "b m"]) -> Int[Array, "b m"]:
    """Ordinal positions: the real entries of each row are 0, 1, 2, …"""
    return jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)


def behind_numbered(
    length: Int[Array, " b"], mask: Bool[Array, "b m"], config: ModelConfig, private: int,
    entries: int, follow: str = "segment",
) -> Int[Array, " b"]:  # fmt: skip
    """Where a prompt begins behind `numbered` entries: after those that whole segments would have,
    or, with ``follow="text"``, after the last real one.

    Args:
      length: of the texts, tokens.
      mask: which entries are real.
      private: latents of each segment that this reader alone is given.
      entries: made of each latent.
    """
    if follow == "text":
        return mask.sum(1, dtype=jnp.int32)
    each = (num_latents(config.segment, config.ratio) + private) * entries
    return -(-length // config.segment) * each


def expanded(
    wire: Wire, z: Float[Array, "b m e"], entries: int, ratio: float
) -> tuple[Wire, Float[Array, "b n d"]]:
    """Several soft tokens of each latent, spread over its span; ``z`` has them side by side."""
    aside = ((jnp.arange(entries) + 0.5) / entries - 0.5) * ratio
    places = jnp.maximum(jnp.floor(wire.positions[..., None] + 0.5 + aside), 0)
    each = lambda x: jnp.repeat(x, entries, axis=1)  # noqa: E731
    places = places.astype(jnp.int32).reshape(len(z), -1)
    wide = Wire(each(wire.z), each(wire.mask), places, wire.length)
    return wide, z.reshape(*wide.mask.shape, -1)


def split_segments(wire: Wire, segment: int, ratio: float, private: int = 0) -> Wire:
    """One row per segment of each text, ``[b n …]``, at the positions it was compressed at.

    Segments were compressed alone, so each is rebuilt alone.

    Args:
      private: latents of a segment beside those of its spans, of all readers together.
    """
    b, total, _ = wire.z.shape
    n = max(1, total // (num_latents(segment, ratio) + private))
    start = jnp.arange(n) * segment
    return Wire(
        wire.z.reshape(b * n, total // n, -1),
        wire.mask.reshape(b * n, -1),
        (wire.positions.reshape(b, n, -1) - start[:, None]).reshape(b * n, -1),
        jnp.clip(wire.length[:, None] - start, 0, segment).reshape(-1),
    )


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
