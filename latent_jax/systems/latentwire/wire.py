"""The wire as bytes: what one process writes and another, with the same compressor, reads.

Layout: 8 bytes of signature, version (u16) and length (u32) of the header, the header (JSON),
scales, payload, and 16 bytes of BLAKE2b over everything before. All numbers are little-endian. Only
real latents travel, padding does not.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from latent_jax.core.errors import WireError
from latent_jax.core.files import parse_json
from latent_jax.ops import wire as codec
from latent_jax.systems.latentwire.codes import digit_bytes, pack_digits, unpack_digits
from latent_jax.systems.latentwire.model import Wire, num_latents

SIGNATURE = b"\x89LWIRE\r\n"  # damaged by what damages text files, as PNG's is
VERSION = 1
_PREAMBLE = struct.Struct("<HI")
_CHECKSUM = 16
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
      codes: of each stage of a residual VQ, in the format `CODES`; else 0.
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
    # fp32, as the compressor computes them
    middle = np.floor(slot * np.float32(ratio) + np.float32((ratio - 1) / 2)).astype(np.int32)
    left = np.clip(np.asarray(lengths)[:, None, None] - start, 0, width // n)
    mask = slot * np.float32(ratio) < left
    where = np.broadcast_to(middle, mask.shape)
    if private:
        own = (np.arange(private) + np.float32(0.5)) * left.astype(np.float32)
        own = np.floor(own / np.float32(private)).astype(np.int32)
        mask = np.concatenate([mask, np.broadcast_to(left > 0, own.shape)], axis=-1)
        where = np.concatenate([where, own], axis=-1)
    shape = (len(lengths), n * (m + private))
    return mask.reshape(shape), (start + where).reshape(shape)


def pack(
    wire: Wire,
    origin: Origin,
    ratio: float,
    segment: int,
    form: str = "fp32",
    group: int = codec.GROUP,
    centre: Float[np.ndarray, " z"] | None = None,
    private: int = 0,
    codes: int = 0,
) -> tuple[bytes, Bytes]:
    """A wire as bytes, and what each part of them takes.

    Args:
      wire: latents of some texts.
      origin: who made them.
      ratio: tokens per latent.
      segment: tokens compressed at once.
      form: of `ops.wire.FORMATS`, or `CODES`.
      group: numbers that share a scale, in the integer formats.
      centre: the encoder's centre, which integer formats take off; it does not travel.
      private: latents of each segment that only single readers are given.
      codes: of each stage of the encoder's residual VQ; 0: it has none.

    Raises:
      WireError: unknown format, or latents that it cannot hold.
    """
    check_form(form)
    mask = np.asarray(wire.mask)
    z = np.asarray(wire.z, np.float32)[mask]
    peak = float(np.abs(z).max(initial=0.0))
    if form != CODES and not peak <= codec.largest(form):
        raise WireError(
            f"latents reach {peak:.3g}, which {form} cannot hold; use bf16"
            if np.isfinite(peak) else "latents are not finite: nothing can be sent"
        )  # fmt: skip
    centred = centre is not None and form.startswith("int")
    stages = 0
    if form == CODES:
        scales, (payload, stages) = b"", _digits(wire, mask, codes)
    else:
        codes = 0
        scales, payload = codec.to_bytes(z - np.asarray(centre) if centred else z, form, group)
    where, lengths = np.asarray(wire.positions), np.asarray(wire.length).tolist()
    # Widths follow from the slots: all segments have equally many.
    slots = num_latents(segment, ratio) + private
    width = segment * max(1, mask.shape[1] // slots)
    expected = places(lengths, width, ratio, segment, private)[1][:, : mask.shape[1]]
    usual = np.array_equal(where[mask], expected[mask])
    header = Header(
        origin, float(ratio), int(segment), int(z.shape[-1]), form, group, centred,
        tuple(lengths), tuple(mask.sum(1).tolist()),
        None if usual else tuple(tuple(w[m].tolist()) for w, m in zip(where, mask, strict=True)),
        private, codes, stages,
    )  # fmt: skip
    fields = dataclasses.asdict(header)
    for name in ("private", "codes", "digits"):
        if not fields[name]:  # such wires are written as they were before there was such a thing
            del fields[name]
    text = json.dumps(fields, separators=(",", ":")).encode()
    data = SIGNATURE + _PREAMBLE.pack(VERSION, len(text)) + text + scales + payload
    data += _digest(data)
    return data, Bytes(len(data) - len(scales) - len(payload), len(scales), len(payload))


def _digits(wire: Wire, mask: np.ndarray, codes: int) -> tuple[bytes, int]:
    """Digits of the real latents as bytes, and how many each has."""
    if not codes or wire.digits is None:
        raise WireError(
            "format codes: these latents are not made of codes (wire.codes=0); known: "
            + ", ".join(codec.FORMATS)
        )
    digits = np.asarray(wire.digits)[mask]
    if digits.size and digits.min() < 0:
        raise WireError("format codes: codebooks that never saw a text have no codes; train first")
    return pack_digits(digits, codes), digits.shape[-1]


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


def is_wire(path: str | Path) -> bool:
    """Whether a file begins as a stored wire does."""
    try:
        with open(path, "rb") as file:
            return file.read(len(SIGNATURE)) == SIGNATURE
    except OSError:
        return False


def read_bytes(path: str | Path) -> bytes:
    """A stored wire's bytes.

    Raises:
      WireError: no such file, or not readable.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise WireError(f"{path}: {error.strerror}") from None


def read_header(data: bytes, name: str = "wire") -> tuple[Header, Bytes]:
    """Checks a stored wire as far as that goes without its compressor.

    Args:
      data: all of its bytes.
      name: of its file, for messages.

    Raises:
      WireError: not a wire, of another version, or not as it was written.
    """
    start = len(SIGNATURE) + _PREAMBLE.size
    if data[: len(SIGNATURE)] != SIGNATURE:
        raise WireError(f"{name}: not a stored wire (it does not begin like one)")
    if len(data) < start + _CHECKSUM:
        raise WireError(f"{name}: cut off after {len(data)} bytes; send it again")
    version, length = _PREAMBLE.unpack_from(data, len(SIGNATURE))
    if version != VERSION:
        raise WireError(f"{name}: wire version {version}; this program reads version {VERSION}")
    if data[-_CHECKSUM:] != _digest(data[:-_CHECKSUM]):
        raise WireError(
            f"{name}: damaged: cut off or changed on the way (its checksum differs); send it again"
        )
    try:
        header = _parse(parse_json(data[start : start + length]))
        count = sum(header.latents)
        scales, payload = 0, digit_bytes(count * header.digits, max(header.codes, 2))
        if header.form != CODES:
            scales, payload = codec.sizes(count, header.width, header.form, header.group)
        parts = Bytes(start + length + _CHECKSUM, scales, payload)
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise WireError(f"{name}: its header makes no sense ({reason})") from None
    if parts.total != len(data):
        raise WireError(
            f"{name}: its header announces {parts.total} bytes, there are {len(data)}"
        )
    return header, parts


def unpack(
    data: bytes,
    centre: Float[np.ndarray, " z"] | None = None,
    name: str = "wire",
    decode: Callable[[Int[Array, "n s"]], Float[Array, "n z"]] | None = None,
) -> tuple[Wire, Header, Bytes]:
    """Inverse of `pack`: latents, as near as their format is.

    Args:
      data: all bytes of a stored wire.
      centre: the encoder's, if the wire was made with one.
      name: of its file, for messages.
      decode: the encoder's digits → latents, if it has a residual VQ.

    Raises:
      WireError: as `read_header`; codes without their codebooks, or centred latents without their
        centre.
    """
    header, parts = read_header(data, name)
    if header.centred and (centre is None or centre.shape != (header.width,)):
        raise WireError(f"{name}: needs the centre of {header.origin.encoder}, which is not here")
    begin = parts.header - _CHECKSUM
    middle = begin + parts.scales
    scales, payload = data[begin:middle], data[middle : middle + parts.payload]
    count, digits = sum(header.latents), None
    if header.form == CODES:
        digits = _read_digits(payload, header, name)
        if decode is None:
            raise WireError(f"{name}: needs the codebooks of {header.origin.encoder}")
        rows = np.asarray(decode(digits))
    else:
        rows = codec.from_bytes(scales, payload, count, header.width, header.form, header.group)
    if header.centred:
        rows = rows + np.asarray(centre)
    segment = header.segment
    longest = max(header.lengths)
    width = longest if longest <= segment else -(-longest // segment) * segment
    mask, positions = places(header.lengths, width, header.ratio, segment, header.private)
    if tuple(mask.sum(1).tolist()) != header.latents:
        raise WireError(f"{name}: its header makes no sense (latents and lengths do not match)")
    if header.positions is not None:
        positions = positions.copy()
        for row, (real, where) in enumerate(zip(mask, header.positions, strict=True)):
            positions[row, real] = where
    z = np.zeros((*mask.shape, header.width), np.float32)
    z[mask] = rows
    arrays = (z, mask, positions.astype(np.int32), np.asarray(header.lengths, np.int32))
    wire = Wire(*map(jnp.asarray, arrays))
    if digits is not None:
        places_of = np.full((*mask.shape, header.digits), -1, np.int32)
        places_of[mask] = digits
        wire = wire._replace(digits=jnp.asarray(places_of))
    return wire, header, parts


def _read_digits(payload: bytes, header: Header, name: str) -> Int[np.ndarray, "n s"]:
    count = sum(header.latents)
    try:
        found = unpack_digits(payload, count * header.digits, header.codes)
    except ValueError as error:
        raise WireError(f"{name}: its payload makes no sense ({error})") from None
    return found.reshape(count, header.digits)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_CHECKSUM).digest()


def _parse(tree: dict[str, Any]) -> Header:
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
