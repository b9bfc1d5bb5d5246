"""Random streams do not depend on one another; masked means pool without bias."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latent_jax.core import rng
from latent_jax.core.types import Mean


def bits(key: jax.Array) -> tuple[int, ...]:
    return tuple(np.asarray(jax.random.key_data(key)).ravel().tolist())


def test_streams_differ_by_name_and_step_only() -> None:
    root = jax.random.key(7)
    keys = {
        (name, step): bits(rng.stream(root, name, step))
        for name in ("dropout", "noise", "mask")
        for step in (None, 0, 1, 2)
    }
    assert len(set(keys.values())) == len(keys)
    alone = rng.named(7, ["noise"], 1)
    among = rng.named(root, ["dropout", "noise", "x"], 1)
    assert bits(alone["noise"]) == bits(among["noise"]) == keys["noise", 1]
    assert list(among) == ["dropout", "noise", "x"]


def test_streams_are_the_same_traced_and_in_every_release() -> None:
    root = jax.random.key(0)
    traced = jax.jit(lambda s: jax.random.key_data(rng.stream(root, "dropout", s)))(3)
    assert tuple(np.asarray(traced).tolist()) == bits(rng.stream(root, "dropout", 3))
    # Golden: crc32(b"dropout") = 0x9289efc9 must never change, resumed runs depend on it.
    by_hand = jax.random.fold_in(jax.random.fold_in(root, 0x9289EFC9), 3)
    assert bits(rng.stream(root, "dropout", 3)) == bits(by_hand)


def test_mean_ignores_what_is_masked_even_nan() -> None:
    values, mask = jnp.array([1.0, jnp.nan, 3.0]), jnp.array([True, False, True])
    assert float(Mean.of(values, mask).value) == 2.0
    grad = jax.grad(lambda v: Mean.of(v, mask).value)(values)
    np.testing.assert_allclose(grad, [0.5, 0.0, 0.5])


def test_mean_is_a_pytree_and_empty_is_zero() -> None:
    mean = jax.jit(lambda v, m: Mean.of(v, m))(jnp.ones((2, 3)), jnp.zeros((2, 1), bool))
    assert isinstance(mean, Mean) and float(mean.value) == 0.0 and float(mean.count) == 0.0
    assert float(Mean.of(jnp.full((4,), 2, jnp.bfloat16)).value) == 2.0
    assert Mean.of(jnp.ones(3, jnp.bfloat16)).sum.dtype == jnp.float32


@given(st.lists(st.lists(st.floats(-100, 100, width=32), max_size=5), min_size=1, max_size=4))
def test_pooled_shards_equal_the_whole(shards: list[list[float]]) -> None:
    pooled = sum(Mean.of(jnp.asarray(s, jnp.float32)) for s in shards)
    whole = [x for shard in shards for x in shard]
    expected = float(np.mean(np.asarray(whole, np.float64))) if whole else 0.0
    assert float(pooled.value) == pytest.approx(expected, abs=1e-3)
    assert int(pooled.count) == len(whole)


def test_mean_over_a_mapped_axis() -> None:
    values, mask = jnp.arange(6.0).reshape(3, 2), jnp.array([[1, 1], [1, 0], [0, 0]], bool)
    out = jax.vmap(lambda v, m: Mean.of(v, m).psum("i"), axis_name="i")(values, mask)
    np.testing.assert_allclose(out.value, [1.0] * 3)
