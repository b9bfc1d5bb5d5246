"""What is known of a stored wire beside its numbers: who wrote it, for which texts, and how."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from latent_jax.core.errors import WireError
from latent_jax.ops import wire as codec
from latent_jax.systems.latentwire.pool import num_latents, real_slots

#: The format of latents that are sums of codes: their digits, exactly.
CODES = "codes"


@dataclasses.dataclass(frozen=True)
class Origin:
    """Who wrote a wire.

    Attributes:
      encoder: name that the compressor was loaded as.
      encoder_sha256: digest of its configuration, weights, centre and frozen LLM.
      reader: name of the LLM that it was made for.
      family: architecture of that LLM.
    """

    encoder: str
    encoder_sha256: str
    reader: str
    family: str


@dataclasses.dataclass(frozen=True)
class Header:
    """All that is known of a stored wire beside its numbers.

    Attributes:
      origin: who wrote it.
      ratio: tokens per latent.
      segment: tokens compressed at once.
      width: numbers per latent (``d_z``).
      form: number format, of `ops.wire.FORMATS`.
      group: numbers that share a scale.
      centred: whether the encoder's centre was taken off before rounding.
      lengths: tokens of each text.
      latents: latents of each text, ``M``.
      positions: of each text's latents, where they are not the middles of their spans.
      private: latents of each segment that only single readers are given.
      codes: of each stage of a residual VQ, or levels, in the format `CODES`; else 0.
      digits: of each latent, in that format; else 0.
    """

    origin: Origin
    ratio: float
    segment: int
    width: int
    form: str
    group: int
    centred: bool
    lengths: tuple[int, ...]
    latents: tuple[int, ...]
    positions: tuple[tuple[int, ...], ...] | None = None
    private: int = 0
    codes: int = 0
    digits: int = 0


class Bytes(NamedTuple):
    """What a stored wire takes; ``header`` includes signature and checksum."""

    header: int
    scales: int
    payload: int

    @property
    def total(self) -> int:
        """All of it: the size of the file."""
        return sum(self)


def places(
    lengths: Sequence[int], width: int, ratio: float, segment: int, private: int = 0
) -> tuple[Bool[np.ndarray, "b m"], Int[np.ndarray, "b m"]]:
    """Which latents are real, and where they stand, of texts padded to ``width`` tokens.

    Segments are compressed alone: each has its own ``ceil(tokens / ratio)`` latents, in the middles
    of their spans, and then its private ones, spread evenly over it.
    """
    n = max(1, width // segment)
    m = num_latents(width // n, ratio)
    slot, start = np.arange(m), np.arange(n)[:, None] * (width // n)
    # fp32, as the compressor computes it
    middle = np.floor(slot * np.float32(ratio) + np.float32((ratio - 1) / 2)).astype(np.int32)
    left = np.clip(np.asarray(lengths)[:, None, None] - start, 0, width // n)
    mask = real_slots(left[..., 0], width // n, ratio)
    where = np.broadcast_to(middle, mask.shape)
    if private:
        own = (np.arange(private) + np.float32(0.5)) * left.astype(np.float32)
        own = np.floor(own / np.float32(private)).astype(np.int32)
        mask = np.concatenate([mask, np.broadcast_to(left > 0, own.shape)], axis=-1)
        where = np.concatenate([where, own], axis=-1)
    shape = (len(lengths), n * (m + private))
    return mask.reshape(shape), (start + where).reshape(shape)


def check_form(form: str) -> None:
    """Refuses unknown formats.

    Raises:
      WireError: naming the known ones.
    """
    if form not in (*codec.FORMATS, CODES):
        raise WireError(f"no wire format {form!r}; known: {', '.join((*codec.FORMATS, CODES))}")


def check_origin(theirs: Origin, ours: Origin, name: str) -> None:
    """Refuses latents that another encoder made.

    Args:
      theirs: who made them.
      ours: who would read them.
      name: what they are called, for messages.

    Raises:
      WireError: saying whose they are and what would read them.
    """
    if theirs.encoder_sha256 == ours.encoder_sha256:
        return
    who = f"{theirs.encoder} ({theirs.encoder_sha256[:12]})"
    us = f"{ours.encoder} ({ours.encoder_sha256[:12]})"
    if theirs.family != ours.family:
        raise WireError(
            f"{name}: made by {who} for {theirs.reader} ({theirs.family}); {ours.reader} "
            f"({ours.family}) has no adapter for it: compress the text with {us}"
        )
    if theirs.encoder == ours.encoder:
        raise WireError(
            f"{name}: made by another version of {who}; this one is {us}: compress the text "
            "again, or load that version"
        )
    raise WireError(f"{name}: made by the encoder {who}; this is {us}: load {theirs.encoder}")


def parse(tree: dict[str, Any]) -> Header:
    """A header from JSON; anything odd is a ValueError, TypeError or KeyError."""
    origin = Origin(**{k: str(v) for k, v in tree.pop("origin").items()})
    numbers = {k: tuple(int(v) for v in tree.pop(k)) for k in ("lengths", "latents")}
    where = tree.pop("positions")
    if where is not None:
        where = tuple(tuple(int(v) for v in row) for row in where)
        if tuple(map(len, where)) != numbers["latents"]:
            raise ValueError("positions and latents do not match")
    header = Header(origin=origin, positions=where, **numbers, **tree)
    if header.form not in (*codec.FORMATS, CODES):
        raise ValueError(f"format {header.form!r}")
    if (header.form == CODES) != (header.codes > 1) or (header.digits > 0) != (header.codes > 1):
        raise ValueError(f"format {header.form} with {header.digits} digits of {header.codes}")
    if not header.lengths or len(header.lengths) != len(header.latents) or min(header.lengths) < 1:
        raise ValueError("lengths and latents do not match")
    sizes = (
        header.segment, header.width, header.group, header.private, header.codes, header.digits
    )  # fmt: skip
    if not all(type(n) is int for n in (*sizes, *header.lengths)) or header.centred not in (0, 1):
        raise TypeError("sizes are whole numbers")
    if min(*sizes[:3], header.private + 1) < 1 or not 1 <= header.ratio < math.inf:
        raise ValueError("sizes below 1")
    # Before anything of these sizes is made: what was sent bounds what is made of it.
    for length, latents in zip(header.lengths, header.latents, strict=True):
        if latents != _latents(length, header):
            raise ValueError("latents and lengths do not match")
    return header


def _latents(length: int, header: Header) -> int:
    """How many real latents a text of so many tokens has."""
    whole, rest = divmod(length, header.segment)
    count = whole * (num_latents(header.segment, header.ratio) + header.private)
    return count + (num_latents(rest, header.ratio) + header.private if rest else 0)
