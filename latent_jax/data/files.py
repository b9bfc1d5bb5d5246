"""Opening data files: where the data root is, compressed text, JSON and JSON lines.

Everything that can be wrong with a file becomes one `DataError` that names the file.
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

from latent_jax.core.errors import DataError
from latent_jax.core.files import parse_json

T = TypeVar("T")

ENV_ROOT = "LATENT_JAX_DATA"
SPLITS = ("train", "validation", "all")


def data_root(root: str | os.PathLike | None = None) -> Path | None:
    """Folder with the optional data sets, or None when the user has none.

    Args:
        root: explicit folder (`data.root` of a config); wins over the environment.

    Returns:
        The folder, or None when neither `root` nor ``LATENT_JAX_DATA`` is set.

    Raises:
        DataError: a folder was named but is not there.
    """
    named = root if root else os.environ.get(ENV_ROOT)
    if not named:
        return None
    path = Path(named).expanduser()
    if not path.is_dir():
        where = "data.root" if root else ENV_ROOT
        raise DataError(f"{where}={named}: no such folder; correct or unset it")
    return path


def in_root(relative: str, source: str, root: str | os.PathLike | None = None) -> Path:
    """Path of a file below the data root.

    Raises:
        DataError: no data root, or the file is not in it.
    """
    base = data_root(root)
    if base is None:
        raise DataError(
            f"source '{source}' needs a data folder: set {ENV_ROOT} or data.root, "
            "or use 'auto' or 'embedded'"
        )
    path = base / relative
    if not path.is_file():
        raise DataError(f"source '{source}': {path} is not there")
    return path


def has_file(relative: str, root: str | os.PathLike | None = None) -> bool:
    """Whether a data root exists and holds this file."""
    base = data_root(root)
    return base is not None and (base / relative).is_file()


def open_text(path: Path) -> IO[str]:
    """Opens a text file as UTF-8, unpacking ``.xz`` and ``.gz`` while reading."""
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8")
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return open(path, encoding="utf-8")


def _reading(path: Path, work: Callable[[IO[str]], T]) -> T:
    """Runs `work` on the opened file; every failure to read becomes a DataError."""
    try:
        with open_text(path) as file:
            return work(file)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise DataError(f"{path}: is a folder, a file is needed") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at {error.start})") from None
    except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path}: damaged or truncated archive ({error})") from None
    except (OSError, io.UnsupportedOperation) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None


def read_text(path: Path) -> str:
    """Whole file as text.

    Raises:
        DataError: missing, unreadable, damaged, not UTF-8, or blank.
    """
    text = _reading(path, lambda file: file.read())
    if not text.strip():
        raise DataError(f"{path}: the file is empty")
    return text


def read_json(path: Path) -> Any:
    """Parses a JSON file (optionally compressed); see `read_text` for errors."""
    text = read_text(path)
    try:
        return parse_json(text)
    except ValueError as error:
        raise DataError(f"{path}: not JSON{_spot(error)}") from None


def _spot(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f", line {error.lineno} column {error.colno}: {error.msg}"
    return f": {error}"


def read_jsonl(path: Path) -> list[dict]:
    """Parses one JSON object per line; see `read_text` for errors."""

    def rows(file: IO[str]) -> Iterator[dict]:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = parse_json(line)
            except ValueError as error:
                reason = getattr(error, "msg", error)
                raise DataError(f"{path}: line {number} is not JSON: {reason}") from None
            if not isinstance(row, dict):
                raise DataError(f"{path}: line {number} is not a JSON object")
            yield row

    result = _reading(path, lambda file: list(rows(file)))
    if not result:
        raise DataError(f"{path}: the file is empty")
    return result


def check_split(split: str, source: str) -> None:
    """Raises DataError unless `split` is train, validation or all."""
    if split not in SPLITS:
        raise DataError(f"source '{source}': split '{split}' unknown, use one of {SPLITS}")


def held_out(names: Sequence[str], fraction: float = 0.1) -> set[str]:
    """The names that belong to the validation split, chosen by hash.

    The choice depends only on the names, never on their order, and is never empty for two or
    more names.

    Args:
        names: identifiers of documents or passages.
        fraction: share of them to hold out, at least one.

    Returns:
        The held-out names; empty when there are fewer than two.
    """
    unique = sorted(set(names), key=lambda name: (zlib.crc32(name.encode()), name))
    if len(unique) < 2:
        return set()
    return set(unique[: max(1, round(len(unique) * fraction))])
