"""Normalised gaps between consecutive zeros of the Riemann zeta function, and their relatives.

Sources of `load_spacings`: ``zeta`` (Odlyzko's table, ``latent-jax fetch zeros``), a local file of
zeros (``.npy``, ``.npz``, ``.txt``, also ``.txt.gz`` and ``.txt.xz``), and generated sequences such
as ``cue:n=512,count=100000,seed=0`` (`latent_jax.data.synthetic`).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from latent_jax.core import fetch
from latent_jax.core.errors import DataError
from latent_jax.data import files, synthetic, zero_files

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
        return _generated(source, *synthetic.generate(source), window)
    if source == "zeta":
        path = fetch.cached("zeros")
        if path is None:
            raise DataError(
                "source 'zeta': the table is not in the cache; run 'latent-jax fetch zeros', or "
                "make zeros with 'latent-jax data zeros' and give the file"
            )
    else:
        path = _find(source, root)
        if (found := zero_files.read_gaps(path)) is not None:
            return _generated(source, *found, window)
    base, offset = zero_files.read_zeros(path)
    return zero_spacings(offset, source, base, window)


def _generated(source: str, values: Float64[np.ndarray, " n"], run: int, window: int) -> Spacings:
    if run < window:
        raise DataError(
            f"source '{source}': unbroken runs of {run} gaps are too few for one window of {window}"
        )
    return Spacings(values, np.zeros_like(values), run)


def _find(source: str, root: str | os.PathLike[str] | None) -> Path:
    path = Path(source).expanduser()
    if path.exists():
        return path
    folder = files.data_root(root)
    if folder is not None and (folder / path).exists():
        return folder / path
    known = ", ".join(("zeta", *(f"{name}:…" for name in synthetic.KINDS)))
    raise DataError(f"source '{source}': no such file; sources are {known}, or a file of zeros")
