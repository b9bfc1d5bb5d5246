"""The final evaluation: scores of every seed, beside exact floors and linear baselines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from latent_jax.core.types import PyTree
from latent_jax.ops import mdn
from latent_jax.ops.bootstrap import difference_interval, mean_interval
from latent_jax.systems.spacing import (
    baselines,
    calibration,
    limits,
    predict,
    rollout,
    scores,
)
from latent_jax.systems.spacing.predict import Predicted
from latent_jax.systems.spacing.recipe import Gaps

_LONGEST = 32  # gaps of history: more lower the floor by less than 0.002 nats
_FLOOR_TARGETS = 1000


def evaluate(
    system: Any, params: PyTree, progress: Callable[..., None]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scores on held-out windows.

    Returns:
      metrics: of `scores.summary` (mean over seeds, see `scores.over_seeds`), plus
        ``nll.position_averaged`` (nats, over all positions, of which a postfix scores some, see
        `predict.averaging`; never comparable with ``nll.last``),
        with ``data.calibration`` also scores of ``eval.calibration_targets`` gaps after a whole
        window, ``uncalibrated.*`` and, after `calibration.fit`, ``calibrated.*``
        (``calibrated.set_apart.nll`` is what that starts from);
        ``floor.gue.k<k>`` and ``baseline.<name>.*`` on the same last positions,
        ``nll.minus_floor`` and ``nll.minus_floor.inner`` (paired, random-matrix data only: below 0
        would be a leak) and ``rollout.*``.
      artefacts: none.
    """
    c, gaps = system.config, system.gaps
    starts = gaps.spread(c.eval.windows)
    rows = gaps.windows(starts, c.data.window)
    score = predict.predictor(system.model, c)
    found = predict.predict(score, params, rows, c.eval.batch_size, progress=progress)
    truth = rows["gaps"][:, -1]
    share = predict.averaging(predict.scored(c))
    summaries = [_summary(found, i, truth, share) for i in range(c.seeds)]
    if c.data.calibration:
        calibrated = _calibrated(system, params)
        summaries = [one | other for one, other in zip(summaries, calibrated, strict=True)]
        progress("calibration", 1, 1)
    metrics = scores.over_seeds(summaries)
    metrics["windows"] = len(starts)
    scored = predict.scored(c), found.everywhere[0]
    metrics |= random_matrix(c.data.source, gaps, starts, c.data.window, *scored, c.eval)
    progress("floors", 1, 1)
    if c.eval.baselines:
        metrics |= linear(gaps, starts, c.data.window)
        progress("baselines", 1, 1)
    if c.eval.rollouts:
        metrics |= _rollouts(system, params)
        progress("rollouts", 1, 1)
    return metrics, {}


def _summary(
    found: Predicted, seed: int, truth: np.ndarray, share: np.ndarray
) -> dict[str, Any]:
    crps = None if found.crps is None else found.crps[seed]
    metrics = scores.summary(found.nll[seed], crps, found.mean[seed], found.pit[seed], truth)
    per_window = found.everywhere[seed] @ share
    metrics["nll.position_averaged"] = float(per_window.mean())
    metrics["nll.position_averaged.ci95"] = mean_interval(per_window)
    return metrics


def _calibrated(system: Any, params: PyTree) -> list[dict[str, Any]]:
    """Scores of each seed before and after `calibration.fit` to gaps set apart, and its factors."""
    c = system.config
    parts = {
        part: predict.densities(
            system.model, c, params, system.gaps, part, c.eval.calibration_targets
        )
        for part in ("calibration", "validation")
    }
    found = []
    for i in range(c.seeds):
        (apart, known), (density, truth) = (
            (jax.tree.map(lambda x, i=i: x[i], own), gaps) for own, gaps in parts.values()
        )
        fitted = calibration.fit(apart, known)
        one = _all_scores("uncalibrated", density, truth)
        one |= _all_scores("calibrated", fitted.apply(density), truth)
        one |= {f"calibrated.factor.{k}": float(np.exp(v)) for k, v in fitted._asdict().items()}
        one["calibrated.set_apart.nll"] = float(-mdn.log_prob(apart, known).mean())
        one["calibrated.targets"] = len(truth)
        found.append(one)
    return found


def _all_scores(name: str, density: mdn.Mixture, truth: np.ndarray) -> dict[str, Any]:
    nll, crps = -mdn.log_prob(density, truth), mdn.crps(density, truth)
    mean, pit = mdn.moments(density)[0], mdn.cdf(density, truth)
    found = scores.summary(*map(np.asarray, (nll, crps, mean, pit)), truth)
    return {f"{name}.{k}": v for k, v in found.items()}


def random_matrix(
    source: str, gaps: Gaps, starts: np.ndarray, window: int, scored: np.ndarray, nll: np.ndarray,
    config: Any,
) -> dict[str, Any]:
    """Exact floors of random-matrix gaps, and the same law as a predictor of these gaps.

    ``floor.gue.k<k>`` is the law's expected NLL after ``k`` gaps, `limits.FLOOR`;
    ``baseline.gue_k<k>`` scores the law on the held-out gaps themselves. On ``cue:`` and ``gue:``
    data the second estimates the first, and ``nll.minus_floor`` (paired on the same targets,
    against the longest context) is the leak test. The model never gets what follows the last
    position, so ``nll.minus_floor.inner`` compares a middle one, whose target is among its input.
    """
    if not config.floors:
        return {}
    contexts = [k for k in limits.FLOOR if k < min(window, _LONGEST + 1)]
    metrics: dict[str, Any] = {f"floor.gue.k{k}": limits.FLOOR[k] for k in contexts}
    picked = np.linspace(0, len(starts) - 1, min(_FLOOR_TARGETS, len(starts))).astype(int)
    target = starts[picked] + window - 1
    values = gaps.source.values
    synthetic = source.partition(":")[0] in ("cue", "gue")
    for k in {0, contexts[-1]} if not synthetic else contexts:
        own, _ = limits.floor_scores(values, target, k)
        metrics[f"baseline.gue_k{k}.nll"] = float(own.nll.mean())
        metrics[f"baseline.gue_k{k}.crps"] = float(own.crps.mean())
        if synthetic and k == contexts[-1]:
            metrics |= _minus_floor("nll.minus_floor", nll[picked, -1], own.nll)
    if synthetic:
        i = len(scored) // 2
        seen = int(scored[i]) + 1
        own, _ = limits.floor_scores(values, starts[picked] + seen, min(seen, _LONGEST))
        metrics |= _minus_floor("nll.minus_floor.inner", nll[picked, i], own.nll)
    return metrics


def _minus_floor(name: str, nll: np.ndarray, floor: np.ndarray) -> dict[str, Any]:
    return {name: float(np.mean(nll - floor)), f"{name}.ci95": difference_interval(nll, floor)}


def linear(gaps: Gaps, starts: np.ndarray, window: int) -> dict[str, Any]:
    """Autoregressions and Gaudin's law, fitted on the training part, on the same windows.

    ``baseline.<name>.*`` are of last positions; ``baseline.position_averaged.nll`` is linear
    prediction at every position, to be compared with ``nll.position_averaged``.
    """
    at, found = baselines.baseline_scores(gaps.source, gaps.split, window)
    picked = np.searchsorted(at, starts + window - 1)
    metrics: dict[str, Any] = {}
    for name, got in found.items():
        metrics[f"baseline.{name}.nll"] = float(got.nll[picked].mean())
        metrics[f"baseline.{name}.crps"] = float(got.crps[picked].mean())
        metrics[f"baseline.{name}.rmse"] = float(np.sqrt(got.squared_error[picked].mean()))
    everywhere = baselines.position_averaged(gaps.source, gaps.split, starts, window)
    metrics["baseline.position_averaged.nll"] = float(everywhere.mean())
    metrics["baseline.position_averaged.nll.ci95"] = mean_interval(everywhere)
    return metrics


def _rollouts(system: Any, params: PyTree) -> dict[str, Any]:
    """Continuations by every seed, where held-out gaps go on long enough."""
    c, gaps = system.config, system.gaps
    length = c.data.window - 1 + c.eval.horizon
    # Every gap of these windows is held out: so is the window that ends with the last of them.
    fits = np.isin(gaps.validation + length - c.data.window, gaps.validation)
    starts = gaps.validation[fits & _unbroken(gaps, gaps.validation, length)]
    if not len(starts):
        return {}
    starts = starts[np.linspace(0, len(starts) - 1, c.eval.rollouts).astype(int)]
    rows = gaps.windows(starts, length)
    seeds = [jax.tree.map(lambda x, i=i: x[i], params) for i in range(c.seeds)]
    return scores.over_seeds([rollout.statistics(system.model, c, one, rows) for one in seeds])


def _unbroken(gaps: Gaps, starts: np.ndarray, length: int) -> np.ndarray:
    run = gaps.source.run
    return starts // run == (starts + length - 1) // run
