"""Normalised gaps between consecutive zeros of the Riemann zeta function, and their relatives.

Sources of `load_spacings`: ``zeta`` (Odlyzko's table, ``latent-jax fetch zeros``), a local file of
zeros (``.npy``, ``.npz``, ``.txt``, also ``.txt.gz`` and ``.txt.xz``), and generated sequences such
as ``cue:n=512,count=100000,seed=0`` (`latent_jax.data.synthetic`).

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
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from latent_jax.core import fetch
from latent_jax.core.errors import DataError
from latent_jax.data import files, synthetic

SUFFIXES = (".npy", ".npz", ".txt", ".txt.gz", ".txt.xz", ".sobj")
_LARGEST = 1 << 30  # bytes a table may unpack to: 60 times Odlyzko's
_MEAN_TOLERANCE = 0.02


class Spacings(NamedTuple):
    """Consecutive normalised gaps.

    Attributes:
      values: gaps in units of the mean gap; their mean is 1.
      log_height: ``L = ln(t / 2 pi)`` at each gap's middle (zeros for generated sequences).
      run: gaps of an unbroken sequence: those of different runs (independent random matrices) are
        no neighbours, and no window may cross from one to the next.
    """

    values: Float64[np.ndarray, " n"]
    log_height: Float64[np.ndarray, " n"]
    run: int


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
            f"{path}: not a table of zeros: a plain list of floats is needed ({error}); "
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
    except (ValueError, KeyError, OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: not a file of zeros ({error})") from None
    if not isinstance(offset, np.ndarray):
        raise DataError(f"{path}: an archive of arrays; call it .npz")
    if not all(np.issubdtype(np.asarray(a).dtype, np.floating) for a in (base, offset)):
        raise DataError(f"{path}: zeros are real numbers, the file holds {offset.dtype}")
    if offset.ndim != 1 or np.ndim(base):
        raise DataError(f"{path}: one row of zeros is needed, the file has shape {offset.shape}")
    return float(base), offset.astype(np.float64)


def unfold(gamma: Float64[np.ndarray, " n"], base: float = 0.0) -> Float64[np.ndarray, " n"]:
    """Maps zeros to a sequence of mean gap 1: ``u(t) = t / 2 pi ln(t / 2 pi e)``.

    The main term of the Riemann-von Mangoldt formula (Titchmarsh 1986, theorem 9.4).

    Args:
      gamma: zeros, or their offsets from ``base``.
      base: where the offsets start. With one, ``u(base)`` is left out, and the small differences
        of large numbers are formed in closed form.
    """
    if not base:
        return gamma / (2 * np.pi) * np.log(gamma / (2 * np.pi * np.e))
    # (b + d) ln((b + d) / 2 pi e) - b ln(b / 2 pi e)
    grown = (base + gamma) * np.log1p(gamma / base)
    return (gamma * np.log(base / (2 * np.pi * np.e)) + grown) / (2 * np.pi)


def check_zeros(
    gamma: Float64[np.ndarray, " n"], source: str, base: float = 0.0, window: int = 2
) -> None:
    """Refuses what cannot be a run of consecutive zeros.

    Raises:
      DataError: NaN, not increasing, duplicates, below the first zero, or too few for one window.
    """
    bad = ~np.isfinite(gamma)
    if bad.any():
        raise DataError(f"{source}: zero {int(bad.argmax())} is {gamma[bad.argmax()]}")
    if len(gamma) < window + 1:
        raise DataError(
            f"{source}: {len(gamma)} zeros are too few: one window of {window} gaps needs "
            f"{window + 1}"
        )
    step = np.diff(gamma)
    if (step <= 0).any():
        at = int((step <= 0).argmax())
        what = "twice in a row" if step[at] == 0 else f"followed by {base + gamma[at + 1]!r}"
        raise DataError(
            f"{source}: not increasing: zero {at}, {float(base + gamma[at])!r}, is {what}; "
            "give consecutive zeros in order, each once"
        )
    if base + gamma[0] < 14:
        raise DataError(
            f"{source}: starts at {float(base + gamma[0])!r}, the first zero is 14.1347: "
            "are these spacings, not zeros?"
        )


def zero_spacings(
    gamma: Float64[np.ndarray, " n"], source: str = "zeros", base: float = 0.0, window: int = 2
) -> Spacings:
    """Normalised gaps of consecutive zeros.

    Args:
      gamma: zeros, or their offsets from ``base``.
      source: how errors name them.
      base: see `unfold`.
      window: fewest gaps that are of use.

    Raises:
      DataError: see `check_zeros`; also where the mean gap is not 1 after unfolding.
    """
    check_zeros(gamma, source, base, window)
    values = np.diff(unfold(gamma, base))
    mean = values.mean()
    if abs(mean - 1) > _MEAN_TOLERANCE:
        raise DataError(
            f"{source}: the mean gap is {mean:.4f} after unfolding and has to be 1: wrong "
            "unfolding; the file must hold unscaled zeros of zeta, none left out"
        )
    middle = (gamma[:-1] + gamma[1:]) / 2
    return Spacings(values, np.log((base + middle) / (2 * np.pi)), len(values))


def load_spacings(
    source: str, root: str | os.PathLike[str] | None = None, window: int = 2
) -> Spacings:
    """Loads or generates normalised gaps.

    Args:
      source: ``zeta``, a path (absolute, or relative to the working folder or the data folder), or
        a generated sequence: ``cue:``, ``gue:``, ``poisson:``, ``picket:``, ``ar:`` with options
        such as ``n=512,count=100000,seed=0``.
      root: the data folder; default ``LATENT_JAX_DATA``.
      window: fewest gaps in a row that are of use; fewer are refused.

    Returns:
      The gaps, the height coordinate of each and the length of unbroken runs.

    Raises:
      DataError: unknown source, the table is not in the cache, or see `zero_spacings`.
    """
    if synthetic.is_synthetic(source):
        values, run = synthetic.generate(source)
        if run < window:
            raise DataError(
                f"source '{source}': unbroken runs of {run} gaps are too few for one window of "
                f"{window}"
            )
        return Spacings(values, np.zeros_like(values), run)
    if source == "zeta":
        path = fetch.cached("zeros")
        if path is None:
            raise DataError(
                "source 'zeta': the table is not in the cache; run 'latent-jax fetch zeros', or "
                "make zeros with 'latent-jax data zeros' and give the file"
            )
    else:
        path = _find(source, root)
    base, offset = read_zeros(path)
    return zero_spacings(offset, source, base, window)


def _find(source: str, root: str | os.PathLike[str] | None) -> Path:
    path = Path(source).expanduser()
    if path.exists():
        return path
    folder = files.data_root(root)
    if folder is not None and (folder / path).exists():
        return folder / path
    known = ", ".join(("zeta", *(f"{name}:…" for name in synthetic.KINDS)))
    raise DataError(f"source '{source}': no such file; sources are {known}, or a file of zeros")
