"""A start in closed form: kernels by least squares, and the linear prediction that they make.

Gradient descent needs millions of targets to find what one linear system gives at once: the
autoregression in physical distance, here with second-order terms, for pasts of several lengths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from latent_jax.systems.spacing import kernels
from latent_jax.systems.spacing.config import EmbedConfig, lengths
from latent_jax.systems.spacing.recipe import Gaps

# Windows that are fitted to; how many of them are in memory at a time, and share their kernels.
_WINDOWS, _ROWS, _CHUNK = 100_000, 2048, 64


class Fit(NamedTuple):
    """A least-squares prediction ``s - 1 = intercept + sum_c sum_j h_c(2 pi j / L) x_c[j]``.

    Attributes:
      kernels: spline coefficients of each channel (see `kernels.channels`).
      intercept: ``c``.
      sigma: residual standard deviation.
    """

    kernels: Float[np.ndarray, "c knots"]
    intercept: float
    sigma: float


def _features(
    gaps: Float[np.ndarray, "n t"],
    log_height: Float[np.ndarray, " n"],
    knots: int,
    reach: float,
    products: int,
) -> Iterator[tuple[slice, Float[np.ndarray, "m f"]]]:
    """Channels of whole windows on the splines, some windows at a time.

    Neighbours in height, whose kernels are the same to 1e-3, share the splines' values.
    """
    lags = gaps.shape[1]
    past = gaps[:, ::-1].astype(np.float32) - 1
    off = np.cumsum(past, axis=1) - (past @ kernels.centring(lags)[lags])[:, None]
    parts = [past, *map(np.asarray, kernels.pairs(off, products))]
    hats = jax.jit(lambda level: kernels.basis(kernels.distances(lags, level), knots, reach))
    for first in range(0, len(gaps), _ROWS):
        rows = slice(first, min(first + _ROWS, len(gaps)))
        x = np.empty((rows.stop - first, len(parts), knots), np.float32)
        for at in range(first, rows.stop, _CHUNK):
            some = slice(at, min(at + _CHUNK, rows.stop))
            basis = np.asarray(hats(log_height[some].mean()))
            for c, part in enumerate(parts):
                np.matmul(part[some], basis, out=x[at - first : some.stop - first, c])
        yield rows, x.reshape(len(x), -1)


def least_squares(
    gaps: Float[np.ndarray, "n t"],
    log_height: Float[np.ndarray, " n"],
    knots: int,
    reach: float,
    products: int = 0,
    ridge: float = 1e-8,
    farthest: float | None = None,
) -> Fit:
    """Fits the last gap of windows to all before it.

    Args:
      gaps: windows, in order of height.
      log_height: ``ln(t / 2 pi)`` of each.
      knots: spline coefficients per kernel.
      reach: physical distance at which the last spline ends.
      products: second-order channels.
      ridge: relative to the variance of each regressor.
      farthest: distance at which kernels end, default ``reach``; see `recipe.Gaps.reach`.
    """
    n, ahead = len(gaps), gaps[:, -1].astype(np.float32) - 1
    # A short past is for the first knots only; the coefficients of the others are 0. The last
    # spline ends two knots after its own; a past of a gap or two has no such room.
    step = reach / (knots + 1)
    used = knots
    if farthest is not None:
        used = min(knots, max(int(farthest / step + 1e-6) - 1, min(gaps.shape[1], 4)))
    size = (1 + products) * used
    gram, cross, total = np.zeros((size, size)), np.zeros(size), np.zeros(size)
    for rows, x in _features(gaps[:, :-1], log_height, used, step * (used + 1), products):
        gram += x.T @ x
        cross += x.T @ ahead[rows]
        total += x.sum(0)
    centred = gram / n - np.outer(total, total) / n**2
    wanted = cross / n - total * ahead.mean() / n
    scale = np.sqrt(np.maximum(np.diag(centred), 1e-6 * np.diag(centred).max()))
    system = centred / np.outer(scale, scale) + ridge * np.eye(size)
    weights = np.linalg.solve(system, wanted / scale) / scale
    residual = ahead.var() - 2 * wanted @ weights + weights @ centred @ weights
    intercept = float(ahead.mean() - total @ weights / n)
    kernel = np.zeros((1 + products, knots))
    kernel[:, :used] = weights.reshape(1 + products, used)
    return Fit(kernel, intercept, float(np.sqrt(max(residual, 1e-12))))


def embedding(
    gaps: Gaps, window: int, reach: float, embed: EmbedConfig, seeds: Sequence[int]
) -> dict[str, np.ndarray]:
    """Parameters of `embedding.GapEmbedding` that read the data.

    Args:
      gaps: what is trained on.
      window: gaps in a window, the target among them.
      reach: physical distance that the kernels cover.
      embed: which kernels; ``start`` says how they begin, the rest of them is noise.
      seeds: of the noise, one for each model.

    Returns:
      With a leading axis of seeds:
      ``kernels`` and ``offset``, so that every summary of a whole window has mean 0 and variance 1
      in training; with ``start=autoregression`` also ``gate``, ``level`` and ``spread``, so that
      each position is predicted by the fit of the longest past that it has.
    """
    context = window - 1
    starts = gaps.spread(_WINDOWS, "train")
    rows = gaps.windows(starts, window)
    height = rows["log_height"] if embed.height else np.full(len(starts), 2 * np.pi, np.float32)
    shape = (1 + embed.products, embed.knots)
    fits: list[Fit] = []
    fitted: list[int] = []
    if embed.start == "autoregression":
        fitted = lengths(context)[: embed.kernels]
        fits = [
            least_squares(
                rows["gaps"][:, -n - 1 :], height, embed.knots, reach, embed.products,
                embed.ridge, farthest=reach * n / context,
            )
            for n in fitted
        ]
        found = np.stack([fit.kernels for fit in fits], axis=-1)
    elif embed.start == "primes":
        waves = kernels.prime_lines(-(-embed.kernels // 2), embed.knots, reach)
        found = np.zeros((*shape, embed.kernels))
        found[0] = waves[:, : embed.kernels]
    else:
        found = np.zeros((*shape, 0))
    few = slice(None, None, max(1, len(starts) // 4096))
    sample = _features(rows["gaps"][few, 1:], height[few], embed.knots, reach, embed.products)
    x = np.concatenate([part for _, part in sample])
    made = []
    for seed in seeds:
        draw = np.random.default_rng(seed)
        noise = draw.normal(size=(*shape, embed.kernels - found.shape[-1]))
        # The same variance from every channel.
        parts = np.split(x, shape[0], axis=1)
        share = np.stack([(part @ h).std(0) for part, h in zip(parts, noise, strict=True)])
        h = np.concatenate([found, noise / np.maximum(share, 1e-6)[:, None]], axis=-1)
        out = x @ h.reshape(-1, embed.kernels)
        mean, std = out.mean(0), np.maximum(out.std(0), 1e-6)
        one = {"kernels": h / std, "offset": -mean / std}
        if fits:
            one |= _line(fitted, fits, mean, std, context, float(rows["gaps"].std()))
        made.append(one)
    return {k: np.stack([one[k] for one in made]).astype(np.float32) for k in made[0]}


def _line(
    fitted: list[int],
    fits: list[Fit],
    mean: Float[np.ndarray, " k"],
    std: Float[np.ndarray, " k"],
    context: int,
    sigma: float,
) -> dict[str, np.ndarray]:
    """For each number of past gaps: weights of the summaries, level, and log residual scale."""
    gate = np.zeros((context, len(fitted)))
    level, spread = np.zeros(context), np.full(context, np.log(sigma))
    for i, (length, fit) in reversed(list(enumerate(zip(fitted, fits, strict=True)))):
        gate[length - 1 :] = 0
        gate[length - 1 :, i] = std[i]
        level[length - 1 :] = fit.intercept + mean[i]
        spread[length - 1 :] = np.log(fit.sigma)
    return {"gate": gate, "level": level, "spread": spread}
