"""Residual VQ of white Gaussian noise: mean squared error against the rate-distortion bound.

Vectors of N(0, I) in ``d`` dimensions at ``R`` bits cannot be coded with less than
``2^(-2R/d)`` squared error per dimension (Cover and Thomas, theorem 10.3.2). Training data is
drawn anew at every step, evaluation data from another seed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latent_jax.nn.residual_vq import ResidualVQ
from latent_jax.nn.vq_config import Ramp, ResetConfig, VQConfig

DIM, CODES, STAGES = 16, 64, 4


def bound(stages: int, dim: int = DIM, codes: int = CODES) -> float:
    """The least squared error per dimension of a unit Gaussian at this rate."""
    return float(2 ** (-2 * stages * np.log2(codes) / dim))


def settings(joint: bool, decay: float, beam: int) -> VQConfig:
    """The table's quantisers: k-means, then the moving average alone."""
    return VQConfig(
        init="kmeans",
        decay=decay,
        beam=beam,
        target="joint" if joint else "stage",
        commitment=Ramp(0.0),
        reset=ResetConfig(fraction=0.0),
    )


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _train(
    module: ResidualVQ, variables: Any, key: jax.Array, steps: int, batch: int
) -> Any:
    def step(variables: Any, key: jax.Array) -> tuple[Any, None]:
        x = jax.random.normal(key, (batch, module.dim))
        return module.apply(variables, x, train=True, mutable=["codebook"])[1], None

    return jax.lax.scan(step, variables, jax.random.split(key, steps))[0]


def train(
    schedule: Sequence[tuple[VQConfig, int, int]], seed: int = 0, stages: int = STAGES
) -> Any:
    """Codebooks after each (settings, steps, vectors per step) in turn."""
    key, first = jax.random.split(jax.random.key(seed))
    variables = None
    for i, (config, steps, batch) in enumerate(schedule):
        module = ResidualVQ(DIM, CODES, stages, config)
        if variables is None:
            variables = module.init(first, jnp.zeros((1, DIM)))
        variables = _train(module, variables, jax.random.fold_in(key, i), steps, batch)
    return variables


@functools.partial(jax.jit, static_argnums=(0,))
def _figures(module: ResidualVQ, variables: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    metrics = module.apply(variables, x).metrics
    return metrics["error"].value, metrics["perplexity"]


def evaluate(
    variables: Any, beam: int, vectors: int = 2**16, seed: int = 10_000, stages: int = STAGES
) -> tuple[np.ndarray, np.ndarray]:
    """Squared error per dimension after each stage, and perplexities, on fresh vectors."""
    module = ResidualVQ(DIM, CODES, stages, VQConfig(eval_beam=beam))
    x = jax.random.normal(jax.random.key(seed), (vectors, DIM))
    figures = [_figures(module, variables, part) for part in jnp.split(x, max(1, vectors // 4096))]
    error, perplexity = zip(*figures, strict=True)
    return np.mean(error, 0), np.mean(perplexity, 0)
