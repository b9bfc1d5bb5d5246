"""Latents in few bits: group-wise scales, packed codes, and how many bytes that takes.

Integer formats are symmetric: each ``group`` consecutive numbers of a vector share a scale ``s``
and travel as ``round(x / s)``, ``s = max|x| / (2**(bits - 1) - 1)``. Scales are bfloat16, which has
float32's range; they are rounded up, so that no code is ever clipped.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

#: Bits per number of every format.
FORMATS = {"fp32": 32, "bf16": 16, "fp16": 16, "int8": 8, "int6": 6, "int4": 4}
#: Numbers that share a scale.
GROUP = 64
_FLOATS = {"fp32": jnp.float32, "bf16": jnp.bfloat16, "fp16": jnp.float16}


def largest(form: str) -> float:
    """The largest magnitude that a format can hold (integer formats: what a scale can)."""
    return float(jnp.finfo(_FLOATS.get(form, jnp.bfloat16)).max)


def _up(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Non-negative fp32 rounded up to a bfloat16, still as fp32."""
    word = jax.lax.bitcast_convert_type(x, jnp.uint32)
    word = (word + jnp.uint32(0xFFFF)) & jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(word, jnp.float32)


def _groups(x: Array, group: int) -> Array:
    """``[... d]`` → ``[... n group]``, the last group filled with zeros."""
    short = -x.shape[-1] % group
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, short)])
    return x.reshape(*x.shape[:-1], -1, group)


@functools.partial(jax.jit, static_argnames=("bits", "group"))
def quantise(
    x: Float[Array, "*s d"], bits: int, group: int = GROUP
) -> tuple[Int[Array, "*s d"], Float[Array, "*s n"]]:
    """Codes in ``-(2**(bits-1) - 1) .. 2**(bits-1) - 1`` and the bfloat16 scale of each group.

    Args:
      x: finite numbers, at most `largest` in size.
      bits: 2 to 8.
      group: numbers that share a scale; the last group of a vector may be shorter.
    """
    top = 2 ** (bits - 1) - 1
    parts = _groups(x.astype(jnp.float32), group)
    scale = _up(jnp.abs(parts).max(-1) / top)
    codes = jnp.round(parts / jnp.where(scale > 0, scale, 1)[..., None])
    codes = codes.astype(jnp.int8).reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]
    return codes, scale.astype(jnp.bfloat16)


@functools.partial(jax.jit, static_argnames=("group",))
def dequantise(
    codes: Int[Array, "*s d"], scales: Float[Array, "*s n"], group: int = GROUP
) -> Float[Array, "*s d"]:
    """Codes times their group's scale, fp32."""
    parts = _groups(codes.astype(jnp.float32), group) * scales.astype(jnp.float32)[..., None]
    return parts.reshape(*codes.shape[:-1], -1)[..., : codes.shape[-1]]


def round_trip(x: Float[Array, "*s d"], form: str, group: int = GROUP) -> Float[Array, "*s d"]:
    """What a reader gets of numbers that were sent in a format, fp32."""
    if form in _FLOATS:
        return x.astype(_FLOATS[form]).astype(jnp.float32)
    return dequantise(*quantise(x, FORMATS[form], group), group)


def pack_codes(codes: Int[np.ndarray, "*s"], bits: int) -> bytes:
    """The low ``bits`` of each code (two's complement) one after another, first code highest.

    Example:
      >>> pack_codes(np.array([1, -1, 7], np.int8), 4).hex()
      '1f70'
    """
    low = np.asarray(codes, np.int8).reshape(-1, 1).view(np.uint8)
    return np.packbits(np.unpackbits(low, axis=1)[:, 8 - bits :]).tobytes()


def unpack_codes(data: bytes, count: int, bits: int) -> Int[np.ndarray, " n"]:
    """The first ``count`` codes of `pack_codes`."""
    flat = np.unpackbits(np.frombuffer(data, np.uint8), count=count * bits).reshape(count, bits)
    sign = 1 << (bits - 1)
    low = np.packbits(flat, axis=1, bitorder="big").reshape(-1) >> (8 - bits)
    return ((low ^ sign).astype(np.int16) - sign).astype(np.int8)


def sizes(rows: int, width: int, form: str, group: int = GROUP) -> tuple[int, int]:
    """Bytes of scales and of payload that ``[rows, width]`` numbers take.

    Example:
      >>> sizes(3, 10, "int6", 4), sizes(3, 10, "fp16")
      ((18, 23), (0, 60))
    """
    payload = -(-rows * width * FORMATS[form] // 8)
    return (0 if form in _FLOATS else 2 * rows * -(-width // group)), payload


def to_bytes(
    x: Float[Array, "n d"], form: str, group: int = GROUP
) -> tuple[bytes, bytes]:
    """Scales and payload, little-endian; `from_bytes` gives exactly `round_trip` of ``x``."""
    x = jnp.asarray(x, jnp.float32)
    if form in _FLOATS:
        return b"", np.asarray(x.astype(_FLOATS[form])).tobytes()
    codes, scales = quantise(x, FORMATS[form], group)
    return np.asarray(scales).tobytes(), pack_codes(np.asarray(codes), FORMATS[form])


def from_bytes(
    scales: bytes, payload: bytes, rows: int, width: int, form: str, group: int = GROUP
) -> Float[Array, "n d"]:
    """Inverse of `to_bytes`, fp32.

    Raises:
      ValueError: other numbers of bytes than `sizes` says.
    """
    if (len(scales), len(payload)) != sizes(rows, width, form, group):
        raise ValueError(f"{len(scales)} + {len(payload)} bytes are not {rows} x {width} {form}")
    if form in _FLOATS:
        x = np.frombuffer(payload, _FLOATS[form]).reshape(rows, width)
        return jnp.asarray(x.astype(np.float32))
    codes = unpack_codes(payload, rows * width, FORMATS[form]).reshape(rows, width)
    scale = np.frombuffer(scales, jnp.bfloat16).reshape(rows, -(-width // group))
    return dequantise(jnp.asarray(codes), jnp.asarray(scale), group)
