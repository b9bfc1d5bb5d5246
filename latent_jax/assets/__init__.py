"""Files that ship with the package: the embedded passages, tiny readers and compressors."""

from __future__ import annotations

from pathlib import Path


def asset(name: str) -> Path:
    """Path of a shipped file, e.g. ``asset("passages.json")``.

    Args:
        name: path below the asset folder; whether it exists is for the caller to check.

    Returns:
        The absolute path.
    """
    return Path(__file__).resolve().parent / name
