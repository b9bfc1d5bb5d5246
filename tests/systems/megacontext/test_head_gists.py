"""Gists of the text's own entries, on a tiny random base, and in a store of the packaged reader."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax import backbones, run
from latent_jax.backbones.decoder import Decoder
from latent_jax.backbones.testing import random_params, tiny_config
from latent_jax.core.errors import ConfigError
from latent_jax.ops import rope
from latent_jax.systems.megacontext.gist import Gists
from latent_jax.systems.megacontext.head_calibration import calibrate
from latent_jax.systems.megacontext.head_gists import HeadGists
from latent_jax.systems.megacontext.layout import Layout
from latent_jax.systems.megacontext.memory import Memory, digest
from latent_jax.systems.megacontext.model_config import GistConfig, ModelConfig
from latent_jax.systems.megacontext.positions import slot_positions
from latent_jax.systems.megacontext.reading import encode, place, read_on
from latent_jax.systems.megacontext.runtime import Runtime, RuntimeConfig
from latent_jax.systems.megacontext.store import GistTree
from latent_jax.train.load import load_variables

LAYOUT = Layout(block=8, branching=4, slots=(3,), protected=1)
MODEL = ModelConfig(
    layout=LAYOUT, gist=GistConfig(kind="heads", window=4, queries=12, reach=16)
)
BASE = tiny_config("llama")
DECODER = Decoder(BASE)
SINK = 1
HEADS = {
    "mesh.data": 1, "train.steps": 0, "train.phases": [], "train.eval_every": 0,
    "train.optimizer.groups": {}, "model.layout.slots": [4], "model.gist.kind": "heads",
    "model.gist.reads": 4,
    "model.gist.queries": 32, "model.gist.reach": 32, "model.gist.calibration": 4,
    "eval.rows": 16, "eval.upper_rows": 0, "data.rows": 100,
}  # fmt: skip


@pytest.fixture(scope="module")
def base():
    return random_params(BASE, jax.random.key(0))


@pytest.fixture(scope="module")
def ids():
    return jax.random.randint(jax.random.key(2), (2, 64), 2, BASE.vocab_size)


@pytest.fixture(scope="module")
def params(base):
    rows = np.random.default_rng(3).integers(2, BASE.vocab_size, (4, 32))
    return calibrate(HeadGists(MODEL, DECODER, SINK), base, lambda level: rows, batch=2)


@pytest.fixture(scope="module")
def make(base, params):
    gists = HeadGists(MODEL, DECODER, SINK)
    return jax.jit(lambda ids: gists.make(params, base, ids))


def test_the_heads_share_the_room_unevenly(params):
    gists = HeadGists(MODEL, DECODER, SINK)
    entry = 2 * BASE.head_dim + 1
    count = np.asarray(gists.counts(params))
    assert gists.room(1) == 3 * BASE.kv_floats_per_token // entry
    assert count.sum() == gists.room(1)
    assert count.max() > count.min()


def with_room_for_all(model):
    """A layout costs less than the text; these gists hold it whole, with a bias for each entry."""
    gists = HeadGists(model, DECODER, SINK)
    gists.room = lambda level: BASE.num_layers * BASE.num_kv_heads * gists.places(level)
    gists.slots = lambda level: 2 * gists.places(level)
    return gists


def test_with_room_for_all_a_gist_is_the_text(base, params, ids):
    """Keys, values and no bias; and what is read behind them is what raw blocks give."""
    gists = with_room_for_all(MODEL)
    found = gists.spread(params, gists.make(params, base, ids))
    raw, _ = encode(DECODER, base, SINK, ids, LAYOUT.block, 4)
    inside = jnp.broadcast_to(jnp.arange(8), (raw.k.shape[1], 8))
    keys = rope.rotate_layers(raw.k, inside, gists.waves)
    np.testing.assert_allclose(found.k, keys, atol=1e-4)
    np.testing.assert_allclose(found.v, raw.v, atol=1e-5)
    assert not np.asarray(found.bias).any()

    at, starts = jnp.arange(64), slot_positions(MODEL, 1, jnp.arange(8))
    full = jnp.ones((2, 64), bool)
    where = jnp.broadcast_to(64 + jnp.arange(8), (2, 8))
    then = ids[:, :8]
    starts = jnp.broadcast_to(starts, (2, 64))
    one = place(DECODER, Gists(found.k, found.v), starts, full, found.bias)
    other = place(DECODER, raw, jnp.broadcast_to(at, (2, 64)), full)
    np.testing.assert_allclose(
        read_on(DECODER, base, SINK, one, then, where),
        read_on(DECODER, base, SINK, other, then, where), atol=1e-4,
    )  # fmt: skip


def test_what_is_kept_is_the_text_s_own_keys(make, params, base, ids):
    gists = HeadGists(MODEL, DECODER, SINK)
    found = gists.spread(params, make(ids))
    raw, _ = encode(DECODER, base, SINK, ids, LAYOUT.block, 4)
    inside = jnp.broadcast_to(jnp.arange(8), (raw.k.shape[1], 8))
    keys = np.asarray(rope.rotate_layers(raw.k, inside, gists.waves))
    used = np.asarray(found.bias) > -1e29
    assert used.sum() == gists.room(1) * 16
    near = np.abs(np.asarray(found.k)[:, :, :, None] - keys[:, :, None]).max(-1)  # l n s t g
    own = near.min(3) < 1e-4
    assert own[used].all()


@pytest.mark.parametrize("block", [0, 2, 5])
def test_a_gist_knows_nothing_of_what_comes_later(make, ids, block):
    """Bit for bit, within its window too; nor of other windows, before or after."""
    other = np.asarray(ids).copy()
    other[:, (block + 1) * 8 :] = (other[:, (block + 1) * 8 :] + 7) % BASE.vocab_size
    other[:, : block // 4 * 32] = 5
    one, two = (np.asarray(make(x)).reshape(2, 8, -1) for x in (ids, jnp.asarray(other)))
    np.testing.assert_array_equal(one[:, block], two[:, block])
    assert (one[:, -1] != two[:, -1]).any()


def test_a_row_that_is_no_whole_window_is_cut(make, ids):
    np.testing.assert_allclose(
        make(ids[:, :40]).reshape(2, 5, -1), make(ids).reshape(2, 8, -1)[:, :5], atol=1e-4
    )


def test_text_before_a_window_makes_it_what_the_whole_text_makes_it(base, ids):
    """A lead of everything: keys and values are those of one long window; and of half of it, they
    do not know what came before that.
    """
    whole, _ = encode(DECODER, base, SINK, ids, 8, 8)
    short, _ = encode(DECODER, base, SINK, ids, 8, 2)
    led, _ = encode(DECODER, base, SINK, ids, 8, 2, lead=6)
    assert all(a.shape == b.shape for a, b in zip(whole, led, strict=True))
    np.testing.assert_allclose(led.k, whole.k, atol=2e-4)
    np.testing.assert_allclose(led.v, whole.v, atol=2e-4)
    assert np.abs(np.asarray(short.v - whole.v)).max() > 1e-2
    other = ids.at[:, :8].set(5)
    one, two = (encode(DECODER, base, SINK, x, 8, 2, lead=2)[0].v for x in (ids, other))
    one, two = (np.asarray(x).reshape(x.shape[0], 2, 8, -1) for x in (one, two))
    assert np.abs(one[:, :, :4] - two[:, :, :4]).max() > 1e-2
    np.testing.assert_array_equal(one[:, :, 4:], two[:, :, 4:])


def test_gists_of_windows_with_a_lead_are_those_of_the_whole_text(base, params, ids):
    """With room for all: the text's own entries, made knowing what came before."""
    led = dataclasses.replace(MODEL.gist, window=2, lead=6)
    gists = with_room_for_all(dataclasses.replace(MODEL, gist=led))
    found = gists.spread(params, gists.make(params, base, ids))
    whole, _ = encode(DECODER, base, SINK, ids, 8, 8)
    inside = jnp.broadcast_to(jnp.arange(8), (whole.k.shape[1], 8))
    np.testing.assert_allclose(
        found.k, rope.rotate_layers(whole.k, inside, gists.waves), atol=2e-4
    )
    np.testing.assert_allclose(found.v, whole.v, atol=2e-4)


@pytest.fixture(scope="module")
def reader():
    return backbones.load("tiny")


@pytest.fixture(scope="module")
def kept(reader):
    rows = np.random.default_rng(3).integers(10, reader.config.vocab_size, (4, 32))
    return calibrate(HeadGists(MODEL, reader.decoder, 0), reader.params, lambda level: rows)


@pytest.mark.parametrize("lead", [0, 3])
def test_streamed_and_bulk_builds_agree_and_are_read(reader, kept, tmp_path, lead, watched):
    model = dataclasses.replace(MODEL, gist=dataclasses.replace(MODEL.gist, lead=lead))
    ids = np.random.default_rng(0).integers(10, reader.config.vocab_size, 21 * 8 + 3)
    version = digest(kept)
    with Memory.open(tmp_path / "whole", reader, model, kept, version, writable=True) as memory:
        memory.tree.append(ids)
        assert memory.build() == {1: 21}
        records = memory.tree.gists(1, 0, 21)
        made = memory.heads.make(kept, reader.params, jnp.asarray(ids[None, :168]))
        np.testing.assert_allclose(records, made, rtol=2e-3, atol=2e-3)

        raw, _ = encode(reader.decoder, reader.params, memory.sink, ids[None, :168], 8, 4, lead)
        for block in (0, 3, 9, 20):  # the last one in a window that is not whole
            np.testing.assert_allclose(memory.raw(block).v[:, 0], raw.v[:, block], atol=1e-4)

        entries = memory.gather([(1, 0), (0, 1), (1, 2)], 168)
        assert entries.positions.tolist() == [0] * 8 + list(range(8, 16)) + [16] * 8
        hidden = entries.held["bias"] < -1e29
        assert not hidden[:, 8:16].any()
        assert hidden[:, :8].sum() == hidden[:, 16:].sum()
        assert (~hidden[:, :8]).sum() == memory.heads.room(1)

        runtime = Runtime(memory, RuntimeConfig(80, "recency"))
        nodes, start = runtime.nodes(runtime.settle(ids[-8:]))
        assert {level for level, _ in nodes} == {0, 1}
        placed = runtime.placed(memory.gather(nodes, start))
        assert placed.bias.shape == placed.k.shape[:-1]
        answer = runtime.answer("The mill burned down in", 4 if lead else 20)
        assert answer.nodes == nodes and (lead or len(watched) == len(answer.refocuses) > 0)
        losses = memory.losses([memory.gather(nodes, start)] * 2, ids[160:], 160, 4, 80)
        assert losses[0] == losses[1] and np.isfinite(losses).all()
    with Memory.open(tmp_path / "stream", reader, model, kept, version, writable=True) as memory:
        for start in range(0, len(ids), 20):
            memory.tree.append(ids[start : start + 20])
            memory.build()
        with GistTree.open(tmp_path / "whole") as whole:
            np.testing.assert_array_equal(memory.tree.gists(1, 0, 21), whole.gists(1, 0, 21))


def test_a_run_calibrates_and_measures(tmp_path):
    results = run("megacontext/tiny", **HEADS, out=str(tmp_path / "run"))
    assert {"recovery.lod1.slots4", "recovery.lod1.slots4.shuffled"} <= set(results)
    # The packaged reader makes little of a history; its losses behind gists are the text's.
    lost = results["nll_at_h.lod1.gist"] - results["nll_at_h.lod1.windowed"]
    assert abs(lost) < 0.05
    variables = load_variables(results.out)[0]
    fresh = results.system.init({"params": jax.random.key(0)}, {})
    assert digest(variables["params"]["gist"]) == digest(fresh["params"]["gist"])
    shapes = results.system.init_shapes({})
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, shapes)
    batch = {"ids": jnp.asarray(results.system.eval_data()[:2, :64])}
    terms = results.system.loss_terms(variables, results.system.frozen, batch, {}, False)[0]
    assert 0 <= float(terms["substitute"].value) < 0.5


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"train.steps": 5}, "calibrated, not trained"),
        ({"train.phases": [{"name": "a"}]}, "calibrated, not trained"),
        ({"model.gist.kind": "embeddings", "model.gist.lead": 2}, "windows have no lead"),
    ],
)
def test_what_these_gists_cannot_do_is_refused(overrides, said):
    from latent_jax.run import resolve

    with pytest.raises(ConfigError, match=said):
        resolve("megacontext/tiny", HEADS | overrides)
