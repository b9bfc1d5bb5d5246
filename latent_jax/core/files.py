"""Writing files so that nothing is ever left half-written."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latent_jax.core.errors import RunError

# Nobody writes one file for so long: a file aside that is older has no writer any more.
_LEFT_SECONDS = 3600.0


@contextlib.contextmanager
def explained(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns the operating system's refusal (disk full, no permission) into one clear line.

    Raises:
      RunError: naming the path, the reason and what to do.
    """
    try:
        yield
    except OSError as error:
        where = error.filename or path
        reason = error.strerror or str(error)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "make room or give another --out" if full else "give another --out"
        raise RunError(f"cannot write {where}: {reason}; {hint}") from error


def make_dir(path: str | os.PathLike[str]) -> Path:
    """Makes a directory with its parents and returns it.

    Raises:
      RunError: it cannot be made, or cannot be written to.
    """
    path = Path(path)
    with explained(path):
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            fixed = os.statvfs(path).f_flag & os.ST_RDONLY
            code = errno.EROFS if fixed else errno.EACCES
            raise OSError(code, os.strerror(code), str(path))
    return path


def write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Writes a file aside and renames it, so that a reader sees the old or the new one whole.

    Raises:
      RunError: it cannot be written; the old file, if any, is untouched.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    _clear_left(path)
    with explained(path):
        try:
            with aside.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except BaseException:
            with contextlib.suppress(OSError):
                aside.unlink()
            raise
    return path


def _clear_left(path: Path) -> None:
    """Removes what processes that were killed while writing this file have left beside it."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _LEFT_SECONDS:
                left.unlink()


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """`write_bytes` of UTF-8 text."""
    return write_bytes(path, text.encode("utf-8"))


def write_json(path: str | os.PathLike[str], tree: Any) -> Path:
    """Writes plain data (numpy scalars and arrays allowed) as indented JSON."""
    return write_text(path, json.dumps(tree, indent=1, default=plain) + "\n")


def write_jsonl(path: str | os.PathLike[str], rows: Any) -> Path:
    """Writes one JSON object per line."""
    return write_text(path, "".join(json.dumps(row, default=plain) + "\n" for row in rows))


def append_line(path: str | os.PathLike[str], row: Any) -> None:
    """Appends one JSON line in a single write, which concurrent runs do not tear apart."""
    line = (json.dumps(row, default=plain) + "\n").encode()
    with explained(path):
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, line)
        finally:
            os.close(handle)


def parse_json(text: str | bytes) -> Any:
    """`json.loads` for files that others wrote: every failure is a ValueError of one line.

    Example:
      >>> parse_json("[" * 100_000)
      Traceback (most recent call last):
      ValueError: nested too deeply
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def plain(value: Any) -> Any:
    """Numpy and JAX values as plain data; anything else as its text (a `default` for json.dumps).

    Example:
      >>> import numpy as np
      >>> plain(np.float32(0.5)), plain(np.arange(2))
      (0.5, [0, 1])
    """
    if hasattr(value, "tolist"):
        return value.tolist()
    if hasattr(value, "item"):
        return value.item()
    return str(value)
