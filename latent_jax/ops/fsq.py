"""Quantisers without a codebook: finite scalars (FSQ) and signs (LFQ), with residual stages."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from latent_jax.ops.vq import straight_through


def _basis(levels: Sequence[int]) -> np.ndarray:
    return np.cumprod([1, *levels[:-1]]).astype(np.int32)


def fsq_bound(
    x: Float[Array, "*b d"], levels: Sequence[int], margin: float = 1e-3
) -> Float[Array, "*b d"]:
    """Squashes each dimension to the range whose rounding has ``levels`` values.

    Mentzer et al. 2023 (arXiv:2309.15505), listing 1: a shifted tanh; even levels are centred
    half a step off zero.
    """
    size = np.asarray(levels, np.float32)
    half = (size - 1) * (1 + margin) / 2
    offset = np.where(size % 2 == 0, 0.5, 0.0).astype(np.float32)
    shift = np.arctanh(offset / half)
    return jnp.tanh(x + shift) * half - offset


def fsq(
    x: Float[Array, "*b d"], levels: Sequence[int], stages: int = 1
) -> tuple[Float[Array, "*b d"], Int[Array, "*b s"]]:
    """Finite scalar quantisation; a straight-through gradient at the rounding.

    Args:
      x: any real numbers, one dimension per entry of ``levels``.
      levels: values per dimension, at least 3: the shift for even levels puts the border between
        two values at -3.8.
      stages: every stage after the first splits the cell of the one before evenly into
        ``levels`` parts per dimension.

    Returns:
      Values in about [-1, 1], and one index per stage, dimension 0 least significant.
    """
    size = jnp.asarray(levels, jnp.float32)
    half = jnp.asarray([n // 2 for n in levels], jnp.float32)
    bounded = fsq_bound(x.astype(jnp.float32), levels)
    whole = jnp.round(bounded)
    basis = jnp.asarray(_basis(levels))
    indices = [jnp.sum((whole + half).astype(jnp.int32) * basis, -1)]
    value, width = whole, 1.0
    for _ in range(stages - 1):  # a few elementwise products each: nothing to scan
        inside = (bounded - value) / width + 0.5  # in [0, 1)
        part = jnp.clip(jnp.floor(inside * size), 0, size - 1)
        value = value + ((part + 0.5) / size - 0.5) * width
        width = width / size
        indices.append(jnp.sum(part.astype(jnp.int32) * basis, -1))
    return straight_through(bounded / half, value / half), jnp.stack(indices, -1)


def fsq_decode(
    indices: Int[Array, "*b s"], levels: Sequence[int]
) -> Float[Array, "*b d"]:
    """The values of `fsq`'s indices; a row whose first index is -1 is zero."""
    size = jnp.asarray(levels, jnp.float32)
    half = jnp.asarray([n // 2 for n in levels], jnp.float32)
    basis, counts = jnp.asarray(_basis(levels)), jnp.asarray(levels, jnp.int32)
    part = (indices[..., None] // basis % counts).astype(jnp.float32)
    value, width = part[..., 0, :] - half, 1.0
    for stage in range(1, indices.shape[-1]):
        value = value + ((part[..., stage, :] + 0.5) / size - 0.5) * width
        width = width / size
    return jnp.where(indices[..., :1] >= 0, value / half, 0.0)


def lfq(
    x: Float[Array, "*b d"], stages: int = 1
) -> tuple[Float[Array, "*b d"], Int[Array, "*b s"]]:
    """Lookup-free quantisation (Yu et al. 2023, arXiv:2310.05737): signs, halved per stage.

    Returns:
      Sum over stages of ``2^-s sign(residual)`` with the identity as its Jacobian, and one index
      per stage: bit ``i`` is set where dimension ``i`` is positive.
    """
    x = x.astype(jnp.float32)
    weights = jnp.asarray(2 ** np.arange(x.shape[-1]), jnp.int32)

    def body(residual, stage):
        up = residual > 0
        step = jnp.where(up, 1.0, -1.0) * 0.5**stage
        return residual - step, (step, jnp.sum(up * weights, -1))

    _, (step, indices) = jax.lax.scan(body, jax.lax.stop_gradient(x), jnp.arange(stages))
    return straight_through(x, step.sum(0)), jnp.moveaxis(indices, 0, -1)


def lfq_decode(indices: Int[Array, "*b s"], dim: int) -> Float[Array, "*b d"]:
    """The values of `lfq`'s indices; a row whose first index is -1 is zero."""
    bits = indices[..., None] >> jnp.arange(dim) & 1
    scale = 0.5 ** jnp.arange(indices.shape[-1], dtype=jnp.float32)
    value = jnp.einsum("...sd,s->...d", 2.0 * bits - 1.0, scale)
    return jnp.where(indices[..., :1] >= 0, value, 0.0)


def lfq_entropy(
    x: Float[Array, "n d"], keep: Bool[Array, " n"], temperature: float = 1.0
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Entropies (nats) of soft bits ``sigmoid(4 x / temperature)``: mean per row, and of the mean.

    Bits are independent given a row, so the first is exact; the second adds the entropies of the
    mean bits, an upper bound of the entropy of the mean code that needs no ``2^d`` table.
    """

    def binary(p):
        p = jnp.clip(p, 1e-7, 1 - 1e-7)
        return -(p * jnp.log(p) + (1 - p) * jnp.log1p(-p))

    on = jax.nn.sigmoid(4 * x / temperature)
    rows = jnp.maximum(keep.sum(), 1)
    each = jnp.where(keep[:, None], binary(on), 0.0).sum() / rows
    mean = jnp.where(keep[:, None], on, 0.0).sum(0) / rows
    return each, binary(mean).sum()
