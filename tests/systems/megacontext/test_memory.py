"""A stored history through the frozen tiny reader: entries, losses, focus and answers."""

from __future__ import annotations

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from latent_jax import backbones, cli
from latent_jax.core.errors import ConfigError, StoreError
from latent_jax.systems.megacontext import tiling as tl
from latent_jax.systems.megacontext.allocator import FocusConfig
from latent_jax.systems.megacontext.comparison import nll_at_h
from latent_jax.systems.megacontext.gist import GistNet, Gists
from latent_jax.systems.megacontext.layout import Layout
from latent_jax.systems.megacontext.memory import Memory
from latent_jax.systems.megacontext.model_config import GistConfig, ModelConfig
from latent_jax.systems.megacontext.records import from_records, to_records
from latent_jax.systems.megacontext.runtime import Runtime, RuntimeConfig
from latent_jax.systems.megacontext.store import DamagedTokens, GistTree

LAYOUT = Layout(block=8, branching=4, slots=(2, 4), protected=1)
MODEL = ModelConfig(layout=LAYOUT, gist=GistConfig(reads=2, window=4))


@pytest.fixture(scope="module")
def base():
    return backbones.load("tiny")


@pytest.fixture(scope="module")
def params(base):
    r = base.config
    shape = (r.num_layers, 1, LAYOUT.block, r.num_kv_heads, r.head_dim)
    some = Gists(jnp.zeros(shape), jnp.zeros(shape))
    return GistNet(MODEL, r).init(jax.random.key(1), some, method="touch")["params"]


@pytest.fixture(scope="module")
def ids(base):
    """21 blocks and a bit: five windows and a part, five nodes of level 2."""
    return np.random.default_rng(0).integers(10, base.config.vocab_size, 21 * 8 + 3)


@pytest.fixture(scope="module")
def store(base, params, ids, tmp_path_factory):
    path = tmp_path_factory.mktemp("mega") / "store"
    with Memory.open(path, base, MODEL, params, "one", writable=True) as memory:
        memory.tree.append(ids)
        assert memory.build() == {1: 21, 2: 5}
        assert memory.build() == {}
    return path


@pytest.fixture
def memory(store, base, params):
    with Memory.open(store, base, MODEL, params, "one") as memory:
        yield memory


def test_records_round_trip(base):
    r = base.config
    k, v = jax.random.normal(jax.random.key(0), (2, r.num_layers, 3, 2, r.num_kv_heads, r.head_dim))
    rows = to_records(Gists(k, v))
    assert rows.shape == (3, 2, r.kv_floats_per_token)
    back = from_records(rows, r)
    np.testing.assert_array_equal(back.k, k)
    np.testing.assert_array_equal(back.v, v)


def flip(path, block):
    raw = bytearray((path / "ids.bin").read_bytes())
    raw[2 * (block * LAYOUT.block + 1)] ^= 1
    (path / "ids.bin").write_bytes(raw)


def test_gists_beside_damaged_blocks_are_made_again_once_they_are_repaired(
    store, base, params, ids, tmp_path
):
    path = shutil.copytree(store, tmp_path / "s")
    flip(path, 9)
    with Memory.open(path, base, MODEL, params, "two", writable=True) as memory:
        assert memory.build()[1] == 20 and memory.damaged == [9]
        # Windows of four: 10 and 11 are read as if the text began behind 9.
        assert memory.tree.pending(1).tolist() == [9, 10, 11]
        assert memory.tree.pending(2).tolist() == [2]
        alone = np.asarray(memory.raw(10).v)
        assert memory.build() == {}
    flip(path, 9)
    with Memory.open(path, base, MODEL, params, "two", writable=True) as memory:
        assert memory.build() == {1: 3, 2: 1} and memory.damaged == []
        assert np.abs(np.asarray(memory.raw(10).v) - alone).max() > 1e-3
        with GistTree.open(store) as whole:
            for level, count in ((1, 21), (2, 5)):
                np.testing.assert_array_equal(
                    memory.tree.gists(level, 0, count), whole.gists(level, 0, count)
                )


@pytest.mark.parametrize("policy", ["bm25", "recency", "attention"])
@pytest.mark.parametrize("damaged", [7, 20, 21])
def test_a_damaged_block_is_as_if_it_were_not_there(
    store, base, params, ids, tmp_path, policy, damaged
):
    """Far, in the protected tail, and behind the last whole block."""
    path = shutil.copytree(store, tmp_path / "s")
    flip(path, damaged)
    with Memory.open(path, base, MODEL, params, "one") as memory:
        runtime = Runtime(memory, RuntimeConfig(budget=150, policy=policy))
        query = ids[7 * 8 : 8 * 8]
        tiling = runtime.settle(query)
        nodes, live, start = runtime.context(tiling)
        assert (0, damaged) not in nodes and memory.tree.damaged == {damaged}
        if policy == "bm25":
            assert (0, 7) not in tl.nodes(tiling) or damaged != 7
            assert (damaged == 7) == (runtime.overlap(query, 21)[7] == 0)
        if damaged == 7:
            assert (1, 7) in nodes  # its gist was made before
            np.testing.assert_array_equal(live, ids[20 * 8 :])
        else:
            assert start == min((damaged + 1) * 8, len(ids)) and len(live) == len(ids) - start
            assert ((0, 20) in nodes) == (damaged == 21)
        assert np.isfinite(memory.gather(nodes, start).held["k"]).all()
        with pytest.raises(DamagedTokens if damaged < 21 else StoreError):
            memory.raw(damaged)
        assert np.isfinite(memory.raw(6).k).all()
        assert runtime.answer("The mill", 2) is not None


def test_no_text_of_a_tree_reads_on_from_the_one_before(base, params, ids, tmp_path):
    """With a lead the first window of a text would see the end of the one before it."""
    model = dataclasses.replace(MODEL, gist=dataclasses.replace(MODEL.gist, lead=2))
    made = []
    for name, before in (("a", ids[:64]), ("b", ids[64:128]), ("c", ids[:0])):
        with Memory.open(tmp_path / name, base, model, params, "x", writable=True) as memory:
            memory.tree.append(before)
            memory.tree.append(ids[:64])
            memory.build(breaks=range(0, 16, 8))
            made.append(memory.tree.gists(1, len(before) // 8, 8))
    np.testing.assert_array_equal(made[0], made[1])
    np.testing.assert_array_equal(made[0], made[2])


def test_streamed_gists_equal_those_built_at_once(store, base, params, ids, tmp_path):
    with Memory.open(tmp_path / "s", base, MODEL, params, "one", writable=True) as streamed:
        for start in range(0, len(ids), 20):
            streamed.tree.append(ids[start : start + 20])
            streamed.build()
        with GistTree.open(store) as whole:
            for level, count in ((1, 21), (2, 5)):
                np.testing.assert_array_equal(
                    streamed.tree.gists(level, 0, count), whole.gists(level, 0, count)
                )


def test_a_window_that_has_grown_is_encoded_again(base, params, ids, tmp_path):
    with Memory.open(tmp_path / "s", base, MODEL, params, "one", writable=True) as memory:
        memory.tree.append(ids[:16])
        first = np.asarray(memory.raw(1).v)
        memory.tree.append(ids[16:24])
        np.testing.assert_allclose(memory.raw(1).v, first, atol=1e-5)
        grown = np.asarray(memory.raw(2).v)
    with Memory.open(tmp_path / "s", base, MODEL, params, "one") as memory:
        np.testing.assert_array_equal(memory.raw(2).v, grown)


def test_gathered_entries_stand_where_their_text_stood(memory):
    found = memory.gather([(2, 0), (1, 4), (0, 5)], 48)
    assert found.positions.tolist() == [3, 11, 19, 27, 33, 37, *range(40, 48)]
    np.testing.assert_array_equal(found.held["k"][:, -8:], memory.raw(5).k[:, 0])
    gist = from_records(memory.tree.gists(1, 4, 1), memory.backbone.config)
    np.testing.assert_allclose(found.held["v"][:, 4:6], gist.v[:, 0])


def test_what_is_far_stands_together(memory):
    far = memory.far
    at = memory.placement.rotary(np.array([0, 10, 500, far + 90]), far + 100)
    assert at.tolist() == [0, 0, 400, far - 10]
    assert memory.placement.rotary(np.array([0, 10]), far).tolist() == [0, 10]


def test_one_window_of_raw_blocks_is_the_text_itself(memory):
    ids = memory.tree.tokens(0, 40)
    entries = memory.gather([(0, 0), (0, 1), (0, 2)], 24)
    loss = memory.losses([entries], ids[24:], 24, 8, capacity=30)
    assert loss[0] == pytest.approx(memory.full_loss(40, 8), abs=2e-4)


def test_contexts_of_a_batch_do_not_mix(memory):
    ids = memory.tree.tokens(24, 40)
    one = memory.gather([(1, 0), (1, 1), (1, 2)], 24)
    two = memory.gather([(0, 0), (1, 1), (0, 2)], 24)
    both = memory.losses([one, two], ids, 24, 8, capacity=24)
    alone = [memory.losses([c], ids, 24, 8, capacity=24)[0] for c in (one, two)]
    np.testing.assert_allclose(both, alone, rtol=1e-5)
    assert abs(alone[0] - alone[1]) > 1e-3


def test_the_focus_opens_what_the_query_names(memory):
    runtime = Runtime(memory, RuntimeConfig(budget=48))
    query = memory.tree.tokens(7 * 8, 8 * 8)
    tiling = runtime.settle(query)
    nodes, start = runtime.nodes(tiling)
    assert (0, 7) in nodes
    assert start == 20 * 8
    cost = sum(int(LAYOUT.costs[level]) for level, _ in nodes) + LAYOUT.block
    assert cost <= 48
    width = LAYOUT.widths.tolist()
    covered = [b for n, i in nodes for b in range(i * width[n], (i + 1) * width[n])]
    assert covered == list(range(20))


def test_losses_of_policies(memory):
    found = nll_at_h(
        memory, [48], ["full", "windowed", "dropped", "recency", "bm25"], [16, 20], 8, FocusConfig()
    )
    assert set(found) == {"full", "windowed", "dropped", "recency.w48", "bm25.w48"}
    assert all(x.shape == (2,) and np.isfinite(x).all() for x in found.values())


def test_another_gistnet_is_refused(store, base, params):
    with pytest.raises(StoreError, match="of version one, this run's are two"):
        Memory.open(store, base, MODEL, params, "two")
    other = ModelConfig(layout=Layout(block=8, branching=4, slots=(2, 3), protected=1))
    with pytest.raises(StoreError, match="slots"):
        Memory.open(store, base, other, params, "one")


def test_what_cannot_be_asked_is_refused(memory):
    with pytest.raises(ConfigError, match="prompt is empty"):
        Runtime(memory, RuntimeConfig(budget=48)).answer("")
    with pytest.raises(ConfigError, match="a runtime can use recency"):
        Runtime(memory, RuntimeConfig(budget=48, policy="oracle"))


def test_the_last_token_must_have_a_position(memory, monkeypatch):
    """What stands before the live text takes no positions beyond those of its own text."""
    most, live = memory.backbone.config.max_position, np.arange(10, 26)
    near, far = memory.gather([(1, 0)], 8), memory.gather([(1, 0)], most)
    wide = most  # entries of the compiled shape are no positions
    monkeypatch.setattr(memory, "prefix", lambda *_: None)
    assert memory.continued(near, live, 8, wide, 2)
    room = most - memory.far - len(live)
    assert isinstance(memory.continued(far, live, most, 8, room), str)
    with pytest.raises(ConfigError, match="do not fit the base"):
        memory.continued(far, live, most, 8, room + 1)
    # What is generated joins the history: it needs no positions, but room in the context.
    with pytest.raises(ConfigError, match="the working context has 48: raise W"):
        Runtime(memory, RuntimeConfig(budget=48)).answer("The mill", most)


def call(*arguments):
    return CliRunner().invoke(cli.app, list(arguments))


def test_from_files_to_an_answer(trained, tmp_path):
    run, store, texts = trained
    again = call("mega", "ingest", texts, "--store", store, "--run", run)
    assert "none was missing" in again.output
    trace = str(tmp_path / "focus.npz")
    asked = call(
        "mega", "ask", store, "The mill burned", "--run", run, "--budget", "160",
        "--max-new-tokens", "4", "--trace", trace,
    )  # fmt: skip
    assert asked.exit_code == 0, asked.output
    assert "answer" in asked.output and "raw blocks" in asked.output
    page = tmp_path / "focus.html"
    assert call("mega", "trace", trace, "--html", str(page)).exit_code == 0
    assert "<html" in page.read_text()


def test_a_wrong_question_is_one_line(trained, tmp_path, capsys):
    run, store, _ = trained
    spec = GistTree.open(store).spec
    version = GistTree.open(store).version
    for name, count in (("empty", 5), ("pending", 400)):
        with GistTree.create(tmp_path / name, spec) as tree:
            tree.set_version(version)
            tree.append(np.arange(10, 10 + count))
    other = tmp_path / "lm"
    other.mkdir()
    (other / "config.yaml").write_text("system: lm\nname: other\n")

    def refused(*arguments):
        assert cli.main(["mega", *arguments]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said

    ask = lambda *more, at=store: refused("ask", at, "mill", "--run", run, *more)  # noqa: E731
    assert "no such store" in ask(at=str(tmp_path / "none"))
    assert "raise W" in ask("--budget", "16")
    assert "no gist" in ask("--budget", "160", at=str(tmp_path / "pending"))
    assert "no whole block" in ask(at=str(tmp_path / "empty"))
    assert "no such folder" in ask("--trace", str(tmp_path / "no" / "focus.npz"))
    assert "has no lens" in ask("--policy", "lens", "--budget", "160")
    assert "can use" in ask("--policy", "oracle", "--budget", "160")
    assert "cannot recall" in refused("ask", store, "mill", "--run", str(other))
    assert "no such file" in refused("trace", str(tmp_path / "missing.npz"))
    wrong = refused("label", store, "--run", run, "--policies", "nearest")
    assert "policies: nearest" in wrong
