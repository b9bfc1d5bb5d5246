"""What a gist tree holds: geometry, representation, and the models it belongs to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float

from latent_jax.core.errors import StoreError

FORMAT = 1  # of the files; raised whenever an older library would misread them
# On disk every number is little-endian.
_DTYPES = {
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype("<f4"),
    "int8": np.dtype("i1"),
}
_UINT16_IDS = 1 << 16
# The spec is part of every commit record, which has a page to itself.
_MAX_LEVELS_LISTED = 32
_MAX_NUMBERS = 1 << 26  # in one gist; numpy's records end at 2 GiB


@dataclasses.dataclass(frozen=True)
class TreeSpec:
    """Fixed at creation; a store with another one is refused.

    A node of level 1 is the gist of `block` tokens, a node of level l the gist of `branch` nodes
    of level l - 1. A gist is `slots` vectors of `width` numbers; what they mean (input embeddings,
    keys and values of all layers) is the gist model's business.

    Attributes:
      vocab_size: ids are below it; up to 65,536 they take two bytes, else four.
      width: numbers in one slot.
      slots: slots of a gist at level 1, 2, …; the last one holds for all higher levels.
      dtype: ``float16``, ``bfloat16``, ``float32``, or ``int8`` with one fp32 scale per slot.
      tokenizer: digest of the tokenizer the ids belong to.
      base: digest of the language model the gists are read by.
      block: tokens in a block.
      branch: children of a node above level 1.
    """

    vocab_size: int
    width: int
    slots: tuple[int, ...] = (1,)
    dtype: str = "float16"
    tokenizer: str = ""
    base: str = ""
    block: int = 32
    branch: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "slots", tuple(self.slots))
        for name, low in (("vocab_size", 1), ("width", 1), ("block", 1), ("branch", 2)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise StoreError(f"gist tree: {name}={value!r}; a whole number from {low} on")
        if self.vocab_size > 1 << 31:
            raise StoreError(f"gist tree: vocab_size={self.vocab_size}; ids are 32-bit integers")
        if not 1 <= len(self.slots) <= _MAX_LEVELS_LISTED or any(
            not isinstance(s, int) or s < 1 for s in self.slots
        ):
            raise StoreError(
                f"gist tree: slots={self.slots!r}; give 1 to {_MAX_LEVELS_LISTED} whole numbers "
                "from 1 on, one per level"
            )
        if max(self.slots) * self.width > _MAX_NUMBERS:
            raise StoreError(
                f"gist tree: a gist of {max(self.slots)} slots of {self.width} numbers is too large"
            )
        if not isinstance(self.dtype, str) or self.dtype not in _DTYPES:
            raise StoreError(f"gist tree: dtype={self.dtype!r}; use one of {', '.join(_DTYPES)}")
        for name in ("tokenizer", "base"):
            if not isinstance(getattr(self, name), str) or len(getattr(self, name)) > 128:
                raise StoreError(f"gist tree: {name} must be a digest of at most 128 characters")

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> TreeSpec:
        """Inverse of `to_json`.

        Raises:
          StoreError: a field is missing, unknown or impossible.
        """
        try:
            return cls(**tree)
        except TypeError as error:
            raise StoreError(f"gist tree: the stored description is wrong ({error})") from None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self) | {"slots": list(self.slots)}

    @property
    def id_dtype(self) -> np.dtype:
        """Of a token id on disk."""
        return np.dtype("<u2" if self.vocab_size <= _UINT16_IDS else "<u4")

    def slots_at(self, level: int) -> int:
        """Slots of a gist of this level."""
        return self.slots[min(level, len(self.slots)) - 1]

    def blocks_in(self, level: int) -> int:
        """Blocks under one node; at level 0 a node is a block itself."""
        return self.branch ** max(level - 1, 0)

    def tokens_in(self, level: int) -> int:
        """Tokens under one node."""
        return self.block * self.blocks_in(level)

    def record(self, level: int) -> np.dtype:
        """Of one gist on disk."""
        shape = (self.slots_at(level), self.width)
        fields: list[tuple] = [("values", _DTYPES[self.dtype], shape)]
        if self.dtype == "int8":
            fields.append(("scale", "<f4", shape[:1]))
        return np.dtype(fields)

    def encode(self, level: int, gists: Float[np.ndarray, "n slots width"]) -> np.ndarray:
        """Gists as records.

        int8 is symmetric per slot: ``round(x / scale)`` with ``scale = max|x| / 127``.

        Raises:
          StoreError: wrong shape, or a number that is not finite in the stored dtype.
        """
        shape = (self.slots_at(level), self.width)
        if gists.ndim != 3 or gists.shape[1:] != shape:
            raise StoreError(
                f"gists of level {level} have shape {gists.shape}; the store holds "
                f"[nodes, {shape[0]} slots, {shape[1]} numbers]"
            )
        records = np.empty(len(gists), self.record(level))
        if self.dtype == "int8":
            values = gists.astype(np.float32)
            # a NaN or an infinity must reach the check below, not the rounding
            scale = np.abs(values).max(axis=2) / np.float32(127)
            finite = np.isfinite(scale).all(axis=1)
            divisor = np.where(finite[:, None] & (scale > 0), scale, 1)[..., None]
            rounded = np.rint(np.where(finite[:, None, None], values, 0) / divisor)
            records["values"], records["scale"] = np.clip(rounded, -127, 127), scale
        else:
            with np.errstate(over="ignore"):
                records["values"] = gists.astype(_DTYPES[self.dtype])
            finite = np.isfinite(records["values"].astype(np.float32)).all(axis=(1, 2))
        if not finite.all():
            bad = int(np.flatnonzero(~finite)[0])
            raise StoreError(
                f"gist {bad} of {len(gists)} for level {level} holds NaN, infinity or more than "
                f"{self.dtype} can: it is not stored"
            )
        return records

    def decode(self, records: np.ndarray) -> Float[np.ndarray, "n slots width"]:
        """Records as gists: in the stored dtype, int8 as float32."""
        if self.dtype == "int8":
            return records["values"].astype(np.float32) * records["scale"][..., None]
        return np.ascontiguousarray(records["values"])
