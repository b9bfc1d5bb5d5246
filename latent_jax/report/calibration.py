"""Is a predictive density honest? The probability integral transform, as bars and as ranks."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from jaxtyping import Float
from markupsafe import Markup
from scipy import stats

from latent_jax.report.figures import PALETTE, STYLE, new, svg


def pit(title: str, density: Sequence[float], count: int | None = None) -> Markup:
    """A histogram of the transform: even where the predictions are honest.

    Args:
      title: above the bars.
      density: of each of equal bins on [0, 1], mean 1.
      count: values behind it; with it, the range that holds 95 % of the bars of an honest one.
    """
    bins = len(density)
    with matplotlib.rc_context(STYLE):
        figure = new(3.5, 2.3)
        axes = figure.add_subplot()
        edges = (np.arange(bins) + 0.5) / bins
        axes.bar(edges, density, width=0.92 / bins, color=PALETTE[0])
        axes.axhline(1, color=PALETTE[-1], linewidth=1)
        if count:
            low, high = stats.binom.interval(0.95, count, 1 / bins)
            axes.axhspan(low * bins / count, high * bins / count, color=PALETTE[-1], alpha=0.25)
        axes.set_title(title)
        axes.set_xlabel("probability of a smaller gap")
        axes.set_ylabel("density")
        return svg(figure, title)


def ranks(title: str, values: Float[np.ndarray, " n"]) -> Markup:
    """Where the truth ranks among the predicted: share of values below each, minus that value.

    A line at 0 is honest; within the band (Kolmogorov-Smirnov, 95 %) it may be. A slope down in the
    middle is a density that is too narrow, up one that is too wide.
    """
    x = np.sort(np.asarray(values, np.float64))
    share = (np.arange(len(x)) + 0.5) / len(x)
    shown = np.unique(np.linspace(0, len(x) - 1, 400).astype(int))
    limit = float(stats.kstwo.ppf(0.95, len(x)))
    with matplotlib.rc_context(STYLE):
        figure = new(3.5, 2.3)
        axes = figure.add_subplot()
        axes.axhspan(-limit, limit, color=PALETTE[-1], alpha=0.25)
        axes.axhline(0, color=PALETTE[-1], linewidth=1)
        axes.plot(x[shown], (share - x)[shown], color=PALETTE[0], linewidth=1.4)
        axes.set_title(title)
        axes.set_xlabel("probability of a smaller gap")
        axes.set_ylabel("share below, minus it")
        return svg(figure, title)
