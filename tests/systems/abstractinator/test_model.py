"""The level and the row model as functions: what sees what, and where gradients go."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax.systems.abstractinator.generate import push, read, slide
from latent_jax.systems.abstractinator.measure import Measure
from latent_jax.systems.abstractinator.tokenizer import PAD


def hidden(model, rows, there):
    return model.top.hidden(rows, there)

@pytest.fixture(scope="module")
def compress(made):
    system, variables, _ = made
    return jax.jit(
        lambda ids: system.model.apply(variables, ids, ids != PAD, method="encode")
    )


def test_a_row_knows_nothing_of_later_bytes(made, compress):
    _, _, batch = made
    ids = batch["ids"]
    before = compress(ids)
    changed = compress(ids.at[:, 12:].set(ord("z")))
    # "the cat sat " is closed after byte 11.
    assert np.asarray(before.found.length[0, :3]).tolist() == [4, 4, 4]
    vectors = [np.asarray(out.quantised.quantized[0]) for out in (before, changed)]
    np.testing.assert_array_equal(vectors[0][:3], vectors[1][:3])
    assert np.abs(vectors[0][3:] - vectors[1][3:]).max() > 1e-3


def test_equal_segments_have_equal_rows(made, compress):
    text = b"a cat on a cat so my cat"
    out = compress(jnp.asarray([list(text), list(text[::-1])], jnp.int32))
    words = text.split()
    assert int(out.there[0].sum()) == len(words)
    digits, rows = np.asarray(out.digits[0]), np.asarray(out.rows[0])
    # "a " and "cat " twice each; the last "cat" has no space behind it.
    for first, second in ((0, 3), (1, 4)):
        assert words[first] == words[second]
        np.testing.assert_array_equal(digits[first], digits[second])
        np.testing.assert_array_equal(rows[first], rows[second])
    assert np.abs(rows[1] - rows[2]).max() > 1e-3


def test_padding_changes_nothing(made):
    system, variables, batch = made
    ids = jnp.pad(batch["ids"][:, :16], ((0, 1), (0, 8)), constant_values=PAD)

    @jax.jit
    def terms(ids, there):
        rngs = {"codes": jax.random.key(0)}
        found = system.loss_terms(variables, {}, {"ids": ids, "there": there}, rngs, False)[0]
        return found, system.model.apply(variables, ids, there, method="encode").digits

    there = ids != PAD
    plain, digits = terms(ids, there)
    other, same = terms(jnp.where(there, ids, ord("x")), there)
    np.testing.assert_array_equal(digits, same)
    assert (np.asarray(digits[2]) == -1).all(), "a window without a byte has no row"
    jax.tree.map(np.testing.assert_array_equal, plain, other)
    # Alone, without padding, the first two windows say the same.
    short, alone = terms(ids[:2, :16], there[:2, :16])
    np.testing.assert_array_equal(digits[:2], alone)
    for name, mean in plain.items():
        np.testing.assert_allclose(mean, short[name], rtol=1e-5, err_msg=name)


def test_padding_never_reaches_the_codebooks(made):
    system, variables, batch = made
    ids = jnp.pad(batch["ids"][:, :16], ((0, 0), (0, 8)), constant_values=PAD)
    there = ids != PAD
    step = jax.jit(
        lambda ids: system.model.apply(
            variables, ids, there, True, mutable=["codebook"], method="encode"
        )[1]["codebook"]
    )
    before, after = step(ids), step(jnp.where(there, ids, ord("x")))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    old = variables["codebook"]["quantiser"]["code"]
    assert float(jnp.abs(before["quantiser"]["code"] - old).max()) > 1e-3


def test_where_gradients_go(made):
    system, variables, batch = made
    held = variables["codebook"]["quantiser"]
    floats = {k: v for k, v in held.items() if v.dtype == jnp.float32}

    def losses_of(params, floats):
        codebook = {"quantiser": {**held, **floats}}
        terms, _, _ = system.loss_terms(
            {"params": params, "codebook": codebook}, {}, batch, {"codes": jax.random.key(0)}, True
        )
        return terms["reconstruct"].sum, terms["top"].sum

    @jax.jit
    def gradients(params, floats):
        _, pull = jax.vjp(losses_of, params, floats)
        return pull((1.0, 0.0)), pull((0.0, 1.0))

    def largest(tree):
        return max(float(jnp.abs(g).max()) for g in jax.tree.leaves(tree))

    (bytes_to, bytes_codes), (top_to, top_codes) = gradients(variables["params"], floats)
    # Exactly zero: codebooks move by their averages alone.
    assert largest(bytes_codes) == 0 and largest(top_codes) == 0
    assert largest(bytes_to["compressor"]) > 1e-6 and largest(bytes_to["expander"]) > 1e-6
    assert largest(bytes_to["top"]) == 0
    # The row model reads rows and changes none.
    assert largest(top_to["compressor"]) == 0 and largest(top_to["expander"]) == 0
    assert largest(top_to["top"]) > 1e-6


def test_what_is_appended_is_what_training_read(made, compress):
    system, variables, batch = made
    out = compress(batch["ids"])
    # Build the context as generation does, digit rows one after the other.
    size = system.config.budget
    blank = jnp.zeros((2, size, system.config.level.row_width))
    context = jax.jit(lambda rows, count: read(system.model, variables, rows, count))(
        blank, jnp.zeros(2, jnp.int32)
    )
    grow = jax.jit(lambda context, digits: push(system.model, variables, context, digits))
    trained = np.asarray(
        jax.jit(lambda rows, there: system.model.apply(variables, rows, there, method=hidden))(
            out.rows, out.there
        )
    )
    count = int(out.there.sum(1).min())
    assert count >= 4
    for i in range(count):
        # From the cache or not: sums may be taken in another order, and that is all that differs.
        np.testing.assert_allclose(context.state, trained[:, i], atol=1e-5)
        context = grow(context, out.digits[:, i])
    np.testing.assert_array_equal(context.rows[:, :count], out.rows[:, :count])
    while not bool(context.full.all()):
        context = grow(context, out.digits[:, 1])
    assert np.asarray(context.count).tolist() == [size] * 2
    # One text moves on, the other is not full and stays as it is, to the bit.
    mixed = context._replace(count=jnp.asarray([size, size - 1]))
    moved = jax.jit(lambda context: slide(system.model, variables, context))(mixed)
    assert np.asarray(moved.count).tolist() == [size // 2, size - 1]
    np.testing.assert_array_equal(moved.rows[0, : size // 2], context.rows[0, -(size // 2) :])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1], b[1]), moved, mixed)
    again = grow(moved, out.digits[:, 1])
    np.testing.assert_array_equal(again.rows[0, size // 2], out.rows[0, 1])


def test_stages_condition_later_stages_alone(made, compress):
    system, variables, batch = made
    out = compress(batch["ids"])
    predict = jax.jit(
        lambda digits: system.model.apply(
            variables, out.rows, out.there, digits, method="predict"
        )[0]
    )
    before = np.asarray(predict(out.digits))
    other = out.digits.at[..., 1].set((out.digits[..., 1] + 1) % 16)
    after = np.asarray(predict(other))
    np.testing.assert_array_equal(before[..., :2, :], after[..., :2, :])
    assert np.abs(before[..., 2, :] - after[..., 2, :]).max() > 1e-4


def test_the_row_model_is_causal(made, compress):
    system, variables, batch = made
    out = compress(batch["ids"])
    predict = jax.jit(
        lambda rows: system.model.apply(
            variables, rows, out.there, out.digits, method="predict"
        )[0]
    )
    before, after = predict(out.rows), predict(out.rows.at[:, 2].add(1.0))
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert np.abs(np.asarray(before - after)[:, 3]).max() > 1e-5


def test_the_expander_is_causal_and_looks_back_one_row(made, compress):
    system, variables, batch = made
    out = compress(batch["ids"])
    said = jnp.full((2, system.config.budget, 6), ord("a"))
    expand = jax.jit(
        lambda rows, said: system.model.apply(variables, rows, out.there, said, method="expand")
    )
    before = np.asarray(expand(out.rows, said))
    later = np.asarray(expand(out.rows, said.at[..., 3].set(ord("b"))))
    np.testing.assert_array_equal(before[:, :, :4], later[:, :, :4])
    assert np.abs(before - later)[:, :, 4:].max() > 1e-5
    row = np.asarray(expand(out.rows.at[:, 2].add(1.0), said))
    moved = np.abs(before - row).max((0, 2, 3)) > 1e-5
    assert moved.tolist() == [False, False, True, True, False, False, False, False]


def test_likelihoods_of_a_model_that_knows_nothing(made, compress):
    system, variables, batch = made
    params = dict(variables["params"])
    params["top"] = params["top"] | {"head": jnp.zeros_like(params["top"]["head"])}
    blank = {**variables, "params": params}
    sums = Measure(system.model).likelihoods(blank, batch["ids"], batch["there"])
    found = compress(batch["ids"]).found
    rows = int(found.rows.sum())
    # Uniform digits cost the logarithm of the codes, in nats, whatever the text.
    np.testing.assert_allclose(sums["digit_nats"], rows * np.log(16), rtol=1e-5)
    assert np.asarray(sums["known"]).tolist() == [rows] * 3
    assert int(sums["covered"]) == int(found.length.sum()) <= int(sums["bytes"]) == 48
    # An untrained expander is near uniform over 256 bytes and the end; ends come on top.
    assert 0.8 < float(sums["byte_nats"]) / (48 * np.log(257)) < 2


def test_a_list_as_long_as_there_are_rows(made, compress):
    system, _, batch = made
    out = compress(batch["ids"])
    sums = Measure(system.model)._listed(jnp.full(batch["ids"].shape, 2.5), out, "peer")
    # 2.5 nats a byte, 16 ** 3 rows: 8.3 nats are worth three bytes, and not four.
    length = np.asarray(out.found.length)
    short = (length > 0) & (length <= 3)
    assert 0 < short.sum() < (length > 0).sum()
    assert int(sums["listed/peer"]) == short.sum()
    assert int(sums["listed_bytes/peer"]) == length[short].sum()
