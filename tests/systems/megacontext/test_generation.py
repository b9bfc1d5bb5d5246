"""Generating while the history grows: a working context that keeps its size, block by block."""

from __future__ import annotations

import copy
import dataclasses
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from latent_jax import backbones, cli
from latent_jax.backbones import generate
from latent_jax.core.errors import ConfigError
from latent_jax.systems.megacontext import allocator, working
from latent_jax.systems.megacontext.layout import Layout
from latent_jax.systems.megacontext.memory import Memory
from latent_jax.systems.megacontext.model_config import GistConfig, ModelConfig
from latent_jax.systems.megacontext.runtime import Runtime, RuntimeConfig
from latent_jax.systems.megacontext.store import GistTree
from latent_jax.systems.megacontext.working import WorkingContext

LAYOUT = Layout(block=8, branching=4, slots=(2, 4), protected=1)
MODEL = ModelConfig(layout=LAYOUT, gist=GistConfig(reads=2, window=4))
BUDGET = 64


@pytest.fixture(scope="module")
def base():
    """The tiny reader without ids that end a text, so that it says as much as is asked for."""
    found = backbones.load("tiny")
    tokenizer = copy.copy(found.tokenizer)
    tokenizer.stop_ids = ()
    return dataclasses.replace(found, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def params(base, untrained):
    return untrained(base, MODEL)


@pytest.fixture(scope="module")
def ids(base):
    return np.random.default_rng(0).integers(10, base.config.vocab_size, 21 * 8 + 3)


@pytest.fixture(scope="module")
def store(base, params, ids, tmp_path_factory):
    path = tmp_path_factory.mktemp("generation") / "store"
    with Memory.open(path, base, MODEL, params, "one", writable=True) as memory:
        memory.tree.append(ids)
        memory.build()
    return path


@pytest.fixture
def memory(store, base, params):
    with Memory.open(store, base, MODEL, params, "one") as memory:
        yield memory


def test_raw_in_one_window_it_says_what_the_base_says(base, params, ids, tmp_path, watched):
    """The exact condition: all blocks stay raw, and all text stands in one window of the encoder
    and nearer than `Memory.far`. Entries are then the keys and values of the text itself.
    """
    model = dataclasses.replace(MODEL, gist=dataclasses.replace(MODEL.gist, window=16))
    with Memory.open(tmp_path / "s", base, model, params, "x", writable=True) as memory:
        memory.tree.append(ids[:43])
        memory.build()
        answer = Runtime(memory, RuntimeConfig(200, "recency")).generate(ids[43:60], 40)
        plain = memory.continued(None, ids[:60], 0, 0, 40)
    assert len(answer.refocuses) == 5 and all(r.entries for r in answer.refocuses)
    assert [len(nodes) for nodes, _ in watched] == [7, 8, 9, 10, 11]
    assert all(level == 0 for nodes, _ in watched for level, _ in nodes)
    assert plain == answer.text and len(set(answer.ids.tolist())) > 4


@pytest.mark.parametrize("policy", ["bm25", "recency", "attention"])
def test_the_context_keeps_its_size_and_is_edited_where_it_changes(memory, ids, watched, policy):
    runtime = Runtime(memory, RuntimeConfig(BUDGET, policy))
    answer = runtime.generate(ids[50:75], 40)
    assert len(answer.ids) == 40 and len(watched) == len(answer.refocuses) == 5
    assert len(memory.tree) == len(ids) and runtime.tree is memory.tree  # forgotten
    for before, (nodes, edit) in zip([answer.nodes, *(n for n, _ in watched)], watched,
                                     strict=False):  # fmt: skip
        new = [node for node in nodes if node not in before]
        assert edit.entries == sum(int(LAYOUT.costs[level]) for level, _ in new) > 0
        assert 0 <= edit.first < 1
    assert set(answer.seconds) == {"ingest", "focus", "allocate", "read", "refocus", "decode"}
    assert all(seconds > 0 for seconds in answer.seconds.values())
    spent = sum(r.seconds for r in answer.refocuses)
    assert spent == pytest.approx(answer.seconds["refocus"])
    # What the focus did before and while it moved is one history.
    assert runtime.history.count.shape[0] >= 5


def test_nothing_is_compiled_from_block_to_block(memory, ids):
    runtime = Runtime(memory, RuntimeConfig(BUDGET, "bm25"))

    def sizes():
        compiled = (
            memory._begin, memory._make, memory._encode, runtime._score, generate._go_on,
            working._scatter, allocator._refocus,
        )  # fmt: skip
        return [program._cache_size() for program in compiled]

    runtime.generate(ids[50:60], 30)
    before = sizes()
    answer = runtime.generate(ids[50:60], 72)
    assert len(answer.refocuses) == 9 and sizes() == before


def test_what_is_kept_is_what_was_said(store, base, params, ids, tmp_path):
    path = shutil.copytree(store, tmp_path / "s")
    with Memory.open(path, base, MODEL, params, "one", append=True) as memory:
        runtime = Runtime(memory, RuntimeConfig(BUDGET, "bm25"))
        forgotten = runtime.generate(ids[50:60], 20)
        kept = runtime.generate(ids[50:60], 20, keep=True)
    np.testing.assert_array_equal(kept.ids, forgotten.ids)
    text = np.concatenate([ids, ids[50:60], kept.ids])
    with Memory.open(tmp_path / "t", base, MODEL, params, "one", writable=True) as bulk:
        bulk.tree.append(text)
        bulk.build()
        with GistTree.open(path) as tree:
            np.testing.assert_array_equal(tree.tokens(), text)
            for level in (1, 2):
                count = tree.count(level) - len(tree.pending(level))
                assert count >= (len(text) - 8) // 8 // 4 ** (level - 1)
                np.testing.assert_array_equal(
                    tree.gists(level, 0, count), bulk.tree.gists(level, 0, count)
                )


def test_what_it_cannot_hold_to_the_end_is_said_at_once(memory, ids, monkeypatch):
    monkeypatch.setattr(Runtime, "settle", lambda *_, **__: 1 / 0)
    least = int(Runtime(memory, RuntimeConfig(48)).start(21).count)
    assert least
    with pytest.raises(ConfigError, match="raise W"):
        Runtime(memory, RuntimeConfig(40, "recency")).generate(ids[:5], 4000)
    with pytest.raises(ConfigError, match="at least 1"):
        Runtime(memory, RuntimeConfig(48)).generate(ids[:5], 0)


def test_edits_reuse_what_is_free(memory):
    context = WorkingContext(memory, 24)
    context.edit([(1, 0), (0, 1)], 16)
    assert context.edit([(1, 0), (1, 1), (0, 2)], 24) == (2 / 12, 10)
    assert context._there.sum() == 12
    assert context.edit([(1, 0), (1, 1), (0, 2)], 24) == (1.0, 0)
    at, there = context.placed(24)
    assert sorted(at[there].tolist()) == [1, 5, 9, 13, *range(16, 24)]
    found = memory.gather([(1, 0), (1, 1), (0, 2)], 24)
    slots = [s for node in context.nodes for s in context._slots[node]]
    np.testing.assert_array_equal(context.held["k"][:, 0, slots], found.held["k"])
    assert isinstance(context.held["v"], jnp.ndarray)


def test_a_long_answer_by_command(trained, tmp_path):
    run, store, _ = trained
    path = shutil.copytree(store, tmp_path / "s")
    with GistTree.open(path) as tree:
        before = len(tree)

    def ask(*more):
        return CliRunner().invoke(cli.app, [
            "mega", "ask", str(path), "The mill burned", "--run", run, "--budget", "160",
            "--max-new-tokens", "128", "--trace", str(tmp_path / "focus.npz"), *more,
        ])  # fmt: skip

    asked = ask()
    assert asked.exit_code == 0, asked.output
    assert "first edit at" in asked.output and "ingest" in asked.output
    with GistTree.open(path) as tree:
        assert len(tree) == before
    focus, page = (str(tmp_path / f"focus.{kind}") for kind in ("npz", "html"))
    made = CliRunner().invoke(cli.app, ["mega", "trace", focus, "--html", page])
    assert made.exit_code == 0, made.output
    assert ask("--append").exit_code == 0
    with GistTree.open(path) as tree:
        assert len(tree) > before + 100 and tree.verify().ok


def test_damaged_blocks_are_named_by_command(trained, tmp_path):
    run, store, _ = trained
    path = shutil.copytree(store, tmp_path / "s")
    raw = bytearray((path / "ids.bin").read_bytes())
    for block in (5, 6):
        raw[2 * (block * LAYOUT.block + 1)] ^= 1
    (path / "ids.bin").write_bytes(raw)
    asked = CliRunner().invoke(cli.app, [
        "mega", "ask", str(path), "The mill burned", "--run", run, "--budget", "160",
        "--max-new-tokens", "4",
    ])  # fmt: skip
    assert asked.exit_code == 0, asked.output
    assert "damaged blocks are left out: 5, 6" in asked.output
