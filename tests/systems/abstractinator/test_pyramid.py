"""Two levels: what sees what, where gradients go, and generation from caches on both."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax import run as runs
from latent_jax.core import trees
from latent_jax.core.errors import ConfigError
from latent_jax.systems.abstractinator import losses
from latent_jax.systems.abstractinator.generate import Generator
from latent_jax.systems.abstractinator.sample import Choice
from latent_jax.systems.abstractinator.tokenizer import EOP, PAD

TEXTS = [b"the cat sat on a mat and", b"dna tam a no tas tac eht"]
ABOVE = {
    "children": 3, "width": 16, "heads": 2, "ff": 32, "queries": 2, "row_width": 12,
    "compressor_layers": 1, "expander_layers": 1, "lookback": 1, "codes": 12, "stages": 2,
    "vq": {"init": "random"},
}  # fmt: skip


def config(tiny, **sections):
    tree = tiny(above=[ABOVE], **sections)
    tree["level"]["vq"] = {"init": "random"}
    del tree["byte_lm"]
    tree["train"]["phases"] = [
        {"name": "a", "steps": 2, "data": "level0", "train": ["compressor", "expander"]},
        {"name": "b", "steps": 2, "data": "level1", "train": ["compressor1", "expander1"]},
        {"name": "c", "steps": 0, "data": "top", "train": ["top"]},
    ]
    return tree


@pytest.fixture(scope="module")
def two(tiny):
    """System, variables with codes at every stage of both levels, a batch of two windows."""
    system = runs.system_class("abstractinator")(runs.resolve(config(tiny)))
    ids = jnp.asarray([list(text) for text in TEXTS], jnp.int32)
    batch = {"ids": ids, "there": jnp.ones(ids.shape, bool)}
    variables = jax.jit(lambda key: system.init({"params": key}, batch))(jax.random.key(0))
    # The head starts at zero, which would hide what the row model reads.
    top = variables["params"]["top"]
    top["head"] = 0.3 * jax.random.normal(jax.random.key(1), top["head"].shape)
    return system, variables, batch


@pytest.fixture(scope="module")
def climb(two):
    system, variables, _ = two
    return jax.jit(
        lambda ids: system.model.apply(variables, ids, ids != PAD, method="pyramid")
    )


@pytest.mark.slow
def test_a_level_reads_the_quantised_rows_below_and_no_later_ones(two, climb):
    system, variables, batch = two
    low, high = climb(batch["ids"])
    # "the cat sat |on a mat |and": eight rows below at most, three of them make one above.
    assert np.asarray(high.found.length[0]).tolist() == [3, 3, 1]
    assert np.asarray(high.found.open[0]).tolist() == [False, False, True]
    assert np.asarray(high.digits).shape == (2, 3, 2)
    later = climb(batch["ids"].at[:, 13:].set(ord("z")))[1]
    np.testing.assert_array_equal(high.rows[0, 0], later.rows[0, 0])
    assert np.abs(np.asarray(high.quantised.quantized - later.quantised.quantized))[0, 1:].max() > 0
    # The same digits below give the same row above, to the bit: it reads what `append` returns.
    again = jax.jit(
        lambda digits, there: system.model.apply(
            variables, system.model.apply(variables, digits, method="append"), there, 1,
            method="rise",
        )
    )(low.digits, low.there)  # fmt: skip
    np.testing.assert_array_equal(high.digits, again.digits)
    np.testing.assert_array_equal(high.rows, again.rows)


def test_where_the_gradients_of_a_level_go(two):
    system, variables, batch = two
    held = variables["codebook"]
    floats = {
        name: {k: v for k, v in part.items() if v.dtype == jnp.float32}
        for name, part in held.items()
    }

    def loss(params, floats):
        codebook = {name: {**held[name], **part} for name, part in floats.items()}
        terms, moved, _ = system.loss_terms(
            {"params": params, "codebook": codebook}, {},
            {**batch, "level1": jnp.ones(2, bool)}, {"codes": jax.random.key(0)}, True,
        )  # fmt: skip
        assert set(terms) == {"digits1", "commit1"}
        return terms["digits1"].sum, moved

    @jax.jit
    def gradients(params, floats):
        return jax.grad(loss, (0, 1), has_aux=True)(params, floats)

    (params, codes), moved = gradients(variables["params"], floats)
    size = lambda tree: max(float(jnp.abs(g).max()) for g in jax.tree.leaves(tree))  # noqa: E731
    # Exactly zero: neither its own codebooks nor, from the expander, those below.
    assert size(codes) == 0
    trained = {name for name, part in params.items() if size(part) > 0}
    assert trained == {"compressor1", "expander1"}
    # The level below evaluates: every bit of its codebooks stays, those above move.
    same = lambda a, b: all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))  # noqa: E731
    assert same(moved["codebook"]["quantiser"], held["quantiser"])
    assert not same(moved["codebook"]["quantiser1"], held["quantiser1"])
    labels = set(jax.tree.leaves(system.param_labels(variables["params"])))
    assert labels == {"compressor", "expander", "compressor1", "expander1", "top"}


@pytest.mark.slow
def test_the_expander_says_digits_in_order(two, climb):
    system, variables, batch = two
    low, high = climb(batch["ids"])

    @jax.jit
    def logits(digits):
        return system.model.apply(variables, high.rows, high.there, digits, 1, method="expand")

    said = jax.random.randint(jax.random.key(3), (2, 3, 3, 3), 0, 16)
    before = np.asarray(logits(said))
    # A digit is read by later stages of its row and by later rows, and by nothing else.
    after = np.asarray(logits(said.at[0, 1, 1, 1].set((said[0, 1, 1, 1] + 1) % 16)))
    moved = np.abs(before - after).max(-1) > 1e-6
    expected = np.zeros((2, 3, 3, 3), bool)
    expected[0, 1, 1, 2] = expected[0, 1, 2] = True
    np.testing.assert_array_equal(moved, expected)
    # The whole loss: rows that are there, each digit.
    nats, counted, _ = jax.jit(
        lambda: losses.rows_below(system.model, variables, high, low, 1)
    )()
    assert int(counted.sum()) == 3 * int(low.there.sum())
    assert np.isfinite(np.asarray(nats)).all()


@pytest.fixture(scope="module")
def slow(two):
    """Greedy continuation without a cache, tails or moves: whole passes over all rows so far."""
    system, variables, _ = two
    c, model = system.config, system.model
    size, most = c.rows(1), 64
    predict = jax.jit(lambda *a: model.apply(variables, *a, method="predict")[0])
    spread = jax.jit(lambda *a: model.apply(variables, *a, 1, method="expand"))
    expand = jax.jit(lambda *a: model.apply(variables, *a, method="expand"))
    append = [
        jax.jit(lambda digits, i=i: model.apply(variables, digits, level=i, method="append"))
        for i in (0, 1)
    ]

    def table(rows, room):
        out = np.zeros((1, room, len(rows[0]) if rows else 12), np.float32)
        for i, row in enumerate(rows):
            out[0, i] = row
        return out, jnp.arange(room)[None] < len(rows)

    def argmax_stages(logits_of, stages):
        digits = [-1] * stages
        for i in range(stages):
            digits[i] = int(np.argmax(logits_of(digits)[i]))
        return digits

    def run(out, prompt, count):
        low, high = jax.tree.map(lambda a: np.asarray(a[0]), out)
        whole = [i for i in range(len(low.there)) if low.there[i] and not low.found.open[i]]
        lows = [low.rows[i] for i in whole]
        begun = list(prompt[sum(low.found.length[i] for i in whole) :])
        highs = [append[1](low_digits) for low_digits in high.digits[: len(lows) // 3]]
        known = [low.digits[i].tolist() for i in whole[3 * len(highs) :]]
        lows = lows[: 3 * len(highs)]
        context, told = list(highs), b""
        while len(told) < count:
            if len(context) == size:
                context = context[size - size // 2 :]
            at = len(context)
            rows, there = table(context, size)

            def next_row(digits, rows=rows, there=there, at=at):
                given = np.full((1, size, 2), -1, np.int32)
                given[0, at] = digits
                return predict(rows, there, given)[0, at]

            row = np.asarray(append[1](np.asarray(argmax_stages(next_row, 2))))
            context.append(row)
            highs.append(row)
            rows, there = table(highs, most)
            said = np.full((1, most, 3, 3), -1, np.int32)
            for child in range(3):
                place = (0, len(highs) - 1, child)

                def digits_of(digits, rows=rows, there=there, said=said, place=place):
                    given = said.copy()
                    given[place] = digits
                    return spread(rows, there, given)[place]

                said[place] = (
                    known[child] if child < len(known) else argmax_stages(digits_of, 3)
                )
                lows.append(np.asarray(append[0](said[place])))
                if child < len(known):
                    continue
                table0, there0 = table(lows, most)
                spoken = np.full((1, most, 6), PAD, np.int32)
                mine = (0, len(lows) - 1)
                for i in range(6):
                    if i < len(begun):
                        spoken[mine][i] = begun[i]
                        continue
                    spoken[mine][i] = np.argmax(expand(table0, there0, spoken)[mine][i])
                    if spoken[mine][i] == EOP:
                        break
                told += bytes(b for b in spoken[mine][len(begun) :].tolist() if b < 256)
                begun = []
            known = []
        return told[:count]

    return run


@pytest.mark.slow
def test_cached_is_uncached_on_both_levels(two, climb, slow):
    system, variables, _ = two
    generator = Generator(system.model)
    # One row of the upper level and two thirds of another; a row; nothing; a whole row, and bytes.
    prompts = [b"the cat sat on a ma", b"to b", b"", b"a b c d"]
    ids = np.full((4, 24), PAD, np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = list(prompt)
    out = tuple(rows._replace(quantised=None) for rows in climb(jnp.asarray(ids)))
    context, _, known = generator.start(variables, prompts)
    assert np.asarray(context.count).tolist() == [1, 0, 0, 1]
    # What generation starts from is what training read, to the bit.
    np.testing.assert_array_equal(context.rows[0, 0], out[1].rows[0, 0])
    np.testing.assert_array_equal(known.digits[0][0, :2], out[0].digits[0, 3:5])
    found = generator(variables, prompts, 50, Choice.of(3))
    for i, prompt in enumerate(prompts):
        mine = jax.tree.map(lambda a, i=i: a[i : i + 1], out)
        assert found[i] == slow(mine, prompt, 50), prompt


@pytest.mark.slow
def test_three_levels_have_their_shapes(tiny):
    tree = config(tiny)
    tree["above"] = [ABOVE, {**ABOVE, "children": 2, "row_width": 8, "codes": 6}]
    system = runs.system_class("abstractinator")(runs.resolve(tree))
    assert [system.config.rows(i) for i in range(3)] == [8, 3, 2]
    made = jax.eval_shape(lambda key: system.init({"params": key}, {}), jax.random.key(0))
    shapes = {path: leaf.shape for path, leaf in trees.flatten(made["params"]).items()}
    assert shapes["compressor2/rows/kernel"] == (12, 16)
    assert shapes["expander2/child/kernel"] == (12, 16)
    assert shapes["expander2/head/out"] == (2, 16, 12)
    assert shapes["top/read/kernel"] == (8, 16) and shapes["top/head"] == (2, 16, 6)
    assert set(made["codebook"]) == {"quantiser", "quantiser1", "quantiser2"}
    generator = Generator(system.model)
    ids = jax.ShapeDtypeStruct((2, 24), jnp.int32)
    valid = jax.ShapeDtypeStruct((2, 24), bool)
    context, tails, known = jax.eval_shape(generator._read_texts, made, ids, valid)
    assert [tail.rows.shape for tail in tails] == [(2, 1, 16), (2, 1, 12), (2, 1, 8)]
    _, _, said = jax.eval_shape(
        generator._next_row, made, context, tails, known, jax.random.key(0), Choice.of(3)
    )
    assert said.shape == (2, 2 * 3, 6), "one row is two of three segments"


@pytest.mark.slow
def test_the_pods_shapes():
    system = runs.system_class("abstractinator")(runs.resolve("abstractinator/pod"))
    assert [system.config.rows(i) for i in range(2)] == [256, 64]
    made = jax.eval_shape(lambda key: system.init({"params": key}, {}), jax.random.key(0))
    count = {name: trees.count_params(tree) for name, tree in made["params"].items()}
    peer = count.pop("byte_lm")
    assert sum(count.values()) == pytest.approx(peer, rel=0.01), "a peer of as many parameters"
    assert 5e8 < peer < 6e8
    assert made["codebook"]["quantiser1"]["code"].shape == (1, 16, 1024, 512)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t["level"].update(vq={"distance": "cosine"}), "measures Euclidean distances"),
        (lambda t: t["above"][0].update(codes=4096, vq={}), "above\\[0\\].codes=4096: k-means"),
        (lambda t: t["train"]["phases"][1].update(train=["expander1"]), "a held compressor1"),
        (lambda t: t["train"]["phases"][1].update(data="level2"), "no such data.*level1"),
        (lambda t: t["above"][0].update(children=1), ">= 2"),
    ],
)
def test_pyramids_that_cannot_be(tiny, change, message):
    tree = config(tiny)
    tree["above"] = [dict(ABOVE)]
    change(tree)
    with pytest.raises(ConfigError, match=message):
        runs.resolve(tree)
