"""The gist tree as it grows: coverage, counts, streamed = bulk, versions, flat size."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latent_jax.core.errors import StoreError
from latent_jax.systems.megacontext.store import GistTree, PendingGists, State, TreeSpec, build
from tests.systems.megacontext.store.gist_store import (
    SMALL,
    assert_holds,
    contents,
    gists_of,
    reference,
    stream,
)


@given(
    pieces=st.lists(st.integers(0, 40), max_size=12),
    builds=st.integers(0, 2**12 - 1),
    batch=st.sampled_from([1, 4, 32]),
    block=st.integers(1, 5),
    branch=st.integers(2, 4),
)
def test_streamed_is_bulk_is_the_reference(tmp_path_factory, pieces, builds, batch, block, branch):
    folder = tmp_path_factory.mktemp("tree")
    spec = dataclasses.replace(SMALL, block=block, branch=branch)
    ids = stream(0, sum(pieces))
    with GistTree.create(folder / "streamed", spec) as tree:
        tree.set_version("v1")
        at = 0
        for i, count in enumerate(pieces):
            assert tree.append(ids[at : at + count]) == (at, at + count)
            at += count
            if builds >> i & 1:
                build(tree, gists_of(spec), batch=batch)
            if builds >> i & 3 == 3:
                tree.flush()
        build(tree, gists_of(spec), batch=batch)
    with GistTree.create(folder / "bulk", spec) as bulk:
        bulk.set_version("v1")
        bulk.append(ids)
        build(bulk, gists_of(spec), batch=batch)
    assert contents(folder / "streamed") == contents(folder / "bulk")
    with GistTree.open(folder / "streamed") as tree:
        expected = reference(spec, ids)
        assert len(tree) == len(ids) and tree.levels == len(expected)
        for level, gists in expected.items():
            np.testing.assert_array_equal(tree.gists(level), gists)
            np.testing.assert_array_equal(tree.mapped(level), gists)
            assert not len(tree.pending(level))
        np.testing.assert_array_equal(tree.tokens(), ids)
        assert tree.verify().ok


@given(tokens=st.integers(0, 700), level=st.integers(0, 6))
def test_every_level_covers_every_block_once(tmp_path_factory, tokens, level):
    with GistTree.create(tmp_path_factory.mktemp("tree") / "s", SMALL) as tree:
        tree.append(stream(0, tokens))
        blocks = tokens // SMALL.block
        assert tree.count(0) == tree.count(1) == blocks
        for at in range(1, tree.levels + 1):
            width = SMALL.block * SMALL.branch ** (at - 1)
            assert tree.count(at) == tokens // width >= 1
            assert [tree.span(at, i) for i in range(tree.count(at))] == [
                (i * width, (i + 1) * width) for i in range(tree.count(at))
            ]
        assert tree.count(tree.levels + 1) == 0
        covered = []
        for at, first, count in tree.cover(level):
            assert at <= level
            for node in range(first, first + count):
                covered += range(*tree.span(at, node))
        assert covered == list(range(blocks * SMALL.block))


@given(start=st.integers(0, 103), count=st.integers(0, 103), vocab=st.sampled_from([1000, 70000]))
def test_any_span_of_tokens_is_read(tmp_path_factory, start, count, vocab):
    spec = dataclasses.replace(SMALL, vocab_size=vocab)
    ids = stream(0, 103, vocab=vocab)
    with GistTree.create(tmp_path_factory.mktemp("tree") / "s", spec) as tree:
        for a, b in ((0, 1), (1, 2), (2, 7), (7, 8), (8, 103)):
            tree.append(ids[a:b])
        stop = min(start + count, 103)
        np.testing.assert_array_equal(tree.tokens(start, stop), ids[start:stop])
        with pytest.raises(StoreError, match="the history has 0 to 103"):
            tree.tokens(start, 104)
        assert (tree.path / "ids.bin").stat().st_size >= 103 * (2 if vocab == 1000 else 4)


def test_33_gists_for_1024_tokens(where):
    spec = TreeSpec(vocab_size=1000, width=2)
    calls = []

    def fn(level, children):
        calls.append(level)
        assert children.shape == ((1, 32) if level == 1 else (1, 32, 1, 2))
        return gists_of(spec)(level, children)

    with GistTree.create(where(), spec) as tree:
        tree.set_version("v1")
        for start in range(0, 1024, 8):
            tree.append(stream(start, start + 8))
            build(tree, fn, batch=1)
    assert len(calls) == 33 and calls.count(2) == 1 and calls[-1] == 2


def test_a_jitted_gist_function_streams_bit_for_bit(where):
    import jax
    import jax.numpy as jnp

    spec = TreeSpec(vocab_size=1000, width=24, slots=(2, 3), block=8, branch=4, dtype="bfloat16")
    table = jax.random.normal(jax.random.key(0), (1000, 24))
    maps = {k: jax.random.normal(jax.random.key(k), (24, 24 * spec.slots_at(k))) for k in (1, 2)}

    @jax.jit
    def made(rows, weights):
        return jnp.tanh(rows.mean(1) @ weights).astype(jnp.bfloat16)

    def fn(level, children):
        rows = table[children] if level == 1 else children.reshape(len(children), -1, 24)
        out = made(rows, maps[min(level, 2)])
        return out.reshape(len(children), spec.slots_at(level), 24)

    ids = stream(0, 8 * 37)
    streamed, bulk = where(), where()
    with GistTree.create(streamed, spec) as tree:
        tree.set_version("v1")
        for start in range(0, len(ids), 24):
            tree.append(ids[start : start + 24])
            build(tree, fn, batch=16)
        assert tree.gists(2).dtype == ml_dtypes.bfloat16 and tree.gists(2).any()
    with GistTree.create(bulk, spec) as tree:
        tree.set_version("v1")
        tree.append(ids)
        build(tree, fn, batch=16)
    assert contents(streamed) == contents(bulk)


def test_gists_of_another_version_are_stale_and_built_again(where):
    path, ids = where(), stream(0, 150)
    with GistTree.create(path, SMALL) as tree:
        tree.set_version("v1")
        tree.append(ids[:100])
        build(tree, gists_of(SMALL))
    with GistTree.open(path, writable=True) as tree:
        old = tree.gists(1)
        tree.set_version("v2")
        tree.append(ids[100:])
        assert tree.pending(1).tolist() == list(range(37)) and len(tree.pending(2)) == 12
        with pytest.raises(PendingGists, match="nodes 0 to 24: no gist of the current version"):
            tree.gists(1, 0, 25)
        np.testing.assert_array_equal(tree.gists(1, 0, 25, stale=True), old)
        with pytest.raises(PendingGists, match="nodes 25 to 36: no gist;"):
            tree.gists(1, stale=True)
        # lazily: first what is under one node, then so many at a time
        made = build(tree, gists_of(SMALL, "v2"), under=(3, 1, 1))
        assert made.nodes == {1: 9, 2: 3, 3: 1}
        assert_holds(tree, ids, "v2")
        assert tree.made_by(2) == [(0, 3, "v1"), (3, 3, "v2"), (6, 2, "v1"), (8, 4, "")]
        assert sum(build(tree, gists_of(SMALL, "v2"), limit=5).nodes.values()) == 5
        build(tree, gists_of(SMALL, "v2"))
        assert all(not len(tree.pending(level)) for level in range(1, 5))
        assert_holds(tree, ids, "v2")
        assert (tree.state(4) == State.CURRENT).all() and len(tree.state(4)) == 1
        tree.set_version("v1")  # the older model again: nothing of it is left
        assert (tree.state(1) == State.STALE).all() and tree.versions == ["v1", "v2"]


def test_a_parent_is_made_after_its_children(where):
    with GistTree.create(where(), SMALL) as tree:
        tree.append(stream(0, 100))
        with pytest.raises(StoreError, match="call set_version first"):
            tree.write(1, 0, np.zeros((1, 2, 3)))
        tree.set_version("v1")
        tree.write(1, 0, np.zeros((2, 2, 3)))
        with pytest.raises(PendingGists, match="level 1, nodes 2: no gist of the current version"):
            tree.write(2, 0, np.zeros((1, 1, 3)))
        assert build(tree, gists_of(SMALL)).nodes == {1: 23, 2: 8, 3: 2}


def test_build_tells_its_progress_and_refuses_what_cannot_be(where):
    told = []
    with GistTree.create(where(), SMALL) as tree:
        tree.append(stream(0, 100))
        with pytest.raises(StoreError, match="call set_version first"):
            build(tree, gists_of(SMALL))
        tree.set_version("v1")
        with pytest.raises(StoreError, match="batch=0"):
            build(tree, gists_of(SMALL), batch=0)
        with pytest.raises(StoreError, match=r"shape \(3, 2, 3\) for a batch of 4"):
            build(tree, lambda level, children: np.zeros((3, 2, 3)), batch=4)
        with pytest.raises(StoreError, match=r"\(4, 9, 3\); the store holds \[nodes, 2 slots, 3"):
            build(tree, lambda level, children: np.zeros((4, 9, 3)), batch=4)
        assert (tree.state(1) == State.ABSENT).all()
        build(tree, gists_of(SMALL), batch=10, progress=lambda *made: told.append(made))
    assert told == [(1, 10), (1, 10), (1, 5), (2, 8), (3, 2)]


def test_bytes_per_token_are_flat_from_10k_to_1m(where):
    path = where()
    spec = TreeSpec(vocab_size=49152, width=16, slots=(1, 4))
    sizes = {}
    for tokens in (10_240, 102_400, 1_024_000):
        with GistTree.open(path, writable=True) if sizes else GistTree.create(path, spec) as tree:
            tree.set_version("v1")
            for start in range(len(tree), tokens, 10_240):
                tree.append(stream(start, start + 10_240, vocab=49152))
                build(tree, lambda level, c: np.full((32, spec.slots_at(level), 16), level))
            wanted = sum(tree.sizes().values())
        sizes[tokens] = sum(p.stat().st_size for p in path.iterdir())
        assert sizes[tokens] - wanted < 1024  # meta.json and the lock: preallocation is given back
    a, b, c = sizes
    early, late = (sizes[b] - sizes[a]) / (b - a), (sizes[c] - sizes[b]) / (c - b)
    ideal = 2 + 4 / 32 + (32 + 8) / 32 + (128 + 8) / 1024
    assert late == pytest.approx(early, rel=0.02) and late == pytest.approx(ideal, rel=0.02)
