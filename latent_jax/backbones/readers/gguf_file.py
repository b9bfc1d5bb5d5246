"""GGUF container: header, metadata and memory-mapped tensors.

The `gguf` package's own reader builds several arrays for every string of the vocabulary, which
takes seconds for a 50 k vocabulary. The container is simple, so the header is parsed here in one
pass; block layouts and dequantisation stay with the package.

References:
  https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import dataclasses
import math
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from latent_jax.backbones.readers import blocks
from latent_jax.core.errors import BackboneError

_SCALARS = {
    0: np.uint8,
    1: np.int8,
    2: np.uint16,
    3: np.int16,
    4: np.uint32,
    5: np.int32,
    6: np.float32,
    7: np.bool_,
    10: np.uint64,
    11: np.int64,
    12: np.float64,
}
_STRING, _ARRAY = 8, 9


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies. ``shape`` is in row-major order ([out, in] for a matrix)."""

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    offset: int
    nbytes: int


class _Cursor:
    """Reads little-endian values from a buffer; running off its end raises `IndexError`."""

    def __init__(self, buffer: memoryview):
        self.buffer = buffer
        self.at = 0

    def take(self, n: int) -> memoryview:
        if n < 0 or self.at + n > len(self.buffer):
            raise IndexError(self.at)
        piece = self.buffer[self.at : self.at + n]
        self.at += n
        return piece

    def u32(self) -> int:
        return struct.unpack("<I", self.take(4))[0]

    def u64(self) -> int:
        return struct.unpack("<Q", self.take(8))[0]

    def text(self) -> str:
        return str(self.take(self.u64()), "utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            item, count = self.u32(), self.u64()
            if item in _SCALARS:
                dtype = np.dtype(_SCALARS[item]).newbyteorder("<")
                return np.frombuffer(self.take(count * dtype.itemsize), dtype)
            return [self.value(item) for _ in range(count)]
        dtype = np.dtype(_SCALARS[kind]).newbyteorder("<")
        return np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()


class GGUFFile:
    """One GGUF file: ``metadata`` (plain Python values and arrays) and lazily dequantised tensors.

    Args:
      path: the file.

    Raises:
      BackboneError: the file cannot be read, is no GGUF, is cut short, or names a tensor twice.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self._data = np.memmap(self.path, np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise BackboneError(f"{self.path}: cannot read it as GGUF ({error}).") from error
        try:
            self._parse_header()
        except (
            IndexError,
            KeyError,
            struct.error,
            MemoryError,
            OverflowError,
            RecursionError,  # arrays in arrays in arrays
            TypeError,
            ValueError,
        ) as error:
            raise BackboneError(
                f"{self.path}: truncated or damaged GGUF header ({len(self._data):,} bytes); "
                "fetch or copy the file again."
            ) from error

    def _parse_header(self) -> None:
        cursor = _Cursor(memoryview(self._data))
        if bytes(cursor.take(4)) != b"GGUF":
            raise BackboneError(f"{self.path}: not a GGUF file (it does not start with 'GGUF').")
        version = cursor.u32()
        if version not in (2, 3):
            raise BackboneError(
                f"{self.path}: GGUF version {version} is not supported (2 and little-endian 3 are)."
            )
        n_tensors, n_fields = cursor.u64(), cursor.u64()
        self.metadata: dict[str, Any] = {}
        for _ in range(n_fields):
            key = cursor.text()
            self.metadata[key] = cursor.value(cursor.u32())
        raw = []
        for _ in range(n_tensors):
            name = cursor.text()
            # ggml stores the fastest axis first.
            shape = tuple(cursor.u64() for _ in range(cursor.u32()))[::-1]
            raw.append((name, shape, cursor.u32(), cursor.u64()))
        align = max(int(self.metadata.get("general.alignment", 32)), 1)
        start = -(-cursor.at // align) * align
        self.tensors: dict[str, TensorInfo] = {}
        for name, shape, kind, offset in raw:
            if name in self.tensors:
                raise BackboneError(f"{self.path}: tensor '{name}' is stored twice.")
            self.tensors[name] = self._info(name, shape, kind, start + offset)

    def _info(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> TensorInfo:
        try:
            quant = gguf.GGMLQuantizationType(kind)
            block, block_bytes = gguf.GGML_QUANT_SIZES[quant]
        except (ValueError, KeyError) as error:
            raise BackboneError(
                f"{self.path}: tensor '{name}' has an unknown quantisation type {kind}."
            ) from error
        count = math.prod(shape)
        if not shape or shape[-1] % block:
            raise BackboneError(
                f"{self.path}: tensor '{name}' of shape {shape} cannot be stored as {quant.name}."
            )
        nbytes = count // block * block_bytes
        if offset + nbytes > len(self._data):
            raise BackboneError(
                f"{self.path}: truncated: tensor '{name}' ends at byte {offset + nbytes:,} but the "
                f"file has {len(self._data):,}; fetch or copy the file again."
            )
        return TensorInfo(name, shape, quant, offset, nbytes)

    def names(self) -> list[str]:
        """Tensor names in file order."""
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Row-major shape of a tensor."""
        return self.tensors[name].shape

    def read(self, name: str) -> np.ndarray:
        """One tensor, dequantised to float32."""
        info = self.tensors[name]
        raw = self._data[info.offset : info.offset + info.nbytes]
        try:
            return blocks.dequantize(raw, info.kind, info.shape)
        except NotImplementedError as error:
            raise BackboneError(
                f"{self.path}: tensor '{name}' is stored as {info.kind.name}, which cannot be "
                "dequantised; use a file with F16, Q8_0, Q4_0, Q4_1 or K-quants."
            ) from error
