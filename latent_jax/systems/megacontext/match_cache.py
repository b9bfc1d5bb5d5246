"""Vectors of a history's windows, kept from one process to the next.

Each file holds what was read together and is named by its content: it appears whole or not at all,
processes that write at once cannot disturb one another, and what is damaged is found, left out, and
read from the text again. Nothing has to be locked.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Int8

from latent_jax.core.errors import RunError
from latent_jax.core.files import make_dir, write_bytes

logger = logging.getLogger(__name__)

KEY = 16  # bytes that name a window's tokens


class Kept:
    """The folder beside a store that holds them.

    Args:
      store: the store; a slash at its end does not matter.
      made: digest of what makes the vectors.
      window: tokens of a window.
      width: numbers of a vector.
    """

    def __init__(self, store: str | Path, made: str, window: int, width: int):
        store = Path(os.path.abspath(store))
        self.path = store.with_name(f"{store.name}.matches-{made}-{window}x{width}")
        self.shape = (window, width)
        self._told = False

    def read(self) -> Iterator[tuple[bytes, Int8[np.ndarray, "t w"]]]:
        """Windows by their key, from whatever files are whole."""
        size = KEY + self.shape[0] * self.shape[1]
        for file in sorted(self.path.glob("*.bin")) if self.path.is_dir() else ():
            try:
                raw = file.read_bytes()
            except OSError as error:
                self._tell(f"{file}: cannot be read ({error.strerror})")
                continue
            if file.stem != _name(raw) or len(raw) % size:
                self._tell(f"{file} is damaged; what it held is read from the text again")
                continue
            for at in range(0, len(raw), size):
                x = np.frombuffer(raw, np.int8, size - KEY, at + KEY)
                yield raw[at : at + KEY], x.reshape(self.shape)

    def add(self, found: Mapping[bytes, Int8[np.ndarray, "t w"]]) -> None:
        """Keeps windows; where that is impossible they are read again next time."""
        raw = b"".join(key + x.tobytes() for key, x in found.items())
        try:
            make_dir(self.path)
            write_bytes(self.path / f"{_name(raw)}.bin", raw)
        except RunError as error:
            self._tell(f"vectors of the history are not kept: {error}")

    def _tell(self, problem: str) -> None:
        """Says once that something is wrong; nothing is lost but time."""
        if not self._told:
            logger.warning(problem)
        self._told = True


def _name(raw: bytes) -> str:
    return hashlib.blake2b(raw, digest_size=16).hexdigest()
