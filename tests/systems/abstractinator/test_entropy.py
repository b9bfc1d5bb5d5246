"""Entropy segments: the two rules by hand, streams, the trainer's own phase, and calibration."""

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
from latent_jax.systems.abstractinator.tokenizer import PAD

TEXT = b"the cat sat on a mat and"
ENTROPY = {"layers": 1, "width": 8, "heads": 2, "ff": 16, "reach": 6}
PHASE = {"name": "entropy", "steps": 1, "data": "entropy", "train": ["entropy"]}


def lengths(bits, longest=6, budget=16, delta=None, threshold=None):
    there = jnp.arange(16)[None] < len(bits)
    bits = jnp.asarray([[*bits, *[9.0] * (16 - len(bits))]])
    surprise = segment.surprising(bits, delta, threshold)
    found = segment.segment(there, there, "entropy", longest, budget, surprise)
    return [n for n in found.length[0].tolist() if n], int(found.overflow[0])


def test_the_two_rules_by_hand():
    bits = [1.0, 4.0, 4.5, 1.0, 0.5, 2.0, 3.0, 3.5]
    # At the surprising byte: 4.0 is 3 above 1.0, and 2.0 is 1.5 above 0.5.
    assert lengths(bits, delta=1.2) == ([1, 4, 3], 0)
    assert lengths(bits, threshold=2.5) == ([1, 1, 4, 1, 1], 0)
    assert lengths(bits, delta=1.2, threshold=4.2) == ([1, 1, 3, 3], 0)
    # Not above is not enough, and the first byte needs no reason.
    assert lengths([0.0, 2.0, 4.0], delta=2.0, threshold=4.0) == ([3], 0)
    assert lengths(bits, longest=2, threshold=9.0) == ([2, 2, 2, 2], 0)
    assert lengths(bits, budget=3, threshold=2.5) == ([1, 1, 4], 2)


@given(st.lists(st.floats(0, 8), min_size=2, max_size=16), st.integers(1, 16), st.floats(-2, 6))
def test_any_entropies_partition_a_stream(bits, seen, limit):
    whole, over = lengths(bits, delta=limit, threshold=limit)
    assert over == 0 and sum(whole) == len(bits) and max(whole) <= 6
    part, _ = lengths(bits[:seen], delta=limit, threshold=limit)
    edges = set(np.cumsum([0, *whole[:-1]]).tolist())
    assert set(np.cumsum([0, *part[:-1]]).tolist()) == {e for e in edges if e < seen}


@pytest.fixture(scope="module")
def made(tiny):
    """System, its variables and entropies of the text, cut at their median."""
    tree = tiny(entropy=ENTROPY, segments={"rule": "entropy", "threshold": 1.0, "budget": 24})
    tree["train"]["phases"].insert(0, PHASE)
    tree["level"]["vq"] = {"init": "random"}
    system = runs.system_class("abstractinator")(runs.resolve(tree))
    variables = jax.jit(lambda key: system.init({"params": key}, {}))(jax.random.key(0))
    ids = jnp.asarray([list(TEXT)])
    bits = jax.jit(lambda i: system.model.apply(variables, i, i != PAD, method="entropies"))(ids)
    tree["segments"]["threshold"] = float(np.median(bits))
    return runs.system_class("abstractinator")(runs.resolve(tree)), variables, bits


def test_a_stream_is_cut_as_the_whole_text_is(made):
    system, variables, bits = made
    # Every prefix, and every prefix followed by other bytes than the text's.
    ids = np.full((2 * len(TEXT), len(TEXT)), PAD, np.int32)
    ids[len(TEXT) :] = ord("z")
    for n in range(len(TEXT)):
        ids[n, : n + 1] = ids[n + len(TEXT), : n + 1] = list(TEXT[: n + 1])
    ids = jnp.asarray(ids)
    found = jax.jit(lambda i: system.model.apply(variables, i, i != PAD, method="segment"))(ids)
    expected = np.flatnonzero(np.asarray(bits[0]) > np.median(bits))
    whole = sorted({0, *expected.tolist()})
    assert 4 < len(whole) < 20, "the text is cut in a way that tells"
    for n in range(2 * len(TEXT)):
        last = n % len(TEXT)
        starts = np.asarray(found.start[n])[np.asarray(found.rows[n])]
        # Those forced by `longest` (6) lie between.
        assert {s for s in whole if s <= last} <= set(starts.tolist())
        full = np.asarray(found.start[len(TEXT) - 1])[np.asarray(found.rows[len(TEXT) - 1])]
        assert [s for s in starts if s <= last] == [s for s in full if s <= last]


def test_boundaries_give_no_gradient_and_the_phase_trains_one_part(made):
    system, variables, _ = made
    ids = jnp.asarray([list(TEXT)])
    batch = {"ids": ids, "there": ids != PAD, "entropy": jnp.ones(1, bool)}

    @jax.jit
    @jax.grad
    def used(params):
        v = {**variables, "params": params}
        return system.model.apply(v, ids, ids != PAD, method="entropies").sum()

    @jax.jit
    @jax.grad
    def trained(params):
        v = {**variables, "params": params}
        terms, moved, _ = system.loss_terms(v, {}, batch, {}, True)
        assert set(terms) == {"entropy_model"} and not moved
        return terms["entropy_model"].value

    size = lambda g: max(float(jnp.abs(x).max()) for x in jax.tree.leaves(g))  # noqa: E731
    assert size(used(variables["params"])) == 0
    found = trained(variables["params"])
    assert {name for name in found if size(found[name]) > 1e-4} == {"entropy"}


@pytest.mark.parametrize("delta", [False, True])
def test_calibration_finds_the_length(made, delta):
    system, variables, _ = made
    found = system.calibrate_segments(variables, {}, 3.0, delta=delta, windows=40)
    name = "segments.delta" if delta else "segments.threshold"
    assert found["bytes_per_segment"] == pytest.approx(3.0, rel=0.02)
    assert found["set"] == f"--set segments.rule=entropy --set {name}={found[name]}"
    assert len(found["lengths"]) == 6 and 0 <= found["overflow_share"] < 1
    # As the run itself cuts, with that limit.
    c = system.config
    tree = {"delta": None, "threshold": None, name.split(".")[1]: found[name]}
    config = runs.resolve(c, {f"segments.{k}": v for k, v in tree.items()})
    other = runs.system_class("abstractinator")(config)
    train = other.windows("train")
    batch = train.batch(train.spread(40))
    cut = jax.jit(lambda *a: other.model.apply(variables, *a, method="segment"))(
        batch["ids"], batch["there"]
    )
    assert float(cut.length.sum() / cut.rows.sum()) == pytest.approx(found["bytes_per_segment"])
    with pytest.raises(ConfigError, match="limits give 1.00 to"):
        system.calibrate_segments(variables, {}, 7.0)


@pytest.mark.parametrize(
    "segments, entropy, phases, message",
    [
        ({"rule": "entropy"}, True, "e", "needs segments.threshold or segments.delta"),
        ({"threshold": 2.0}, True, "e", "needs segments.rule=entropy"),
        ({"rule": "entropy", "delta": 0.5}, False, "", "needs the section entropy"),
        ({}, True, "", "no phase of train.phases has data=entropy"),
        ({"rule": "entropy", "delta": 0.5}, True, "late", "before all levels"),
        ({}, False, "e", "needs the section entropy"),
    ],
)
def test_refused(tiny, segments, entropy, phases, message):
    tree = tiny(segments=segments, **({"entropy": ENTROPY} if entropy else {}))
    if phases:
        tree["train"]["phases"].insert(0 if phases == "e" else 2, PHASE)
    with pytest.raises(ConfigError, match=message):
        runs.resolve(tree)


def test_a_run_without_the_model_cannot_be_calibrated(tiny):
    system = runs.system_class("abstractinator")(runs.resolve(tiny()))
    with pytest.raises(ConfigError, match="no section entropy"):
        system.calibrate_segments({"params": {}}, {}, 3.0)
