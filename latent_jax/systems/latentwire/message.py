"""Compressed texts as a person holds them: latents with who made them, in memory or in a file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from latent_jax.core.files import write_bytes
from latent_jax.systems.latentwire import wire as files
from latent_jax.systems.latentwire.model import Wire


@dataclasses.dataclass(frozen=True)
class Message:
    """What `LatentWire.compress` returns.

    Attributes:
      wire: the latents of one or several texts.
      origin: which compressor made them.
      ratio: tokens per latent.
      segment: tokens that were compressed at once.
      centre: the compressor's centre, which integer formats take off before rounding.
      bits: number format in which they came, ``fp32`` if they never travelled.
      private: latents of each segment that only single readers are given.
      codes: of each stage of the compressor's residual VQ, or levels of a number; 0: neither.
    """

    wire: Wire = dataclasses.field(repr=False)
    origin: files.Origin
    ratio: float
    segment: int
    centre: Float[np.ndarray, " z"] | None = dataclasses.field(default=None, repr=False)
    bits: str = "fp32"
    private: int = 0
    codes: int = 0

    @property
    def z(self) -> Float[Array, "b m z"]:
        """Latents, padded to the text with most."""
        return self.wire.z

    @property
    def mask(self) -> Bool[Array, "b m"]:
        """Which of them are real."""
        return self.wire.mask

    @property
    def positions(self) -> Int[Array, "b m"]:
        """Token positions that they stand at."""
        return self.wire.positions

    @property
    def length(self) -> Int[Array, " b"]:
        """Tokens of each text."""
        return self.wire.length

    @property
    def latents(self) -> list[int]:
        """Latents of each text, ``M``."""
        return np.asarray(self.wire.mask).sum(1).tolist()

    def __len__(self) -> int:
        """Number of texts."""
        return self.wire.z.shape[0]

    def __getitem__(self, row: int) -> Message:
        """One of the texts."""
        row = range(len(self))[row]
        return dataclasses.replace(self, wire=jax.tree.map(lambda x: x[row : row + 1], self.wire))

    def pack(self, bits: str = "fp32") -> bytes:
        """All of it as bytes that another process with the same compressor can `LatentWire.unpack`.

        Args:
          bits: ``fp32`` (exact), ``bf16``, ``fp16``, ``int8``, ``int6`` or ``int4``; ``codes``
            (exact) are the digits of a discrete wire.

        Raises:
          WireError: an unknown format, or one that cannot hold these numbers.
        """
        return self._packed(bits)[0]

    def size(self, bits: str = "fp32") -> files.Bytes:
        """Bytes of header, scales and payload in a number format."""
        return self._packed(bits)[1]

    def save(self, path: str | Path, bits: str = "fp32") -> files.Bytes:
        """Writes `pack` to a file, aside and then renamed; returns what its parts take.

        Raises:
          WireError: as `pack`.
          RunError: the file cannot be written.
        """
        data, parts = self._packed(bits)
        write_bytes(path, data)
        return parts

    def _packed(self, bits: str) -> tuple[bytes, files.Bytes]:
        return files.pack(
            self.wire, self.origin, self.ratio, self.segment, bits, centre=self.centre,
            private=self.private, codes=self.codes,
        )  # fmt: skip
