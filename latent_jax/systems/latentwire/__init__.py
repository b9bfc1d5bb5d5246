"""LatentWire: text compressed into vectors that frozen LLMs read."""

from __future__ import annotations

from typing import Any

__all__ = ["LatentWire"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from latent_jax.systems.latentwire.api import LatentWire

        return LatentWire
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
