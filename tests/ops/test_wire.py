"""Numbers in few bits: parity with a loop, packing as a bijection, exact byte counts."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_jax.ops import wire

INTEGERS = [form for form in wire.FORMATS if form.startswith("int")]


def numbers(shape=(3, 37), seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * np.exp(rng.standard_normal(shape) * 2)).astype(np.float32)


def by_hand(x, bits, group):
    """Codes and scales of one vector at a time, in float64."""
    top = 2 ** (bits - 1) - 1
    codes, scales = [], []
    for row in x:
        for start in range(0, len(row), group):
            part = row[start : start + group].astype(np.float64)
            exact = np.float32(np.abs(part).max() / top)
            scale = exact.astype(jnp.bfloat16)
            while float(scale) < exact:
                scale = np.nextafter(scale, np.array(np.inf, jnp.bfloat16))
            scales.append(float(scale))
            codes += [round(float(v / float(scale))) if scale else 0 for v in part]
    return np.array(codes).reshape(x.shape), np.array(scales).reshape(len(x), -1)


@pytest.mark.parametrize("form", INTEGERS)
@pytest.mark.parametrize("group", [8, 64])
def test_quantisation_is_the_formula(form, group):
    x = numbers()
    x[1, :8] = 0
    codes, scales = wire.quantise(x, wire.FORMATS[form], group)
    expected, steps = by_hand(x, wire.FORMATS[form], group)
    np.testing.assert_array_equal(np.asarray(scales, np.float64), steps)
    np.testing.assert_array_equal(codes, expected)
    back = np.asarray(wire.dequantise(codes, scales, group))
    step = np.repeat(steps, group, axis=1)[:, : x.shape[1]]
    assert np.all(np.abs(back - x) <= step / 2 * (1 + 1e-5))


@pytest.mark.parametrize("form", wire.FORMATS)
def test_bytes_hold_exactly_what_the_evaluation_sees(form):
    x = numbers((5, 37))
    scales, payload = wire.to_bytes(x, form, 16)
    assert (len(scales), len(payload)) == wire.sizes(5, 37, form, 16)
    back = wire.from_bytes(scales, payload, 5, 37, form, 16)
    np.testing.assert_array_equal(back, wire.round_trip(jnp.asarray(x), form, 16))
    with pytest.raises(ValueError, match="bytes are not"):
        wire.from_bytes(scales, payload + b"x", 5, 37, form, 16)


def test_float32_is_exact_and_fewer_bits_are_worse():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 64)), jnp.float32)
    np.testing.assert_array_equal(wire.round_trip(x, "fp32"), x)
    error = [float(jnp.abs(wire.round_trip(x, f) - x).mean()) for f in INTEGERS]
    assert error[0] < error[1] / 2 < error[2] / 4


@settings(max_examples=60)
@given(st.integers(2, 8).flatmap(
    lambda bits: st.tuples(
        st.just(bits), st.lists(st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1), max_size=40)
    )
))  # fmt: skip
def test_packing_loses_nothing(drawn):
    bits, codes = drawn
    data = wire.pack_codes(np.array(codes, np.int8), bits)
    assert len(data) == -(-len(codes) * bits // 8)
    assert wire.unpack_codes(data, len(codes), bits).tolist() == codes


def test_scales_are_rounded_up():
    x = jnp.asarray([1.0, 1.0 + 2**-20, 255.0, 0.0, 3e-39, 1.5e38], jnp.float32)
    up = np.asarray(wire._up(x))
    assert np.all(up >= np.asarray(x)) and up[0] == 1.0 and up[1] == 1.0 + 2**-7 and up[3] == 0
    np.testing.assert_array_equal(up, up.astype(jnp.bfloat16).astype(np.float32))
