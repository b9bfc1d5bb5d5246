"""Scores of predictive densities: likelihood, CRPS, calibration, errors, with intervals."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import stats

from latent_jax.ops.bootstrap import mean_interval

LEVELS = (50, 80, 95)
# What has a standard deviation between seeds.
_SPREAD = ("nll", "crps", "rmse", "pit.ks", "rollout.slope", "rollout.error", "rollout.diverged")


def summary(
    nll: Float[np.ndarray, " n"],
    crps: Float[np.ndarray, " n"] | None,
    mean: Float[np.ndarray, " n"],
    pit: Float[np.ndarray, " n"],
    truth: Float[np.ndarray, " n"],
) -> dict[str, Any]:
    """Flat scores of one predictor on the last positions of windows.

    Intervals are a bootstrap over blocks of eight neighbouring windows, which may overlap.

    Returns:
      ``nll.last`` (nats) with ``.ci95``; ``crps``; ``rmse`` and ``mae`` of the mean (mean gaps);
      ``pit.ks`` and ``pit.ks_p`` (Kolmogorov-Smirnov against uniform) and ``pit.histogram``;
      ``coverage.<level>`` of central intervals, and ``coverage.<level>.conformal`` of the same
      after split-conformal calibration on every other window.
    """
    blocks = np.array_split(nll, max(1, len(nll) // 8))
    sums = np.asarray([b.sum() for b in blocks])
    counts = np.asarray([float(len(b)) for b in blocks])
    found: dict[str, Any] = {
        "nll.last": float(np.mean(nll)),
        "nll.last.ci95": mean_interval(sums, counts),
        "rmse": float(np.sqrt(np.mean((truth - mean) ** 2))),
        "mae": float(np.mean(np.abs(truth - mean))),
    }
    if crps is not None:
        found["crps"] = float(np.mean(crps))
    test = stats.kstest(pit, "uniform")
    found["pit.ks"], found["pit.ks_p"] = float(test.statistic), float(test.pvalue)
    found["pit.histogram"] = np.histogram(pit, bins=20, range=(0, 1), density=True)[0].tolist()
    # How far from the median, in probability: a central interval of level a has this below a.
    depth = np.abs(2 * pit - 1)
    calibrate, test_half = depth[::2], depth[1::2]
    for level in LEVELS:
        a = level / 100
        found[f"coverage.{level}"] = float(np.mean(depth <= a))
        rank = min(1.0, np.ceil((len(calibrate) + 1) * a) / len(calibrate))
        limit = np.quantile(calibrate, rank, method="higher")
        found[f"coverage.{level}.conformal"] = float(np.mean(test_half <= limit))
    return found


def over_seeds(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean of each score over seeds, ``.std`` between them and each seed's likelihood.

    Intervals and lists are the first seed's.
    """
    if len(rows) == 1:
        return rows[0]
    found: dict[str, Any] = {}
    for name, value in rows[0].items():
        if not all(name in row for row in rows):
            continue
        if not isinstance(value, float):
            found[name] = value
            continue
        values = np.asarray([row[name] for row in rows])
        found[name] = float(values.mean())
        kind = name.removeprefix("un").removeprefix("calibrated.")
        if kind.startswith(_SPREAD):
            found[f"{name}.std"] = float(values.std(ddof=1))
        if kind.startswith("nll"):
            found |= {f"{name}.seed{i}": float(v) for i, v in enumerate(values)}
    return found
