"""The linear baselines of a data set: fitted to its training part, scored on what is held out."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64, Int64

from latent_jax.core.errors import DataError
from latent_jax.data.windows import Split
from latent_jax.data.zeros import Spacings
from latent_jax.systems.spacing import autoregression
from latent_jax.systems.spacing.limits import floor_scores
from latent_jax.systems.spacing.predictions import Scores, score

# Training targets, the nearest to the held-out heights, that are fitted to: fewer and the longest
# orders overfit, more and coefficients that drift with height are a compromise.
RECENT, RECENT_WARPED = 400_000, 200_000
# Orders of the autoregressions that share a window's positions between them.
_ORDERS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 160, 192, 224, 255)


def baseline_scores(
    spacings: Spacings,
    split: Split,
    window: int = 256,
    linear: tuple[int, ...] = (8, 32, 128),
    warped: tuple[int, ...] = (64, 128, 255),
) -> tuple[Int64[np.ndarray, " n"], dict[str, Scores]]:
    """Fits all baselines to the training part and scores them on the other.

    Args:
      spacings: the whole sequence.
      split: its parts.
      window: gaps in a window; targets are the last positions of all validation windows.
      linear: orders of the linear autoregressions; those that the window cannot hold are left out.
      warped: orders of the height-warped ones; none for sequences without heights.

    Returns:
      The targets' positions, and scores by name: ``gaudin``, ``ar<p>``, ``warped_ar<p>``.
    """
    at = autoregression.targets(split.validation, window, spacings.run)
    if not len(at):
        raise DataError(f"baselines: no window of {window} gaps fits into the validation part")
    observed = spacings.values[at]
    scores = {"gaudin": floor_scores(spacings.values, at, 0)[0]}
    for order in (p for p in linear if p < window):
        model = autoregression.fit_linear(spacings, split.train, order, window, RECENT)
        scores[f"ar{order}"] = score(model.predict(spacings, at), observed)
    heights = spacings.log_height.min() > 0
    for order in (p for p in warped if p < window and heights):
        fitted = autoregression.fit_warped(spacings, split.train, order, window, RECENT_WARPED)
        scores[f"warped_ar{order}"] = score(fitted.predict(spacings, at), observed)
    return at, scores


def position_averaged(
    spacings: Spacings,
    split: Split,
    starts: Int64[np.ndarray, " n"],
    window: int = 256,
) -> Float64[np.ndarray, " n"]:
    """NLL of linear prediction at every position of windows, each from the past that it has.

    The position with ``n`` gaps before it in its window is predicted by the autoregression of the
    longest order up to ``n`` of a ladder from 1 to ``window - 1``; in physical distance where the
    gaps have heights. Each order is fitted to the training part by itself.

    Args:
      spacings: the whole sequence.
      split: its parts.
      starts: first positions of the windows.
      window: gaps in a window; the first is no target.

    Returns:
      Mean NLL (nats) of each window.
    """
    orders = [p for p in _ORDERS if p < window]
    heights = spacings.log_height.min() > 0
    total = np.zeros(len(starts))
    for order, following in zip(orders, [*orders[1:], window], strict=True):
        fit, recent = (
            (autoregression.fit_warped, RECENT_WARPED)
            if heights
            else (autoregression.fit_linear, RECENT)
        )
        model = fit(spacings, split.train, order, window, recent)
        at = (np.asarray(starts)[:, None] + np.arange(order, following)).ravel()
        by_height = np.argsort(at, kind="stable")  # warped predictions want sorted targets
        found = score(model.predict(spacings, at[by_height]), spacings.values[at[by_height]])
        nll = np.empty(len(at))
        nll[by_height] = found.nll
        total += nll.reshape(len(starts), -1).sum(1)
    return total / (window - 1)
