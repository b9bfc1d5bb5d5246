"""Gradient norm of each loss term, by parameter group: which term moves what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from latent_jax.core import rng as rng_lib
from latent_jax.core.types import PyTree
from latent_jax.train.curriculum import make_schedule
from latent_jax.train.optimizers import FROZEN
from latent_jax.train.protocol import System
from latent_jax.train.step import DEFAULT_RNGS, rates_at


def term_gradients(
    system: System,
    variables: Mapping[str, Any],
    frozen: PyTree,
    batch: Mapping[str, Any],
    *,
    step: int = 0,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Measures the gradient of every weighted term on one batch.

    One backward pass per term, so this belongs in a diagnosis and not in the training loop.

    Args:
      system: the system.
      variables: ``{"params": …, **collections}``.
      frozen: the frozen argument.
      batch: a training batch.
      step: where the schedules of weights and rates are read.
      seed: of the random streams.

    Returns:
      ``{term: {"value", "weight", "cosine", "grad_norm", "grad_norm.<label>"…}}``. Norms are of
      the *weighted* term, ``cosine`` is to the gradient of the whole loss (below 0: the term is
      overruled). Adaptive factors (gates, auto-scale) are not applied.
    """
    names = [n for n, w in system.weights.items() if w is not None]
    weights = {n: float(make_schedule(system.weights[n])(jnp.asarray(step))) for n in names}
    labels = system.param_labels(variables["params"])
    others = {k: v for k, v in variables.items() if k != "params"}
    rngs = rng_lib.named(seed, tuple(getattr(system, "rng_names", DEFAULT_RNGS)), step)
    now = rates_at(system, step)

    @jax.jit
    def gradients(params: PyTree, frozen: PyTree, batch: Any) -> dict[str, Any]:
        def values(params: PyTree) -> dict[str, jax.Array]:
            whole = {"params": params, **others}
            terms, _, _ = system.loss_terms(whole, frozen, batch, rngs, True, **now)
            return {n: weights[n] * terms[n].value for n in names if n in terms}

        out, pullback = jax.vjp(values, params)
        zeros = {n: jnp.zeros_like(v) for n, v in out.items()}
        grads = {n: pullback({**zeros, n: jnp.ones_like(out[n])})[0] for n in out}
        grads = {n: jax.tree.map(lambda lab, g: None if lab == FROZEN else g, labels, g)
                 for n, g in grads.items()}
        whole = jax.tree.map(lambda *g: sum(g), *grads.values())
        rows = {}
        for name, grad in grads.items():
            row = {"value": out[name], "grad_norm": optax.global_norm(grad)}
            for label in sorted(set(jax.tree.leaves(labels)) - {FROZEN}):
                part = jax.tree.map(lambda lab, g, x=label: g if lab == x else None, labels, grad)
                row[f"grad_norm.{label}"] = optax.global_norm(part)
            dot = sum(jnp.vdot(a, b) for a, b in zip(
                jax.tree.leaves(grad), jax.tree.leaves(whole), strict=True))
            length = row["grad_norm"] * optax.global_norm(whole)
            rows[name] = {**row, "cosine": dot / jnp.maximum(length, 1e-20)}
        return rows

    found = jax.device_get(gradients(variables["params"], frozen, dict(batch)))
    result = {}
    for name, row in found.items():
        row = {k: float(v) for k, v in row.items()}
        row["weight"] = weights[name]
        row["value"] = row["value"] / weights[name] if weights[name] else 0.0
        result[name] = row
    return result
