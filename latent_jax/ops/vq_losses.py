"""Losses of vector quantisers: closed-form gradients, usage entropy, orthogonality."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from latent_jax.ops import rvq, vq


def attach(
    value: Float[Array, ""], x: Float[Array, "*s"], gradient: Float[Array, "*s"]
) -> Float[Array, ""]:
    """``value`` with ``gradient`` as its derivative in ``x`` (first order only)."""
    gradient = jax.lax.stop_gradient(gradient)
    moved = jnp.sum(gradient * (x.astype(jnp.float32) - jax.lax.stop_gradient(x)))
    return jax.lax.stop_gradient(value) + moved


def codebook(found: rvq.Pass, code: Float[Array, "s k d"]) -> Float[Array, ""]:
    """``sum |sg(r) - code|^2`` over rows and stages, differentiable in the codes only.

    Its gradient is ``2 (count * code - total)``, from statistics that exist already.
    """
    gradient = 2 * (found.count[..., None] * jax.lax.stop_gradient(code) - found.total)
    return attach(found.error.sum(), code, gradient)


def usage_entropy(
    x: Float[Array, "n d"],
    stages: rvq.Stages,
    indices: Int[Array, "n s"],
    temperature: float,
    cosine: bool = False,
) -> tuple[Float[Array, " s"], Float[Array, " s"]]:
    """Entropy of the mean soft assignment of each stage, in nats (a bonus: to be raised).

    ``H(mean_n softmax(-|r_n - e|^2 / temperature))``; differentiable in ``x`` and the codes, with
    the residual detached between stages. Rows with index -1 are left out.

    Returns:
      Entropies, and the rows that each of them saw.
    """
    fixed = jax.lax.stop_gradient

    @jax.checkpoint  # n * k weights per stage: made again in the backward pass, never stored
    def body(passed, stage):
        index, (code, bias, _) = stage
        on = (index >= 0)[:, None]
        residual = x - fixed(passed)
        seen = vq.unit(residual) if cosine else residual
        weight = jax.nn.softmax(-2 * vq.scores(seen, code, bias) / temperature, -1)
        rows = on.sum()
        mean = jnp.sum(jnp.where(on, weight, 0.0), 0) / jnp.maximum(rows, 1)
        entropy = -jnp.sum(mean * jnp.log(jnp.maximum(mean, 1e-20)))
        used = jnp.where(on, fixed(code)[jnp.maximum(index, 0)], 0.0)
        return passed + used, (entropy, rows.astype(jnp.float32))

    return jax.lax.scan(body, jnp.zeros_like(x), (indices.T, stages))[1]


def orthogonality(
    code: Float[Array, "s k d"], live: Bool[Array, "s k"]
) -> Float[Array, " s"]:
    """Mean squared cosine between two codes of a stage, less that of orthogonal ones.

    Shin et al. 2021 (arXiv:2112.00384), eq. 2: ``|E E^T|^2 / k^2 - 1 / k``.
    """
    unit = jnp.where(live[..., None], vq.unit(jnp.where(live[..., None], code, 1.0)), 0.0)
    cosine = jnp.einsum("skd,sjd->skj", unit, unit, precision=vq.EXACT)
    k = live.sum(-1)
    return jnp.sum(cosine**2, (-1, -2)) / k**2 - 1 / k
