"""Operations are counted where they happen, as often as they happen."""

from __future__ import annotations

import doctest

import jax
import jax.numpy as jnp
import pytest

from latent_jax.core import flops
from latent_jax.core.flops import matmul_flops

A = jax.ShapeDtypeStruct((4, 4), jnp.float32)
ONE = 2 * 4**3


def times(n):
    return lambda a: (jax.lax.scan(lambda c, _: (c @ a, None), a, None, length=n)[0], None)


@pytest.mark.parametrize(
    ("fn", "count"),
    [
        (times(7), 7),
        (lambda a: (jax.vmap(lambda row: row @ a)(a), None), 1),
        (lambda a: (jax.lax.cond(a[0, 0] > 0, lambda: a @ a, lambda: a @ a @ a), None), 2),
        (lambda a: (jax.jit(lambda x: x @ a)(a) + 0 * jnp.sum(a), a @ a), 1),
        (lambda a: (jax.checkpoint(lambda x: jnp.tanh(x @ a))(a), None), 1),
        (lambda a: (jax.grad(lambda x: jnp.tanh(x @ jnp.ones((4, 4))).sum())(a), None), 2),
        (lambda a: (a + 1, None), 0),
    ],
)
def test_products_are_counted(fn, count):
    assert matmul_flops(fn, A)[0] == count * ONE


def test_the_rest_is_given_back_and_not_counted():
    flops, rest = matmul_flops(lambda a: (a @ a, {"x": a @ a @ a}), A)
    assert flops == ONE and rest["x"].shape == (4, 4)


def test_a_rare_branch_may_be_left_out():
    def rare(a):
        return jax.lax.cond(a[0, 0] > 9, lambda: a @ a @ a, lambda: a @ a), None

    assert matmul_flops(rare, A)[0] == 2 * ONE
    assert matmul_flops(rare, A, branch=min)[0] == ONE


def test_batches_and_examples():
    x, y = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((5, 2, 3), (5, 3, 4)))
    found = matmul_flops(lambda x, y: (jnp.einsum("bij,bjk->bik", x, y), None), x, y)[0]
    assert found == 2 * 5 * 2 * 3 * 4
    assert doctest.testmod(flops).failed == 0
