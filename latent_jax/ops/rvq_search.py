"""Beam search over the stages of a residual quantiser."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from latent_jax.ops import rvq, vq


def beam(
    x: Float[Array, "n d"],
    stages: rvq.Stages,
    keep: Bool[Array, " n"],
    width: int,
    *,
    depth: Int[Array, " n"] | None = None,
    chunk: int | None = None,
) -> Int[Array, "n s"]:
    """Indices whose sum of codes is nearest to ``x`` among ``width`` prefixes kept per stage.

    A prefix is scored by the squared length of what it leaves, not by the sum of all stages'
    errors: only the former is what the decoder pays for. Width 1 is the greedy search.

    Returns:
      Indices; -1 where a stage does not quantise a row (see `rvq.active`).
    """
    x = jnp.where(keep[:, None], jax.lax.stop_gradient(x.astype(jnp.float32)), 0.0)
    stages = jax.lax.stop_gradient(stages)
    (n, d), (depths, k) = x.shape, stages.code.shape[:2]
    width = min(width, k)
    take = lambda a, i: jnp.take_along_axis(a, i.reshape(*i.shape, *(1,) * (a.ndim - 2)), 1)  # noqa: E731

    def body(carry, each):
        residual, path = carry
        stage, (code, bias, ready) = each
        on = rvq.active(keep, ready, depth, stage)
        flat = residual.reshape(n * width, d)
        low, index = vq.nearest_many(flat, code, bias, width, chunk)
        # |r - e|^2 = |r|^2 + 2 (bias - r.e); at the first stage all prefixes are the same one.
        cost = jnp.sum(residual**2, -1)[..., None] + 2 * low.reshape(n, width, width)
        first = (stage == 0) & (jnp.arange(width) > 0)
        cost = jnp.where(first[None, :, None], jnp.inf, cost).reshape(n, width * width)
        chosen = jax.lax.top_k(-cost, width)[1]
        parent = jnp.where(on[:, None], chosen // width, jnp.arange(width))
        index = jnp.take_along_axis(index.reshape(n, width * width), chosen, 1)
        index = jnp.where(on[:, None], index, -1).astype(jnp.int32)
        used = jnp.where(on[:, None, None], code[jnp.maximum(index, 0)], 0.0)
        path = take(path, parent)
        path = jnp.where(jnp.arange(depths) == stage, index[..., None], path)
        return (take(residual, parent) - used, path), None

    residual = jnp.broadcast_to(x[:, None], (n, width, d))
    path = jnp.full((n, width, depths), -1, jnp.int32)
    each = (jnp.arange(depths), stages)
    (residual, path), _ = jax.lax.scan(body, (residual, path), each)
    best = jnp.argmin(jnp.sum(residual**2, -1), -1)
    return take(path, best[:, None])[:, 0]
