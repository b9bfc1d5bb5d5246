"""Digits of residual codes: the codec to single ids, and ids that are no codes.

Models work on digits, one per stage. A single id is for display and export: base ``k``, stage 0
least significant, in Python integers or arrays wide enough, and never silently wrapped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from latent_jax.core.errors import ConfigError


def check_fits(k: int, stages: int, dtype: np.dtype | type = np.int32, extra: int = 0) -> None:
    """Refuses a base and depth whose ids, and ``extra`` special ones, do not fit ``dtype``.

    Raises:
      ConfigError: they do not.
    """
    if k < 1 or stages < 1:
        raise ConfigError(f"digits: base {k} and {stages} stages must be at least 1")
    most = int(np.iinfo(dtype).max)
    if k**stages + extra - 1 > most:
        raise ConfigError(
            f"{stages} digits of base {k} do not compose into one {np.dtype(dtype).name} id "
            f"(largest {most}): keep the digits apart, or compose fewer stages"
        )


def _check_range(digits: np.ndarray, k: int) -> None:
    if digits.size and (digits.min() < 0 or digits.max() >= k):
        bad = digits[(digits < 0) | (digits >= k)][0]
        raise ConfigError(f"digit {int(bad)} is not in [0, {k}): padding (-1) composes to no id")


def compose(digits: Int[Array, "*b s"], k: int) -> Int[Array, "*b"]:
    """One int32 id per row of digits in ``[0, k)``; works under jit.

    Digits are checked where their values are known (outside jit).

    Raises:
      ConfigError: ids would overflow int32, or a digit is out of range.
    """
    check_fits(k, digits.shape[-1])
    if isinstance(digits, np.ndarray):
        _check_range(digits, k)
    weights = jnp.asarray([k**s for s in range(digits.shape[-1])], jnp.int32)
    return jnp.sum(jnp.asarray(digits, jnp.int32) * weights, -1, dtype=jnp.int32)


def decompose(ids: Int[Array, "*b"], k: int, stages: int) -> Int[Array, "*b s"]:
    """The digits of `compose`d ids, exactly.

    Raises:
      ConfigError: the base and depth do not fit int32, or (outside jit) an id is no code.
    """
    check_fits(k, stages)
    if isinstance(ids, np.ndarray) and ids.size and (ids.min() < 0 or ids.max() >= k**stages):
        raise ConfigError(
            f"ids must be codes in [0, {k**stages}), got {int(ids.min())} to {int(ids.max())}"
        )
    ids = jnp.asarray(ids, jnp.int32)
    return jnp.stack([ids // k**s % k for s in range(stages)], -1)


def compose_wide(digits: Int[Array, "*b s"], k: int) -> np.ndarray:
    """`compose` in 64 bits on the host, for exports beyond int32.

    Raises:
      ConfigError: ids would overflow int64, or a digit is out of range.
    """
    digits = np.asarray(digits, np.int64)
    check_fits(k, digits.shape[-1], np.int64)
    _check_range(digits, k)
    return np.sum(digits * np.asarray([k**s for s in range(digits.shape[-1])], np.int64), -1)


def decompose_wide(ids: np.ndarray, k: int, stages: int) -> np.ndarray:
    """The digits of `compose_wide`d ids."""
    check_fits(k, stages, np.int64)
    ids = np.asarray(ids, np.int64)
    return np.stack([ids // k**s % k for s in range(stages)], -1)


@dataclasses.dataclass(frozen=True)
class Specials:
    """The one table of ids that are no codes: they follow the codes of a digit or composed id.

    Example:
      >>> table = Specials(codes=1024)
      >>> table.bos, table.pad, table.size
      (1024, 1027, 1028)
      >>> Specials.composed(k=16, stages=4).eos
      65537

    Attributes:
      codes: ids ``0 … codes - 1`` are codes.
      names: the special ids, in order.
    """

    codes: int
    names: Sequence[str] = ("bos", "eos", "eop", "pad")

    def __post_init__(self) -> None:
        if self.codes < 1 or len(set(self.names)) != len(self.names):
            raise ConfigError(
                f"special ids: {self.codes} codes must be at least 1, names {self.names} distinct"
            )
        if self.size - 1 > np.iinfo(np.int32).max:
            raise ConfigError(
                f"{self.codes} codes and {len(self.names)} special ids overflow int32"
            )

    @classmethod
    def composed(cls, k: int, stages: int) -> Specials:
        """The table beside ids of `compose`."""
        check_fits(k, stages, extra=4)
        return cls(codes=k**stages)

    def __getattr__(self, name: str) -> int:
        names = object.__getattribute__(self, "names")
        if name in names:
            return self.codes + list(names).index(name)
        raise AttributeError(f"no special id {name!r}: there are {', '.join(names)}")

    @property
    def size(self) -> int:
        """All ids, codes and special ones."""
        return self.codes + len(self.names)

    def is_special(self, ids: Array) -> Array:
        """Which ids are no codes."""
        return ids >= self.codes
