"""Accelerators that plans know: memory and dense bf16 peak, from the makers' data sheets."""

from __future__ import annotations

from typing import NamedTuple

from latent_jax.core.errors import ConfigError


class Chip(NamedTuple):
    """One accelerator: memory in GiB as the device reports it, peak in 1e12 operations/s."""

    hbm: float
    peak: float


CHIPS: dict[str, Chip] = {
    "a100": Chip(80e9 / 2**30, 312.0),  # 80 GB SXM
    "h100": Chip(80e9 / 2**30, 989.4),  # 80 GB SXM
    "h200": Chip(141e9 / 2**30, 989.4),
    "v5e": Chip(16.0, 197.0),
    "v5p": Chip(95.0, 459.0),
}


def chip(name: str) -> Chip:
    """A chip by name.

    Raises:
      ConfigError: not in the table.
    """
    if name.lower() not in CHIPS:
        raise ConfigError(
            f"--chip {name}: allowed: {', '.join(CHIPS)}; or give --hbm and --peak instead"
        )
    return CHIPS[name.lower()]
