"""Which columns of a linear map can be left out, and what the others do in their stead.

Attention is linear in its values: of keys that are kept, weights and values can be found that give
nearly what all keys gave, by least squares over the queries that were asked ("attention matching",
Zweiger et al. 2026, arXiv:2602.16284). The order of leaving out is backward elimination with the
exact rise of the squared error, as optimal brain surgeon removes weights (Hassibi & Stork 1993).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_LARGE = 64  # columns that are swept
_product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def ridged(gram: Float[Array, "*n s s"], share: float) -> Float[Array, "*n s s"]:
    """A Gram matrix with ``share`` of its mean diagonal added to the diagonal."""
    s = gram.shape[-1]
    size = share * jnp.trace(gram, axis1=-2, axis2=-1) / s
    return gram + (size[..., None, None] + 1e-12) * jnp.eye(s, dtype=gram.dtype)


def inverse(matrix: Float[Array, "*n s s"]) -> Float[Array, "*n s s"]:
    """Of many symmetric positive definite matrices: by sweeps without pivoting, large ones by
    halves (the inverse of a quarter, and that of its Schur complement).

    Not by library routines: on a CPU, several of their batched solves at once wait for one another
    in the threads that should do them, and with two cores for ever (jaxlib 0.10).
    """
    size = matrix.shape[-1]
    if size > _LARGE:
        half = size // 2
        cross, dot = matrix[..., :half, half:], _product
        first = inverse(matrix[..., :half, :half])
        carried = dot(first, cross)
        rest = inverse(matrix[..., half:, half:] - dot(jnp.swapaxes(cross, -1, -2), carried))
        corner = -dot(carried, rest)
        upper = first - dot(corner, jnp.swapaxes(carried, -1, -2))
        return jnp.concatenate(
            [
                jnp.concatenate([upper, corner], axis=-1),
                jnp.concatenate([jnp.swapaxes(corner, -1, -2), rest], axis=-1),
            ],
            axis=-2,
        )

    def sweep(number, m):
        one = jnp.arange(m.shape[-1]) == number
        row = jax.lax.dynamic_index_in_dim(m, number, axis=-2)
        pivot = jax.lax.dynamic_index_in_dim(row, number, axis=-1)
        down, along = jnp.swapaxes(row, -1, -2), row / pivot
        new = m - down * along
        new = jnp.where(one, jnp.swapaxes(along, -1, -2), new)
        new = jnp.where(one[:, None], along, new)
        return jnp.where(one & one[:, None], -1 / pivot, new)

    return -jax.lax.fori_loop(0, matrix.shape[-1], sweep, matrix)


def removal_order(
    gram: Float[Array, "*n s s"], wanted: Float[Array, "*n s s"]
) -> tuple[Int[Array, "*n s"], Float[Array, "*n s"]]:
    """Leaves out one column after the other, each time the one whose loss costs least.

    With ``P`` of ``s`` columns and ``Y`` of as many rows, the product ``P Y`` is kept as nearly as
    the columns that are left can, their rows of ``Y`` being fitted anew.

    Args:
      gram: ``P^T P``, positive definite.
      wanted: ``Y Y^T``.

    Returns:
      The rank of every column, 0 for the one that is left out last, and by rank the squared error
      that leaving it out adds.
    """
    s = gram.shape[-1]
    alive = jnp.ones(gram.shape[:-1], bool)

    def step(state, number):
        back, wanted, alive, rank = state
        own = jnp.maximum(jnp.diagonal(back, axis1=-2, axis2=-1), 1e-20)
        cost = jnp.where(alive, jnp.diagonal(wanted, axis1=-2, axis2=-1) / own, jnp.inf)
        at = jnp.argmin(cost, axis=-1, keepdims=True)
        one = jax.nn.one_hot(at[..., 0], s, dtype=gram.dtype)
        paid = jnp.take_along_axis(cost, at, axis=-1)[..., 0]
        # Rows are looked up: products with them are slow where there are many small matrices.
        column = jnp.take_along_axis(back, at[..., None], axis=-2)[..., 0, :]
        pivot = jnp.take_along_axis(own, at, axis=-1)
        spread = column / pivot
        # What the column gave is given by the others: Y <- Y - spread y_at, here as Y Y^T.
        theirs = jnp.take_along_axis(wanted, at[..., None], axis=-2)[..., 0, :]
        size = jnp.take_along_axis(theirs, at, axis=-1)[..., None]
        left = (1 - one)[..., :, None] * (1 - one)[..., None, :]
        cross = spread[..., :, None] * theirs[..., None, :]
        both = spread[..., :, None] * spread[..., None, :]
        wanted = (wanted - cross - jnp.swapaxes(cross, -1, -2) + size * both) * left
        back = (back - column[..., :, None] * spread[..., None, :]) * left
        rank = jnp.where(one > 0, s - 1 - number, rank)
        return (back, wanted, alive & (one == 0), rank), paid

    start = (inverse(gram), wanted, alive, jnp.zeros(alive.shape, jnp.int32))
    (_, _, _, rank), paid = jax.lax.scan(step, start, jnp.arange(s))
    return rank, jnp.moveaxis(paid, 0, -1)[..., ::-1]


def refitted(
    gram: Float[Array, "*n s s"], rows: Float[Array, "*n s e"], kept: Bool[Array, "*n s"]
) -> Float[Array, "*n s e"]:
    """Rows of the kept columns that make up for the others; zeros for those.

    Args:
      gram: of the columns, with a ridge: what the fit pays for a change of a row.
      rows: ``Y``, what each column carries.
      kept: which ones stay.
    """
    on = kept.astype(gram.dtype)
    among = gram * on[..., :, None] * on[..., None, :]
    among = among + (1 - on)[..., None] * jnp.eye(gram.shape[-1], dtype=gram.dtype)
    lost = (gram * on[..., :, None] * (1 - on)[..., None, :]) @ rows
    return (rows + inverse(among) @ lost) * on[..., None]
