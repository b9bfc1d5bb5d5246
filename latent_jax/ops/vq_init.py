"""First codes of a codebook from data: distinct rows, and Lloyd's k-means from them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from latent_jax.ops import vq


def pick_rows(
    key: jax.Array, keep: Bool[Array, " n"], count: int
) -> tuple[Int[Array, " c"], Bool[Array, " c"]]:
    """Distinct kept rows, uniformly and without replacement.

    Returns:
      Row numbers, and which of them are kept rows: with fewer than ``count`` of those, the
      remaining entries repeat them and are marked False.
    """
    n = keep.shape[0]
    take = min(count, n)
    luck = jnp.where(keep, jax.random.uniform(key, (n,)), -1.0)
    value, row = jax.lax.top_k(luck, take)
    found = jnp.maximum((value >= 0).sum(), 1)
    slot = jnp.arange(count)
    return row[slot % found].astype(jnp.int32), slot < (value >= 0).sum()


def kmeans(
    x: Float[Array, "n d"],
    start: Float[Array, "k d"],
    keep: Bool[Array, " n"],
    live: Bool[Array, " k"],
    steps: int,
    chunk: int | None = None,
    cosine: bool = False,
) -> Float[Array, "k d"]:
    """Lloyd's algorithm; a cluster that loses all its rows keeps its place.

    Args:
      x: rows.
      start: first means.
      keep: rows that count.
      live: means that are codes.
      steps: iterations.
      chunk: see `vq.nearest`.
      cosine: means and rows are scaled to unit length.
    """
    x = vq.unit(x) if cosine else x
    start = vq.unit(start) if cosine else start

    def step(_, code):
        bias = vq.bias_of(jnp.sum(code**2, -1), live, cosine)
        index = jnp.where(keep, vq.nearest(x, code, bias, chunk), -1)
        count, total = vq.statistics(x, index, code.shape[0])
        mean = total / jnp.maximum(count, 1.0)[:, None]
        mean = vq.unit(mean) if cosine else mean
        return jnp.where((count > 0)[:, None], mean, code)

    return jax.lax.fori_loop(0, steps, step, start)


def first_codes(
    key: jax.Array,
    x: Float[Array, "n d"],
    keep: Bool[Array, " n"],
    live: Bool[Array, " k"],
    steps: int,
    chunk: int | None = None,
    cosine: bool = False,
) -> Float[Array, "k d"]:
    """Codes from data: sampled rows (``steps = 0``) or the k-means that starts at them.

    With fewer rows than codes the surplus codes are copies moved by a thousandth of the rows'
    spread, so that they can part later.
    """
    k = live.shape[0]
    row, own = pick_rows(key, keep, k)
    start = x[row]
    weight = keep[:, None] / jnp.maximum(keep.sum(), 1)
    mean = jnp.sum(x * weight, 0)
    spread = jnp.sqrt(jnp.sum((x - mean) ** 2 * weight, 0))
    noise = jax.random.normal(jax.random.fold_in(key, 1), start.shape) * spread * 1e-3
    start = jnp.where(own[:, None], start, start + noise)
    start = vq.unit(start) if cosine else start
    return kmeans(x, start, keep, live, steps, chunk, cosine) if steps else start
