"""Matrix products counted by hand."""

from __future__ import annotations

import doctest

import jax
import jax.numpy as jnp

from latent_jax.core import flops
from latent_jax.core.flops import matmul_flops


def test_examples_run():
    assert doctest.testmod(flops).failed == 0


def test_batches_branches_and_repetitions():
    x, y = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((5, 2, 3), (5, 3, 4)))
    assert matmul_flops(lambda x, y: jnp.einsum("bij,bjk->bik", x, y), x, y) == 2 * 5 * 2 * 3 * 4
    square = jax.ShapeDtypeStruct((3, 3), jnp.float32)

    def nested(x):
        # A rare branch of two products, a usual one of one; then five in a loop, behind a jit.
        y = jax.lax.cond(x.sum() > 9, lambda x: x @ x @ x, lambda x: x @ x, x)
        return jax.lax.scan(lambda c, _: (jax.jit(jnp.dot)(c, y), None), x, None, 5)[0]

    assert matmul_flops(nested, square) == 2 * 27 * (1 + 5)
    assert matmul_flops(lambda x: jnp.sin(x) * x, square) == 0
