"""Gaussian predictions of single gaps, and the scores of any prediction, in float64."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64
from scipy.special import ndtr

from latent_jax.ops.mdn import Mixture


class Prediction(NamedTuple):
    """A Gaussian for each target."""

    mean: Float64[np.ndarray, " n"]
    sigma: Float64[np.ndarray, " n"]

    def mixture(self) -> Mixture:
        """As a mixture of one component, for the evaluation that models share."""
        mean, sigma = (jnp.asarray(part)[:, None] for part in self)
        return Mixture(jnp.zeros_like(mean), mean, sigma)


class Scores(NamedTuple):
    """Per-target scores: NLL (nats), squared error, CRPS and probability integral transform."""

    nll: Float64[np.ndarray, " n"]
    squared_error: Float64[np.ndarray, " n"]
    crps: Float64[np.ndarray, " n"]
    pit: Float64[np.ndarray, " n"]


def score(prediction: Prediction, target: Float64[np.ndarray, " n"]) -> Scores:
    """Scores of Gaussian predictions in float64 (CRPS: Gneiting & Raftery 2007, eq. 21)."""
    mean, sigma = prediction
    z = (target - mean) / sigma
    density = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
    crps = sigma * (z * (2 * ndtr(z) - 1) + 2 * density - 1 / np.sqrt(np.pi))
    nll = z**2 / 2 + np.log(sigma * np.sqrt(2 * np.pi))
    return Scores(nll, (target - mean) ** 2, crps, ndtr(z))
