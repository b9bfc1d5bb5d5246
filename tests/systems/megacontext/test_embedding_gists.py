"""Gists that are input embeddings, on a tiny random base, and in a store of the packaged reader."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import latent_jax
from latent_jax import backbones, run
from latent_jax.backbones.decoder import Decoder
from latent_jax.backbones.sink import sink_kv
from latent_jax.backbones.streams import streams
from latent_jax.backbones.testing import random_params, tiny_config
from latent_jax.core.errors import ConfigError
from latent_jax.systems.megacontext.contexts import as_prefix, joined, pass_through
from latent_jax.systems.megacontext.counterfactual import Counterfactuals, actions
from latent_jax.systems.megacontext.embedding_gists import EmbeddingGists, calibrate
from latent_jax.systems.megacontext.embedding_net import shares, unit
from latent_jax.systems.megacontext.layout import Layout
from latent_jax.systems.megacontext.memory import Memory, digest
from latent_jax.systems.megacontext.model_config import GistConfig, ModelConfig
from latent_jax.systems.megacontext.reading import read_on
from latent_jax.systems.megacontext.runtime import Runtime, RuntimeConfig
from latent_jax.systems.megacontext.system import MegaContextSystem
from latent_jax.train.load import load_variables

LAYOUT = Layout(block=8, branching=4, slots=(3, 4), protected=1)
MODEL = ModelConfig(
    layout=LAYOUT, gist=GistConfig(kind="embeddings", window=4, reads=2, calibration=4)
)
BASE = tiny_config("llama")
DECODER = Decoder(BASE)
SINK = 1
SMALL = {
    "mesh.data": 1, "model.gist.kind": "embeddings", "model.gist.calibration": 4,
    "train.eval_every": 0, "train.optimizer.groups": {}, "data.rows": 400,
}  # fmt: skip


@pytest.fixture(scope="module")
def base():
    return random_params(BASE, jax.random.key(0))


@pytest.fixture(scope="module")
def ids():
    return jax.random.randint(jax.random.key(2), (2, 64), 2, BASE.vocab_size)


@pytest.fixture(scope="module")
def gists():
    return EmbeddingGists(MODEL, DECODER, SINK)


@pytest.fixture(scope="module")
def params(gists, base):
    rows = np.random.default_rng(3).integers(2, BASE.vocab_size, (4, 32))
    return calibrate(gists, base, rows, jax.random.key(1))


@pytest.fixture(scope="module")
def make(gists, params, base):
    return jax.jit(lambda ids: gists.make(params, base, ids))


def test_streams_are_what_layers_are_given(base, ids):
    """Before layer 0 the embeddings; the last one is the output; nothing else changes."""
    x = DECODER.apply({"params": base}, ids, method="embed")
    first = sink_kv(DECODER, base, jnp.int32(SINK), 2)
    found, out = streams(DECODER, base, x, [0, 1, BASE.num_layers], prefix=first)
    plain = DECODER.apply({"params": base}, x, prefix=first)
    np.testing.assert_allclose(found[:, :, 0], x)
    np.testing.assert_allclose(found[:, :, 2], plain.hidden, atol=1e-5)
    np.testing.assert_allclose(out.kv.v, plain.kv.v, atol=1e-5)
    np.testing.assert_allclose(out.kv.k, plain.kv.k, atol=1e-5)
    assert np.abs(np.asarray(found[:, :, 1] - x)).max() > 1e-2


def test_shares_are_even_where_slots_do_not_divide():
    assert shares(3, 8).tolist() == [0, 0, 0, 1, 1, 1, 2, 2]


def test_gists_have_the_size_of_embeddings(gists, params, base, ids, make):
    x = DECODER.apply({"params": base}, ids, method="embed")
    wanted = np.sqrt(np.square(np.asarray(x)).mean(-1)).mean()
    found = np.asarray(make(ids))
    assert found.shape == (16, 3, BASE.hidden_size)
    np.testing.assert_allclose(np.sqrt(np.square(found).mean(-1)), wanted, rtol=0.05)


def test_an_untrained_slot_is_a_mean_of_its_stretch(gists, params, base, ids):
    """Where it looks at nothing but its share, with equal weights."""
    level = dict(params["level_1"])
    own = shares(3, 8)[None] == np.arange(3)[:, None]
    level["prefer"] = jnp.repeat(jnp.where(own, 0.0, -60.0), 2, axis=0)
    level["look"] = jnp.zeros_like(level["look"])
    found = gists.make({"level_1": level}, base, ids)
    wanted = gists.pooled(base, ids, 1)
    np.testing.assert_allclose(unit(found), unit(wanted), atol=1e-5)


def test_a_slot_starts_as_a_word_of_its_stretch(gists, base, ids, make):
    found = unit(make(ids)).reshape(-1, 3, 1, BASE.hidden_size)
    x = unit(DECODER.apply({"params": base}, ids, method="embed"))
    x = x.reshape(-1, 1, 8, BASE.hidden_size)
    near = np.asarray((found * x).mean(-1))  # cosines, n s i
    own = shares(3, 8)[None] == np.arange(3)[:, None]
    best = np.where(own, near, -1).max(-1)
    assert np.median(best) > 0.9 and (best >= near.max(-1) - 1e-4).mean() > 0.9


def test_a_probe_finds_what_the_base_did_not_expect(gists, base):
    """Of two words, one always after the other: the first is a surprise, the second is none."""
    trained = backbones.load("tiny")
    found = EmbeddingGists(MODEL, trained.decoder, 1)
    text = "The mill at Dunmore burned down in 1911, and nobody was hurt when it fell. " * 40
    rows = np.asarray(trained.tokenizer.encode(text)[:256], np.int32).reshape(8, 32)
    params = calibrate(found, trained.params, rows, jax.random.key(0))

    @jax.jit
    def parts(ids):
        sources, hidden = found.read(trained.params, ids)
        seen = jnp.concatenate([unit(sources.x)[:, :, None], unit(sources.z)], axis=2)
        score = jnp.einsum("nikd,kd->ni", seen, params["level_1"]["look"][0])
        logits = trained.decoder.apply({"params": trained.params}, hidden, method="unembed")
        lost = -jax.nn.log_softmax(logits[:, :-1])
        lost = jnp.take_along_axis(lost, ids[:, 1:, None], axis=-1)[..., 0]
        return score.reshape(ids.shape)[:, 1:], lost

    score, lost = (np.asarray(x).ravel() for x in parts(jnp.asarray(rows)))
    assert np.corrcoef(score, np.minimum(lost, 12.0))[0, 1] > 0.6


def test_gradient_reaches_every_weight(gists, params, base, ids):
    """Once the maps of a slot's further reads, which start at zero, have moved."""
    key = jax.random.key(5)
    params = {
        name: level | {"maps": level["maps"] + 0.01 * jax.random.normal(key, level["maps"].shape)}
        for name, level in params.items()
    }

    def total(params, level):
        found = gists.build(params, base, ids, level)
        at = jnp.arange(found.shape[0] // 2 * found.shape[1])
        x = found.reshape(2, -1, BASE.hidden_size)
        at = jnp.broadcast_to(at, x.shape[:2])
        placed = pass_through(DECODER, base, SINK, x, at, at, jnp.ones(at.shape, bool))
        where = 64 + jnp.broadcast_to(jnp.arange(8), (2, 8))
        return jnp.sum(jnp.sin(read_on(DECODER, base, SINK, placed, ids[:, :8], where)))

    for level in (1, 2):
        gradient = jax.jit(jax.grad(total), static_argnums=1)(params, level)[f"level_{level}"]
        assert set(gradient) == {"look", "prefer", "maps", "size"}
        for name, leaf in gradient.items():
            rest = tuple(range(1, leaf.ndim))
            assert np.abs(np.asarray(leaf)).max(axis=rest).min() > 0, name


@pytest.mark.parametrize("block", [0, 2, 5])
def test_a_gist_knows_nothing_of_what_comes_later(make, ids, block):
    other = np.asarray(ids).copy()
    other[:, (block + 1) * 8 :] = 7
    one, two = (np.asarray(make(jnp.asarray(x))).reshape(2, 8, -1) for x in (ids, other))
    np.testing.assert_allclose(one[:, : block + 1], two[:, : block + 1], atol=1e-6)
    assert np.abs(one[:, block + 1 :] - two[:, block + 1 :]).max() > 1e-3


def test_padding_of_a_window_changes_nothing(make, ids):
    whole, part = np.asarray(make(ids)), np.asarray(make(ids[:, :40]))
    np.testing.assert_allclose(
        whole.reshape(2, 8, -1)[:, :5], part.reshape(2, 5, -1), atol=1e-6
    )


def test_masked_entries_are_as_if_they_were_not_there(base):
    x = jax.random.normal(jax.random.key(0), (1, 5, BASE.hidden_size))
    at = jnp.array([[0, 3, 4, 9, 12]])
    keep = np.array([0, 2, 4])
    mask = jnp.zeros((1, 5), bool).at[0, keep].set(True)
    held = {"x": x[None], "at": at[None]}
    every = as_prefix(DECODER, base, SINK, held, at, mask)
    fewer = pass_through(
        DECODER, base, SINK, x[:, keep], at[:, keep], at[:, keep], jnp.ones((1, 3), bool)
    )
    np.testing.assert_allclose(np.asarray(every.v)[:, :, keep], fewer.v, atol=1e-5)
    np.testing.assert_allclose(np.asarray(every.k)[:, :, keep], fewer.k, atol=1e-5)


@pytest.fixture(scope="module")
def reader():
    return backbones.load("tiny")


@pytest.fixture(scope="module")
def kept(reader):
    found = EmbeddingGists(MODEL, reader.decoder, 1)
    rows = np.random.default_rng(3).integers(10, reader.config.vocab_size, (4, 32))
    return calibrate(found, reader.params, rows, jax.random.key(1))


@pytest.fixture(scope="module")
def history(reader):
    return np.random.default_rng(0).integers(10, reader.config.vocab_size, 21 * 8 + 3)


@pytest.fixture(scope="module")
def memory(reader, kept, history, tmp_path_factory):
    path = tmp_path_factory.mktemp("embeddings") / "store"
    with Memory.open(path, reader, MODEL, kept, digest(kept), writable=True) as memory:
        memory.tree.append(history)
        assert memory.build() == {1: 21, 2: 5}
        yield memory


def test_streamed_and_bulk_builds_agree(memory, reader, kept, history, tmp_path):
    version = digest(kept)
    with Memory.open(tmp_path / "s", reader, MODEL, kept, version, writable=True) as streamed:
        for start in range(0, len(history), 20):
            streamed.tree.append(history[start : start + 20])
            streamed.build()
        for level, count in ((1, 21), (2, 5)):
            np.testing.assert_array_equal(
                streamed.tree.gists(level, 0, count), memory.tree.gists(level, 0, count)
            )


def test_a_store_holds_what_the_system_makes(memory, reader, kept, history):
    assert memory.tree.spec.width == reader.config.hidden_size
    found = memory.embeddings.build(kept, reader.params, jnp.asarray(history[None, :128]), 2)
    np.testing.assert_allclose(memory.tree.gists(2, 0, 4), found, rtol=2e-2, atol=2e-3)


def test_raw_blocks_alone_are_the_text_itself(memory, history):
    """In windows or not: the whole context goes through the base together."""
    entries = memory.gather([(0, i) for i in range(8)], 64)
    loss = memory.losses([entries], history[64:80], 64, 8, capacity=70)
    assert loss[0] == pytest.approx(memory.full_loss(80, 8), abs=2e-4)


def test_an_entry_sees_those_before_it(memory):
    one = memory.gather([(1, 0), (0, 1)], 24)
    assert one.positions.tolist() == [0, 3, 6, *range(8, 16)]
    assert one.held["at"].tolist() == [one.positions.tolist()]
    prefix = np.asarray(memory.prefix(one, 12).v)
    alone = np.asarray(memory.prefix(memory.gather([(0, 1)], 24), 12).v)
    assert np.abs(prefix[1:, :, 3:11] - alone[1:, :, :8]).max() > 1e-3


def test_what_an_action_changes_is_what_the_changed_context_loses(memory, history):
    """One mask over a pool in another order, and the context gathered anew."""
    runtime = Runtime(memory, RuntimeConfig(80, "recency", iterations=1))
    tiling = runtime.settle(history[152:160], 20)
    nodes, start = runtime.nodes(tiling)
    todo = actions(LAYOUT, tiling)[:4]
    live = history[start:168]
    found = Counterfactuals(memory, 80, rows=2).measure(nodes, todo, live, start, 8)
    for action, delta in zip(todo, found.delta_nll, strict=True):
        at = nodes.index(action.gone[0])
        changed = [*nodes[:at], *action.made, *nodes[at + len(action.gone) :]]
        loss = memory.losses([memory.gather(changed, start)], live, start, 8, 120)[0]
        assert found.nll + delta == pytest.approx(loss, abs=1e-4)


def test_entries_join(memory):
    parts = [memory.gather([(1, 0)], 24), memory.gather([(0, 1)], 24)]
    both = memory.gather([(1, 0), (0, 1)], 24)
    np.testing.assert_array_equal(joined(parts).held["x"], both.held["x"])
    np.testing.assert_array_equal(joined(parts).positions, both.positions)


def test_a_runtime_answers_and_its_context_moves(memory, watched):
    runtime = Runtime(memory, RuntimeConfig(80, "attention"))
    answer = runtime.answer("The mill burned down in", 20)
    assert len(watched) == len(answer.refocuses) > 0
    assert answer.nodes and {level for level, _ in answer.nodes} <= {0, 1, 2}


def test_training_reads_what_a_store_reads(tmp_path):
    """Losses behind gists in the training loss, and of the same gists in a store, agree."""
    system = MegaContextSystem(run.resolve("megacontext/tiny", {**SMALL, "train.phases": []}))
    layout = system.config.model.layout
    variables = system.init({"params": jax.random.key(0)}, {})
    gist, base = variables["params"]["gist"], system.frozen["base"]
    ids = jnp.asarray(system.eval_data()[:2, :64])
    chunk = system.config.data.chunk * layout.block
    found = jax.jit(lambda g: system._behind_all(g, base, ids, None, 4)[0])(gist)
    tail = layout.protected * layout.block
    row = np.asarray(found.nll)[0, -(chunk - tail) :]

    store, start = str(tmp_path / "store"), 64 - chunk
    with system.memory(variables, system.frozen, store, writable=True) as memory:
        memory.tree.append(np.asarray(ids[0]))
        memory.build()
        entries = memory.gather([(1, i) for i in range(start // layout.block)], start)
        got = memory.token_losses([entries], np.asarray(ids[:1, start:]), start, 16)[0]
    np.testing.assert_allclose(got[tail - 1 :], row, atol=3e-3)  # a store rounds to half precision


def test_a_lens_is_refused():
    with pytest.raises(ConfigError, match="kind=embeddings has none"):
        run.resolve("megacontext/tiny", SMALL | {"model.lens.width": 8})


def test_training_lowers_the_divergence_at_both_levels(tmp_path):
    """From the base on the text, on held-out text."""
    phases = [
        {"name": "near", "steps": 20, "data": "near", "train": ["queries", "maps"]},
        {"name": "level 2", "data": "upper2", "train": ["upper_queries", "upper_maps"]},
    ]
    overrides = SMALL | {
        "train.steps": 32, "train.phases": phases, "eval.rows": 16, "eval.upper_rows": 16,
        "eval.batch_size": 16, "out": str(tmp_path / "run"),
    }  # fmt: skip
    results = latent_jax.run("megacontext/tiny", **overrides)
    for name in ("recovery.lod1.slots2", "recovery.lod2.slots4", "recovery.lod1.slots2.mean_pool"):
        low, high = results[f"{name}.ci95"]
        assert low <= results[name] <= high
    system = results.system
    rows = jnp.asarray(system.eval_data())[:, :64]  # as long as either phase's
    fresh, trained = system.init({"params": jax.random.key(0)}, {}), load_variables(results.out)[0]

    @jax.jit
    def lost(variables, batch):
        terms = system.loss_terms(variables, system.frozen, batch, {}, False)[0]
        return [terms[name].value for name in terms if name != "next_token"][0]

    for batch in ({"ids": rows, "near": True}, {"ids": rows, "upper": True}):
        assert lost(trained, batch) < 0.95 * lost(fresh, batch)
