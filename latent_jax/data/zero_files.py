"""Files of zeta zeros: Odlyzko's table, ``.npy``, ``.npz`` and ``.txt``, read and written.

The table is a zlib-compressed pickle. It is read by an unpickler that resolves no name at all, so
that a file which is anything but a plain list of floats is refused before anything of it runs.
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from latent_jax.core.errors import DataError
from latent_jax.core.files import write_bytes
from latent_jax.data import files

SUFFIXES = (".npy", ".npz", ".txt", ".txt.gz", ".txt.xz", ".sobj")
_WRITABLE = (".npz", ".npy", ".txt")
_LARGEST = 1 << 30  # bytes a table may unpack to: 60 times Odlyzko's


class _FloatsOnly(pickle.Unpickler):
    """Builds numbers, texts and lists, and refuses every name, hence every call."""

    def find_class(self, module: str, name: str) -> None:
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid: object) -> None:
        raise pickle.UnpicklingError("it refers to objects outside")


def read_table(path: str | os.PathLike[str]) -> Float64[np.ndarray, " n"]:
    """Reads a zlib-compressed pickle of one plain list of floats, executing nothing of it.

    Raises:
      DataError: unreadable, damaged, larger than 1 GiB, or anything but a flat list of floats.
    """
    path = Path(path)
    try:
        stream = zlib.decompressobj()
        data = stream.decompress(path.read_bytes(), _LARGEST)
        if not stream.eof:
            reason = "more than 1 GiB" if len(data) >= _LARGEST else "truncated"
            raise DataError(f"{path}: not a table of zeros: {reason}")
        table = _FloatsOnly(io.BytesIO(data)).load()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    except zlib.error as error:
        raise DataError(f"{path}: not a table of zeros: damaged archive ({error})") from None
    except DataError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise DataError(
            f"{path}: not a table of zeros: a plain list of floats is needed ({_brief(error)}); "
            "nothing of it was executed"
        ) from None
    if type(table) is not list or set(map(type, table)) != {float}:
        raise DataError(f"{path}: not a table of zeros: a plain list of floats is needed")
    return np.array(table)


def read_zeros(path: str | os.PathLike[str]) -> tuple[float, Float64[np.ndarray, " n"]]:
    """Reads a file of zeros.

    Args:
      path: ``.npy`` or ``.txt`` (one number a line, ``#`` starts a comment; ``.gz`` and ``.xz``
        too), an ``.npz`` of `latent-jax data zeros` with ``base`` and ``offset``, or ``.sobj``.

    Returns:
      ``base`` and ``offset``; the zeros are their sum. Far up, float64 cannot hold the sum well
      enough: at t = 1e11 its steps are 6e-5 of a mean gap.

    Raises:
      DataError: missing, unreadable, of another kind, or not one row of real numbers.
    """
    path = Path(path)
    name = path.name
    if not path.is_file():
        kind = "is a folder, a file of zeros is needed" if path.is_dir() else "no such file"
        raise DataError(f"{path}: {kind}")
    if not name.endswith(SUFFIXES):
        raise DataError(f"{path}: zeros are read from {', '.join(SUFFIXES)}")
    if name.endswith(".sobj"):
        return 0.0, read_table(path)
    base: np.ndarray | float = 0.0
    try:
        if name.endswith(".npy"):
            offset = np.load(path, allow_pickle=False)
        elif name.endswith(".npz"):
            with np.load(path, allow_pickle=False) as archive:
                base, offset = archive["base"], archive["offset"]
        else:
            offset = np.loadtxt(io.StringIO(files.read_text(path)), ndmin=1)
    except DataError:
        raise
    except Exception as error:  # a damaged header or archive raises nearly anything
        raise DataError(f"{path}: not a file of zeros ({_brief(error)})") from None
    if not isinstance(offset, np.ndarray):
        raise DataError(f"{path}: an archive of arrays; call it .npz")
    if not all(np.issubdtype(np.asarray(a).dtype, np.floating) for a in (base, offset)):
        raise DataError(f"{path}: zeros are real numbers, the file holds {offset.dtype}")
    if offset.ndim != 1 or np.ndim(base):
        raise DataError(f"{path}: one row of zeros is needed, the file has shape {offset.shape}")
    return float(base), offset.astype(np.float64)


def _brief(error: Exception) -> str:
    """What an error says, in one line that a terminal can show."""
    text = "".join(c if c.isprintable() else " " for c in str(error)) or type(error).__name__
    return " ".join(text.split())[:160]


def read_gaps(path: str | os.PathLike[str]) -> tuple[Float64[np.ndarray, " n"], int] | None:
    """Gaps and run of a file of `write_gaps`; None where the file holds something else."""
    if not str(path).endswith(".npz") or not zipfile.is_zipfile(path):
        return None
    try:
        with np.load(path, allow_pickle=False) as archive:
            if set(archive.files) != {"gaps", "run"}:
                return None
            gaps, run = archive["gaps"], archive["run"]
    except Exception as error:  # likewise
        raise DataError(f"{path}: damaged archive ({_brief(error)})") from None
    if not all(isinstance(a, np.ndarray) for a in (gaps, run)):
        raise DataError(f"{path}: damaged archive (its members are no arrays)")
    if gaps.ndim != 1 or gaps.dtype != np.float64 or run.ndim or not 1 <= run <= len(gaps):
        raise DataError(f"{path}: not a file of gaps: one row of float64 and a run are needed")
    if not (np.isfinite(gaps).all() and abs(gaps.mean() - 1) < 0.05):
        raise DataError(f"{path}: gaps must be finite and of mean 1, theirs is {gaps.mean():.4f}")
    return gaps, int(run)


def check_target(path: str | os.PathLike[str], suffixes: tuple[str, ...] = _WRITABLE) -> None:
    """Refuses, before any work, a file that could not be written.

    Raises:
      DataError: unknown suffix, or no such folder.
    """
    path = Path(path)
    if path.suffix not in suffixes:
        raise DataError(f"{path}: the file's name must end in {' or '.join(suffixes)}")
    if not path.parent.is_dir():
        raise DataError(f"{path}: there is no folder {path.parent}")


def write_zeros(
    path: str | os.PathLike[str], base: float, offset: Float64[np.ndarray, " n"]
) -> None:
    """Writes zeros ``base + offset`` aside and renames: ``.npz``, ``.npy`` or ``.txt``.

    Raises:
      DataError: see `check_target`.
      RunError: it cannot be written.
    """
    check_target(path)
    suffix, sink = Path(path).suffix, io.BytesIO()
    if suffix == ".npz":
        np.savez_compressed(sink, base=np.float64(base), offset=offset)
    elif suffix == ".npy":
        np.save(sink, base + offset)
    else:
        sink.write(("\n".join(as_text(base, offset)) + "\n").encode())
    write_bytes(path, sink.getvalue())


def write_gaps(path: str | os.PathLike[str], gaps: Float64[np.ndarray, " n"], run: int) -> None:
    """Writes gaps in runs as ``.npz``; see `write_zeros` for errors."""
    check_target(path, (".npz",))
    sink = io.BytesIO()
    np.savez_compressed(sink, gaps=gaps, run=np.int64(run))
    write_bytes(path, sink.getvalue())


def as_text(base: float, offset: Float64[np.ndarray, " n"]) -> list[str]:
    """Zeros as decimals with ten places, whole even where a double could not hold them."""
    whole = int(base)
    rest = (base - whole) + offset
    carry = np.floor(rest)
    # rounding to ten places may reach the next whole number
    digits = np.rint((rest - carry) * 1e10).astype(np.int64)
    carry = carry.astype(np.int64) + digits // 10**10
    pairs = zip(carry.tolist(), (digits % 10**10).tolist(), strict=True)
    return [f"{whole + c}.{d:010d}" for c, d in pairs]
