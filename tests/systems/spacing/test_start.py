"""The least-squares start at heights that it was not fitted to."""

from __future__ import annotations

import numpy as np
import pytest

from latent_jax.systems.spacing import recipe, start

WINDOW, COUNT = 65, 40_000


@pytest.fixture(scope="module")
def lines():
    """Gaps whose displacements are waves of physical distance, at ``ln q``, and noise."""
    rng = np.random.default_rng(0)
    height = np.linspace(10.0, 12.0, COUNT + 1)
    at = np.cumsum(2 * np.pi / height)
    off = 0.05 * rng.normal(size=COUNT + 1)
    for q in (2, 3, 5, 7, 11, 13):
        off += 0.3 / np.sqrt(q) * np.cos(np.log(q) * at + rng.uniform(0, 2 * np.pi))
    border = int(0.85 * COUNT)
    return recipe.Gaps(
        (1 + np.diff(off)).astype(np.float32), height[1:].astype(np.float32), None, None,
        train=np.arange(border - WINDOW), validation=np.arange(border, COUNT - WINDOW),
    )  # fmt: skip


def errors(gaps, reach):
    """Root mean square error at the end of the training part, and of the held-out one."""
    rows = gaps.windows(gaps.train[::2], WINDOW)
    fit = start.least_squares(rows["gaps"], rows["log_height"], WINDOW, reach)
    found = []
    for part in (gaps.train[-1500:], gaps.validation[-1500:]):
        rows = gaps.windows(part, WINDOW)
        past, level = rows["gaps"][:, :-1], rows["log_height"]
        x = np.concatenate([f for _, f in start._features(past, level, WINDOW, reach, 0)])
        error = 1 + fit.intercept + x @ fit.kernels.ravel() - rows["gaps"][:, -1]
        found.append(float(np.sqrt(np.mean(error**2))))
    return found


def test_the_error_does_not_grow_above_the_heights_trained_on(lines):
    near, far = errors(lines, lines.reach(WINDOW))
    assert near < 0.06 and far < 1.06 * near
    # Kernels as long as the window is at the lowest height are cut off by its end at all others.
    near, far = errors(lines, 2 * np.pi * (WINDOW - 1) / float(lines.log_height[0]))
    assert far > 1.15 * near


def test_a_short_past_has_short_kernels(lines):
    rows = lines.windows(lines.train[::20], WINDOW)
    reach = lines.reach(WINDOW)
    fit = start.least_squares(
        rows["gaps"][:, -17:], rows["log_height"], WINDOW, reach, farthest=reach * 16 / 64
    )
    assert fit.kernels.shape == (1, WINDOW)
    # 66 knots to the reach, 16.5 of them in a quarter of it; the last spline's own is two before.
    assert np.abs(fit.kernels[0, :15]).min() > 0 and not fit.kernels[0, 15:].any()
