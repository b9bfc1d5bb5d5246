"""Learned segments: loss and gradient by hand, streams, and that they come to be as wanted."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import latent_jax
from latent_jax import run as runs
from latent_jax import sharding
from latent_jax.core.errors import ConfigError
from latent_jax.systems.abstractinator import losses, segment
from latent_jax.systems.abstractinator.config import RouterConfig, SegmentConfig
from latent_jax.systems.abstractinator.router import Router, pass_on, ratio_loss
from latent_jax.systems.abstractinator.tokenizer import PAD

TEXT = b"the cat sat on a mat and"
ROUTER = {"layers": 1, "width": 8, "heads": 2, "ff": 16, "reach": 6}
WANTED = 4.0


def config(tiny, **sections):
    segments = {"rule": "learned", "bytes_per_segment": WANTED, "budget": 24}
    tree = tiny(segments=segments, router=ROUTER, **sections)
    del tree["byte_lm"]
    tree["level"]["vq"] = {"init": "random"}
    tree["train"]["phases"] = tree["train"]["phases"][:2]
    tree["train"]["phases"][0]["train"] = ["compressor", "expander", "router"]
    tree["train"]["phases"][1]["steps"] = 0
    return tree


@pytest.fixture(scope="module")
def made(tiny):
    """System, variables and a batch."""
    system = runs.system_class("abstractinator")(runs.resolve(config(tiny)))
    variables = jax.jit(lambda key: system.init({"params": key}, {}))(jax.random.key(0))
    ids = jnp.asarray([list(TEXT), list(TEXT[::-1])], jnp.int32)
    return system, variables, {"ids": ids, "there": jnp.ones(ids.shape, bool)}


def test_the_ratio_loss_by_hand():
    p = jnp.asarray([[1.0, 0.2, 0.9, 0.4, 0.6]])
    valid = jnp.asarray([[True, True, True, True, False]])
    loss, grad = jax.value_and_grad(lambda p: ratio_loss(p, valid, p > 0.5, WANTED).value)(p)
    share, mean = 2 / 4, 2.5 / 4
    expected = WANTED / (WANTED - 1) * ((WANTED - 1) * share * mean + (1 - share) * (1 - mean))
    assert float(loss) == pytest.approx(expected)
    # Twice as many starts as wanted: every probability of a byte goes down, and no padding's.
    slope = WANTED / (WANTED - 1) * ((WANTED - 1) * share - (1 - share)) / 4
    np.testing.assert_allclose(grad, [[slope] * 4 + [0.0]], rtol=1e-5)
    assert slope > 0
    # One start in four bytes is what was wanted, and the loss is 1 there.
    just = jnp.asarray([[1.0, 0.0, 0.0, 0.0]])
    assert float(ratio_loss(just, just >= 0, just > 0.5, WANTED).value) == pytest.approx(1.0)


def test_starts_of_full_segments_count():
    ids = jnp.asarray([list(TEXT)], jnp.int32)
    valid = jnp.ones(ids.shape, bool)
    p = jnp.zeros(ids.shape).at[:, jnp.asarray([0, 2, 4, 14])].set(0.9)
    config = SegmentConfig(rule="learned", bytes_per_segment=WANTED, longest=6, budget=3)
    found = segment.segment(ids, valid, "learned", 6, 24, p > 0.5)
    assert found.length[0, :7].tolist() == [2, 2, 6, 4, 6, 4, 0]
    # The router marks one byte in six; with the segments that are only full it is one in four,
    # as wanted, and no probability has to move.
    loss, grad = jax.value_and_grad(lambda p: losses.ratio(config, ids, valid, p).value)(p)
    assert float(loss) == pytest.approx(1.0)
    np.testing.assert_allclose(grad, 0.0, atol=1e-6)


def test_rows_keep_their_bits_and_pass_a_gradient_on():
    p = jnp.asarray([[1.0, 0.2, 0.7, 0.4, 0.1, 0.9]])
    valid = jnp.ones((1, 6), bool)
    found = segment.segment(valid, valid, "learned", 4, 4, p > 0.5)
    assert found.length[0].tolist() == [2, 3, 1, 0]
    rows, back = jax.random.normal(jax.random.key(0), (2, 1, 4, 3))
    value, pull = jax.vjp(lambda rows, p: pass_on(rows, p, found, 4), rows, p)
    np.testing.assert_array_equal(value, rows)
    to_rows, to_p = pull(back)
    np.testing.assert_array_equal(to_rows, back)
    r, g = np.asarray(rows[0], np.float64), np.asarray(back[0], np.float64)
    # A start: rather the row before; and each byte's part in how sure its segment was.
    expected = np.zeros(6)
    for s, (start, length) in enumerate([(0, 2), (2, 3), (5, 1)]):
        before = r[s - 1] if s else np.zeros(3)
        expected[start] += g[s] @ (r[s] - before)
        for t in range(start, start + length):
            expected[t] += (1 if t == start else -1) * g[s] @ r[s] / length
    np.testing.assert_allclose(to_p[0], expected, rtol=1e-4)


@pytest.mark.slow
def test_a_stream_is_cut_as_the_whole_text_is(made):
    system, variables, _ = made
    # Every prefix, and every prefix followed by other bytes than the text's.
    ids = np.full((2 * len(TEXT), len(TEXT)), PAD, np.int32)
    ids[len(TEXT) :] = ord("z")
    for n in range(len(TEXT)):
        ids[n, : n + 1] = ids[n + len(TEXT), : n + 1] = list(TEXT[: n + 1])
    ids = jnp.asarray(ids)

    @jax.jit
    def cut(ids):
        p = system.model.apply(variables, ids, ids != PAD, method="scores")
        # At the median of the whole text's, so that there is something to see.
        limit = jnp.median(p[len(TEXT) - 1])
        whole = segment.segment(ids, ids != PAD, "learned", 6, 24, p > limit)
        few = segment.segment(ids, ids != PAD, "learned", 6, 3, p > limit)
        return p, whole, few

    p, found, few = jax.tree.map(np.asarray, cut(ids))
    last = len(TEXT) - 1
    full = found.start[last][found.length[last] > 0]
    assert 4 < len(full) < 20, "the text is cut in a way that tells"
    assert found.length[last].sum() == len(TEXT) and found.overflow[last] == 0
    for n in range(2 * len(TEXT)):
        seen = n % len(TEXT)
        np.testing.assert_array_equal(p[n, : seen + 1], p[last, : seen + 1])
        starts = found.start[n][found.length[n] > 0]
        assert [s for s in starts if s <= seen] == [s for s in full if s <= seen]
    # What a budget leaves out is counted, and only that.
    assert few.overflow[last] == len(TEXT) - found.length[last][:3].sum()


@pytest.mark.slow
def test_the_gradient_reaches_the_router_and_no_codebook(made):
    system, variables, batch = made
    held = variables["codebook"]["quantiser"]
    floats = {k: v for k, v in held.items() if v.dtype == jnp.float32}

    @jax.jit
    def gradients(params, floats):
        def terms_of(params, floats):
            book = {"params": params, "codebook": {"quantiser": {**held, **floats}}}
            found, _, _ = system.loss_terms(book, {}, {**batch, "level0": True}, {}, True)
            return {name: found[name].value for name in ("reconstruct", "ratio", "commit")}

        value, pull = jax.vjp(terms_of, params, floats)
        zero = {name: jnp.float32(0) for name in value}
        return {name: pull(zero | {name: jnp.float32(1)}) for name in value}

    found = gradients(variables["params"], floats)
    size = lambda tree: max(float(jnp.abs(g).max()) for g in jax.tree.leaves(tree))  # noqa: E731
    assert all(size(codes) == 0 for _, codes in found.values())
    # From what the rows are good for, and from how many there are to be.
    for name in ("reconstruct", "ratio"):
        assert size(found[name][0]["router"]["q"]) > 1e-6, name
        assert size(found[name][0]["router"]["bytes"]) > 1e-6, name
    assert size(found["ratio"][0]["compressor"]) == 0


def test_starts_come_to_be_as_many_as_wanted():
    router = Router(RouterConfig(**ROUTER))
    text = np.frombuffer((TEXT + b" ") * 40, np.uint8).astype(np.int32)
    ids = jnp.asarray(np.lib.stride_tricks.sliding_window_view(text, 48)[::31][:16])
    valid = jnp.ones(ids.shape, bool)
    update, wanted = optax.adam(1e-2), 8.0

    @jax.jit
    def train(key):
        params = router.init(key, ids, valid)

        def loss(params):
            p = router.apply(params, ids, valid)
            return ratio_loss(p, valid, p > 0.5, wanted).value, p

        def step(carry, _):
            params, state = carry
            grads, p = jax.grad(loss, has_aux=True)(params)
            moved, state = update.update(grads, state)
            return (optax.apply_updates(params, moved), state), jnp.mean(p > 0.5)

        return jax.lax.scan(step, (params, update.init(params)), None, 60)[1]

    share = np.asarray(train(jax.random.key(0)))
    assert abs(share[0] - 1 / wanted) > 0.1, "an untrained router cuts in another way"
    assert abs(share[-10:].mean() - 1 / wanted) < 0.5 * abs(share[0] - 1 / wanted)


@pytest.mark.slow
def test_calibration_says_what_the_router_came_to(made):
    system, variables, _ = made
    found = system.calibrate_segments(variables, {}, 3.0, windows=40)
    assert found["bytes_per_segment"] == pytest.approx(3.0, rel=0.05)
    assert found["set"].startswith("--set segments.rule=learned --set segments.threshold=0.")
    batch = system.windows("train").batch(system.windows("train").spread(40))
    cut = jax.jit(lambda *a: system.model.apply(variables, *a, method="segment"))(
        batch["ids"], batch["there"]
    )
    kept = float(cut.length.sum() / cut.rows.sum())
    assert found["bytes_per_segment_now"] == pytest.approx(kept, rel=1e-5)
    with pytest.raises(ConfigError, match="--delta is of entropies"):
        system.calibrate_segments(variables, {}, 3.0, delta=True)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t["segments"].pop("bytes_per_segment"), "segments.bytes_per_segment"),
        (lambda t: t["segments"].update(threshold=1.5), "is a probability"),
        (lambda t: t["segments"].update(bytes_per_segment=6), "below segments.longest=6"),
        (lambda t: t["segments"].update(delta=0.1), "delta needs segments.rule=entropy"),
        (lambda t: t["segments"].update(score="gaussian"), "score=gaussian needs"),
        (lambda t: t.pop("router"), "section router and segments.rule=learned go together"),
        (lambda t: t["train"]["phases"][0]["train"].remove("router"), "no phase.*trains it"),
        (lambda t: t["train"]["phases"][1].update(train=["top", "router"]), "gives router no"),
    ],
)
def test_refused(tiny, change, message):
    tree = config(tiny)
    change(tree)
    with pytest.raises(ConfigError, match=message):
        runs.resolve(tree)


@pytest.mark.slow
def test_a_level_and_its_router_learn_together(tiny, tmp_path):
    tree = config(tiny)
    # Another stream of random numbers, and codes of the text's own rows.
    tree["level"]["vq"] = {"reset": {"stale": 5}}
    tree["eval"] |= {"windows": 32}
    tree["train"]["steps"] = 300
    tree["train"]["phases"][0]["steps"] = 200
    one = sharding.make_mesh(sharding.MeshConfig(data=1), jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda config: one)
        done = latent_jax.run(tree, out=str(tmp_path / "run"))
    assert done["bytes_per_row"] == pytest.approx(WANTED, rel=0.25)
    assert done["segments.overflow"] < 0.05
    assert done["reconstruction.byte_accuracy"] > 0.28
    rows = [json.loads(line) for line in (done.out / "metrics.jsonl").read_text().splitlines()]
    first = next(row for row in rows if "bytes_per_row" in row)
    assert abs(first["bytes_per_row"] - WANTED) > abs(done["bytes_per_row"] - WANTED)
