"""The wire as bytes: what one process writes and another, with the same compressor, reads.

Layout: 8 bytes of signature, version (u16) and length (u32) of the header, the header (JSON),
scales, payload, and 16 bytes of BLAKE2b over everything before. All numbers are little-endian. Only
real latents travel, padding does not.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from latent_jax.core.errors import WireError
from latent_jax.core.files import parse_json
from latent_jax.ops import wire as codec
from latent_jax.systems.latentwire.codes import digit_bytes, pack_digits, unpack_digits
from latent_jax.systems.latentwire.latents import Wire
from latent_jax.systems.latentwire.pool import num_latents
from latent_jax.systems.latentwire.wire_header import (
    CODES,
    Bytes,
    Header,
    Origin,
    check_form,
    check_origin,
    parse,
    places,
)

__all__ = [
    "CODES", "Bytes", "Header", "Origin", "check_form", "check_origin", "is_wire", "pack",
    "places", "read_bytes", "read_header", "unpack",
]  # fmt: skip

SIGNATURE = b"\x89LWIRE\r\n"  # damaged by what damages text files, as PNG's is
VERSION = 1
_PREAMBLE = struct.Struct("<HI")
_CHECKSUM = 16


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
      codes: of each stage of the encoder's residual VQ, or levels of a number; 0: neither.

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
            "format codes: these latents are not made of codes (wire.codes, wire.levels are 0); "
            f"known: {', '.join(codec.FORMATS)}"
        )
    digits = np.asarray(wire.digits)[mask]
    if digits.size and digits.min() < 0:
        raise WireError("format codes: codebooks that never saw a text have no codes; train first")
    return pack_digits(digits, codes), digits.shape[-1]


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
        header = parse(parse_json(data[start : start + length]))
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
