"""Percentile bootstrap over examples (Efron & Tibshirani 1993), vectorised and seeded.

Examples that are not independent, such as places of one text, belong to one cluster: clusters are
drawn whole (Davison & Hinkley 1997, section 3.8, resampling clusters only). The fewer the clusters,
the more such an interval is too narrow; of a single one there is none.
"""

from __future__ import annotations

import numpy as np

Interval = tuple[float, float]
_CHUNK_ELEMENTS = 4_000_000


def resampled_sums(columns: np.ndarray, resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """Sums over ``resamples`` draws of the rows, with replacement.

    Args:
      columns: ``[n, c]``; a row is one example, so the columns of a draw stay paired.

    Returns:
      ``[resamples, c]`` float64.
    """
    columns = np.asarray(columns, np.float64)
    n, c = columns.shape
    rng = np.random.default_rng(seed)
    sums = np.empty((resamples, c))
    # Chunked, because [resamples, n] indices of a large evaluation would take gigabytes.
    step = max(1, _CHUNK_ELEMENTS // max(n * c, 1))
    for start in range(0, resamples, step):
        stop = min(start + step, resamples)
        rows = rng.integers(0, n, size=(stop - start, n))
        sums[start:stop] = columns[rows].sum(axis=1)
    return sums


def _interval(statistic: np.ndarray, level: float) -> Interval:
    statistic = statistic[np.isfinite(statistic)]
    if not len(statistic):
        return float("nan"), float("nan")
    low, high = np.quantile(statistic, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean_interval(
    values: np.ndarray, counts: np.ndarray | None = None, *,
    resamples: int = 2000, level: float = 0.95, seed: int = 0,
    clusters: np.ndarray | None = None,
) -> Interval:  # fmt: skip
    """Interval of ``sum(values) / sum(counts)``, or of the mean over examples without counts."""
    values = np.asarray(values, np.float64)
    if values.size == 0:
        return float("nan"), float("nan")
    counts = np.ones_like(values) if counts is None else np.asarray(counts, np.float64)
    return ratio_interval(
        values, counts, resamples=resamples, level=level, seed=seed, clusters=clusters
    )


def difference_interval(
    first: np.ndarray, second: np.ndarray, *,
    resamples: int = 2000, level: float = 0.95, seed: int = 0,
    clusters: np.ndarray | None = None,
) -> Interval:  # fmt: skip
    """Interval of ``mean(first) - mean(second)`` on the same examples (paired)."""
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.shape != second.shape:
        raise ValueError(f"paired arms need equal shapes, got {first.shape} and {second.shape}")
    return mean_interval(
        first - second, resamples=resamples, level=level, seed=seed, clusters=clusters
    )


def ratio_interval(
    numerator: np.ndarray, denominator: np.ndarray, *,
    resamples: int = 2000, level: float = 0.95, seed: int = 0,
    clusters: np.ndarray | None = None,
) -> Interval:  # fmt: skip
    """Interval of ``mean(numerator) / mean(denominator)`` on the same examples.

    A ratio of means, not a mean of ratios; draws with a zero denominator are left out.

    Args:
      clusters: which cluster each example is in, ``[n]``; none: every example is one.
    """
    pair = np.stack(
        [np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)], axis=1
    )
    if clusters is not None:
        names, at = np.unique(clusters, return_inverse=True)
        sums = np.zeros((len(names), 2))
        np.add.at(sums, at, pair)
        pair = sums if len(names) > 1 else sums[:0]
    if len(pair) == 0:
        return float("nan"), float("nan")
    sums = resampled_sums(pair, resamples, seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        return _interval(sums[:, 0] / sums[:, 1], level)
