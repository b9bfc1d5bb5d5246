"""Rows of which each stage has a share, quantised only little by little, over equal information."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latent_jax import run as runs
from latent_jax.core.errors import ConfigError
from latent_jax.systems.abstractinator import segment
from latent_jax.systems.abstractinator.layers import shares

LONGEST, WINDOW = 6, 24
surprises = st.lists(st.floats(0, 12, width=32), min_size=1, max_size=WINDOW)


@jax.jit
def cut(bits, budget):
    first = segment.informative(bits, budget, LONGEST)
    # The longest is already kept: nothing is left to the general limit.
    again = segment.starts(jnp.zeros(bits.shape, jnp.int32), "information", LONGEST, first)
    return first[0], again[0]


@given(bits=surprises, budget=st.floats(0.5, 20), seen=st.integers(1, WINDOW))
def test_segments_hold_no_more_information_than_they_may(bits, budget, seen):
    values = np.zeros((1, WINDOW), np.float32)
    values[0, : len(bits)] = bits
    first, again = (np.asarray(part) for part in cut(values, budget))
    np.testing.assert_array_equal(first, again)
    pieces = np.split(values[0], np.flatnonzero(first)[1:])
    assert first[0] and max(len(piece) for piece in pieces) <= LONGEST
    assert all(len(piece) == 1 or piece.sum() <= budget + 1e-3 for piece in pieces)
    # And each holds as much as it may: the next byte would not have gone in.
    for piece, after in zip(pieces, pieces[1:], strict=False):
        assert len(piece) == LONGEST or piece.sum() + after[0] > budget - 1e-3
    values[0, seen:] = 12.0
    np.testing.assert_array_equal(np.asarray(cut(values, budget)[0])[:seen], first[:seen])


def test_information_of_an_untrained_model_is_eight_bits_a_byte(tiny):
    tree = tiny(
        segments={"rule": "information", "bits": 17.0, "longest": 4, "budget": 24},
        entropy={"layers": 0, "width": 16, "heads": 2},
    )
    phases = tree["train"]["phases"]
    phases.insert(0, {"name": "cut", "steps": 5, "data": "entropy", "train": ["entropy"]})
    system = runs.system_class("abstractinator")(runs.resolve(tree))
    ids = jnp.asarray([list(b"the cat sat on a mat and")], jnp.int32)
    batch = {"ids": ids, "there": jnp.ones(ids.shape, bool)}
    variables = jax.jit(lambda key: system.init({"params": key}, batch))(jax.random.key(0))
    variables["params"]["entropy"]["head"] = jax.tree.map(
        jnp.zeros_like, variables["params"]["entropy"]["head"]
    )
    found = system.model.apply(variables, ids, batch["there"], method="segment")
    assert found.length[0].tolist() == [2] * 12 + [0] * 12


@pytest.fixture(scope="module")
def tapered(tiny):
    """System and variables with three places per segment, a stage for each."""
    level = {
        "queries": 3, "row_width": 48, "stages": 3, "taper": 4.0, "compressor_layers": 0,
        "vq": {"init": "random", "bypass": {"start": 1.0, "begin": 2}},
    }
    tree = tiny(segments={"rule": "fixed:3", "longest": None, "budget": None}, level=level)
    system = runs.system_class("abstractinator")(runs.resolve(tree))
    ids = jnp.asarray([list(b"catbatcotcan")], jnp.int32)
    batch = {"ids": ids, "there": jnp.ones(ids.shape, bool)}
    variables = jax.jit(lambda key: system.init({"params": key}, batch))(jax.random.key(0))
    return system, variables, batch


def test_the_shares():
    np.testing.assert_allclose(shares(6, 3, 2.0), [1, 1, 0.5, 0.5, 0.25, 0.25])
    np.testing.assert_array_equal(shares(5, 3, 1.0), np.ones(5))


def test_a_stages_share_starts_with_places_of_its_own(tapered):
    system, variables, batch = tapered

    def vectors(module, ids, there):
        return module.compressor(ids, there, module.segment(ids, there))

    rows = system.model.apply(variables, batch["ids"], batch["there"], method=vectors)[0]
    cat, bat, cot, can = np.asarray(rows)[:4]
    # Each share has the length that its stage is due.
    lengths = np.linalg.norm(cat.reshape(3, -1), axis=-1)
    np.testing.assert_allclose(lengths, 4.0 * np.asarray([1, 1 / 4, 1 / 16]), rtol=1e-3)

    def apart(other):  # of the distance, what lies in each share
        return np.linalg.norm((cat - other).reshape(3, -1) * [[1], [4], [16]], axis=-1)

    for other, place in ((bat, 0), (cot, 1), (can, 2)):
        assert np.argmax(apart(other)) == place
    assert np.linalg.norm(cat - can) < np.linalg.norm(cat - cot) < np.linalg.norm(cat - bat)


def test_the_way_round_the_codes_closes(tapered):
    system, variables, batch = tapered

    @jax.jit
    def read(variables):
        out, state = system.model.apply(
            variables, batch["ids"], batch["there"], True, method="encode",
            mutable=["codebook"], rngs={"codes": jax.random.key(0)},
        )  # fmt: skip
        said = system.model.apply(variables, out.digits, method="append")
        return out.rows, said, state

    errors = []
    for _ in range(6):
        rows, said, state = read(variables)
        variables = {**variables, **state}
        errors.append(float(jnp.abs(rows - said).max()))
    # As they are at first; later the codes alone, as they were before this batch moved them (each
    # stage's are made in a step of its own, which the collection before that step does not know).
    assert errors[0] > 1e-2 and max(errors[3:]) < 1e-6, errors


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"segments": {"rule": "information"}}, "need each other"),
        ({"segments": {"bits": 4.0}}, "need each other"),
        ({"segments": {"rule": "information", "bits": 9.0}}, "needs the section entropy"),
        ({"level": {"taper": 2.0, "queries": 4}}, "must divide level.queries=4"),
        ({"level": {"taper": 2.0, "queries": 3, "row_width": 16}}, "level.row_width=16"),
        ({"level": {"vq": {"bypass": {"value": 0.1}}}}, "does not end at 0"),
    ],
)
def test_refused(tiny, sections, message):
    with pytest.raises(ConfigError, match=message):
        runs.resolve(tiny(**sections))
