"""Errors as a person sees them: one line on stderr."""

from __future__ import annotations

import errno
import logging
import sys
from typing import Any

# Reasons of the operating system that a person can do something about.
_REASONS = {
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT,
    errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.EFBIG,
}  # fmt: skip


def quiet_threads() -> None:
    """Keeps off the terminal what Orbax's threads say of an error that the main thread raises too.

    A save that fails (a full disk) leaves tasks on an event loop that is closed: their errors would
    come as tracebacks through two loggers and Python's hook for what nobody can catch.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if not isinstance(sys.unraisablehook, _WithoutClosedLoops):
        sys.unraisablehook = _WithoutClosedLoops(sys.unraisablehook)


class _WithoutClosedLoops:
    """A `sys.unraisablehook` that passes on all but callbacks to a closed event loop."""

    def __init__(self, before: Any) -> None:
        self._before = before

    def __call__(self, found: Any) -> None:
        if "Event loop is closed" not in str(found.exc_value):
            self._before(found)


def complain(message: str, code: int) -> int:
    """Prints one line on stderr, red, and returns the exit code."""
    from rich.console import Console

    line = " ".join(str(message).split())
    colour = "yellow" if code == 75 else "red"
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        f"latent-jax: {line}", style=colour, markup=False
    )
    return code


def explain(error: BaseException) -> str | None:
    """One line for an error that is not ours but has a cause a person can mend, else None."""
    if isinstance(error, OSError) and error.errno in _REASONS:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "; make room or give another --out" if full else ""
        return f"{error.filename or 'a file'}: {error.strerror}{hint}"
    text = str(error)
    if "No space left on device" in text or "Disk quota exceeded" in text:
        return "no space left on the device that the run writes to; make room or give another --out"
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
        return (
            "out of memory: lower train.batch_size or raise train.accumulate "
            f"({text.strip().splitlines()[0][:120] if text.strip() else 'MemoryError'})"
        )
    return None
