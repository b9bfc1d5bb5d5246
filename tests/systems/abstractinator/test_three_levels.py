"""Three levels: what the parts of the code know, which level moves, and whose rows are read."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax import run as runs
from latent_jax.systems.abstractinator import evaluate, segment
from latent_jax.systems.abstractinator.measure import Measure
from latent_jax.systems.abstractinator.tokenizer import EOP, PAD

TEXTS = [b"the cat sat on a mat and", b"all the dogs ran to some"]
ABOVE = {
    "children": 2, "width": 8, "heads": 2, "ff": 16, "queries": 2, "row_width": 12,
    "compressor_layers": 1, "expander_layers": 1, "lookback": 1, "codes": 5, "stages": 2,
    "vq": {"init": "random"},
}  # fmt: skip


@pytest.fixture(scope="module")
def three(tiny):
    """System, variables with codes at every stage, a batch of two windows, its rows."""
    tree = tiny(
        above=[ABOVE, {**ABOVE, "row_width": 8, "codes": 6, "stages": 3}],
        segments={"rule": "fixed:6"},
    )
    tree["level"] |= {"vq": {"init": "random"}, "stages": 2}
    del tree["byte_lm"]
    labels = [[f"{kind}{i or ''}" for kind in ("compressor", "expander")] for i in range(3)]
    tree["train"]["phases"] = [
        {"name": f"level{i}", "steps": 2, "data": f"level{i}", "train": labels[i]}
        for i in range(3)
    ] + [{"name": "top", "steps": 0, "data": "top", "train": ["top"]}]  # fmt: skip
    system = runs.system_class("abstractinator")(runs.resolve(tree))
    ids = jnp.asarray([list(text) for text in TEXTS], jnp.int32)
    there = jnp.ones(ids.shape, bool)
    rows, variables = jax.jit(system.model.init_with_output)(jax.random.key(0), ids, there)
    # A head that starts at zero would hide what the row model reads.
    top = variables["params"]["top"]
    top["head"] = 0.3 * jax.random.normal(jax.random.key(1), top["head"].shape)
    return system, variables, {"ids": ids, "there": there}, jax.tree.map(np.asarray, rows)


def test_the_third_level_trains_alone(three):
    system, variables, batch, _ = three

    @jax.jit
    def gradients(params):
        def loss(params):
            terms, moved, _ = system.loss_terms(
                {**variables, "params": params}, {}, {**batch, "level2": jnp.ones(2, bool)},
                {"codes": jax.random.key(0)}, True,
            )  # fmt: skip
            assert set(terms) == {"digits2", "commit2"}
            return sum(term.value for term in terms.values()), moved

        return jax.grad(loss, has_aux=True)(params)

    params, moved = gradients(variables["params"])
    size = lambda tree: max(float(jnp.abs(g).max()) for g in jax.tree.leaves(tree))  # noqa: E731
    # Exactly zero elsewhere: neither the levels below nor the row model.
    assert {k for k, part in params.items() if size(part) > 0} == {"compressor2", "expander2"}
    held = variables["codebook"]
    same = lambda a, b: all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))  # noqa: E731
    still = {name: same(moved["codebook"][name], book) for name, book in held.items()}
    assert still == {"quantiser": True, "quantiser1": True, "quantiser2": False}


def so_far(rows, said, known, blank):
    """What a decoder has before each thing that a part says: rows up to its own, and what was said.

    Returns:
      Where each thing is, the rows then, which of these are there, and what was said.
    """
    order = np.argwhere(known)
    given = np.full((len(order), *said.shape[1:]), blank, np.int32)
    above = np.zeros((len(order), *rows.shape[1:]), np.float32)
    for n, (window, row, *_) in enumerate(order):
        before = order[:n][order[:n, 0] == window]
        given[(n, *before[:, 1:].T)] = said[tuple(before.T)]
        above[n, : row + 1] = rows[window, : row + 1]
    there = np.arange(rows.shape[1]) <= order[:, 1:2]
    return order, above, there, given


def test_the_parts_of_three_levels_are_what_a_decoder_has(three):
    system, variables, batch, out = three
    sums = Measure(system.model).likelihoods(variables, batch["ids"], batch["there"])
    sums = {name: np.asarray(value) for name, value in sums.items()}
    assert [int(sums[f"rows{i}"]) for i in range(3)] == [8, 4, 2]
    bits = evaluate._bits(sums)
    parts = ("bytes_given_codes", "level0_given_level1", "level1_given_level2", "codes")
    assert bits["bpb.total"] == pytest.approx(sum(bits[f"bpb.{part}"] for part in parts))
    # Every byte is said once, and every row of every level, digit by digit.
    said, known, _ = segment.targets(batch["ids"], out[0].found, 6, EOP)
    cases = [(np.asarray(said), np.asarray(known), PAD)]
    for i in (1, 2):
        digits, there = segment.grid(out[i - 1].digits, out[i].found, 2)
        cases.append((np.asarray(digits), np.asarray(there)[..., None] & (digits >= 0), -1))
    cases.append((out[2].digits, out[2].digits >= 0, -1))
    assert [int(known.sum()) for _, known, _ in cases] == [48, 8 * 2, 4 * 2, 2 * 3]
    has = [so_far(out[min(i, 2)].rows, *case) for i, case in enumerate(cases)]

    @jax.jit
    def decode(has):
        apply = functools.partial(system.model.apply, variables)
        below = [apply(*part, i, method="expand") for i, part in enumerate(has[:3])]
        return [*below, apply(*has[3], method="predict")[0]]

    size = sum(len(text) for text in TEXTS)
    every = decode([part[1:] for part in has])
    for name, logits, (order, *_), (said, _, _) in zip(parts, every, has, cases, strict=True):
        log_p = np.asarray(jax.nn.log_softmax(logits))
        alone = np.asarray([-log_p[n][(*at[1:], said[tuple(at)])] for n, at in enumerate(order)])
        assert alone.std() > 1e-3, name
        assert bits[f"bpb.{name}"] == pytest.approx(alone.sum() / np.log(2) / size, rel=1e-5), name


def test_rows_of_another_window_are_read_where_asked(three):
    system, variables, batch, _ = three
    # Random weights say the same for every row: make them listen.
    params = dict(variables["params"])
    for name in ("expander", "expander1", "expander2"):
        unfold = params[name]["unfold"]
        params[name] = {**params[name], "unfold": jax.tree.map(lambda a: 5 * a, unfold)}
    run = Measure(system.model).free_running
    state = {**variables, "params": params}
    own, said = run(state, batch["ids"], batch["there"], 3, 2, False)
    other, swapped = run(state, batch["ids"], batch["there"], 3, 2, True)
    assert not np.array_equal(said[0], said[1])
    np.testing.assert_array_equal(swapped, said[::-1])
    # What they are compared with stays where it was.
    for name in ("bytes", "segments", "digits0", "digits1"):
        assert int(own[name]) == int(other[name]) > 0
    assert int(own["digits0"]) == 2 * 4 * 2 and int(own["digits1"]) == 2 * 2 * 2
