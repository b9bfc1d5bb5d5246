"""Bit flips and truncation at any place: found, reported, and the rest stays usable."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from latent_jax.core.errors import StoreError
from latent_jax.systems.megacontext.store import (
    DamagedGists,
    DamagedTokens,
    GistTree,
    State,
    build,
)
from tests.systems.megacontext.store.gist_store import (
    SMALL,
    assert_holds,
    contents,
    gists_of,
    stream,
)

TOKENS = 158  # 39 blocks and a tail of 2


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A store with documents, four levels, and a tail."""
    path = tmp_path_factory.mktemp("damage") / "whole"
    with GistTree.create(path, SMALL) as tree:
        tree.set_version("v1")
        tree.add_document("a.txt", "0" * 64, stream(0, 50))
        tree.add_document("b/ü.txt", "1" * 64, stream(50, TOKENS))
        build(tree, gists_of(SMALL))
    return path


@pytest.fixture
def copy(whole, tmp_path):
    """A fresh copy at every call."""
    made = iter(range(10**6))

    def fresh() -> Path:
        path = tmp_path / f"copy{next(made)}"
        shutil.copytree(whole, path)
        return path

    return fresh


NAMES = ("ids.bin", "ids.crc", "level1.bin", "level1.head", "level2.bin", "level2.head",
         "level4.bin", "level4.head", "commit.bin", "meta.json", "documents.jsonl",
         "versions.jsonl")  # fmt: skip


@given(name=st.sampled_from(NAMES), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@example("ids.bin", 0.999, 0)  # the tail, which has no block checksum
@example("commit.bin", 0.0, 0)
@example("commit.bin", 0.5, 3)
def test_a_flipped_bit_is_found_and_the_rest_usable(whole, tmp_path_factory, name, where, bit):
    path = tmp_path_factory.mktemp("flip") / "store"
    shutil.copytree(whole, path)
    data = bytearray((path / name).read_bytes())
    at = int(where * len(data))
    data[at] ^= 1 << bit
    (path / name).write_bytes(data)
    _check(whole, path)


@given(name=st.sampled_from(NAMES), kept=st.floats(0, 1, exclude_max=True))
@example("ids.bin", 0.0)
@example("level1.head", 0.0)
@example("meta.json", 0.0)
def test_a_truncated_file_is_found_and_the_rest_usable(whole, tmp_path_factory, name, kept):
    path = tmp_path_factory.mktemp("cut") / "store"
    shutil.copytree(whole, path)
    data = (path / name).read_bytes()
    (path / name).write_bytes(data[: int(kept * len(data))])
    if name == "commit.bin" and kept < 0.4:
        # cut into its padding, the first copy can still be read
        try:
            GistTree.open(path).close()
        except StoreError as error:
            assert "both commit records are damaged" in str(error)
            return
    _check(whole, path)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_found_and_the_rest_usable(whole, copy, name):
    path = copy()
    (path / name).unlink()
    if name == "commit.bin":
        with pytest.raises(StoreError, match=r"commit\.bin is missing"):
            GistTree.open(path, writable=True)
        return
    _check(whole, path)


def _check(whole: Path, path: Path) -> None:
    ids = stream(0, TOKENS)
    with GistTree.open(path) as tree:
        _read_all(tree, ids)
    with GistTree.open(path) as tree:
        report = tree.verify()
        assert not report.ok and report.lines()
        assert len(tree) == TOKENS
        bad = [t for start, stop in report.tokens for t in range(start, stop)]
        for token in set(range(TOKENS)) - set(bad):
            assert tree.tokens(token, token + 1) == ids[token]
        if bad:
            with pytest.raises(DamagedTokens) as caught:
                tree.tokens()
            assert caught.value.spans == report.tokens
            return
        assert_holds(tree, ids)
        for level, nodes in report.nodes.items():
            assert set(nodes) <= set(tree.pending(level).tolist())
        assert {d.path for d in tree.documents} <= {"a.txt", "b/ü.txt"}
    # The writer mends what can be made again.
    with GistTree.open(path, writable=True) as tree:
        tree.verify()
        if tree.version in tree.versions:
            build(tree, gists_of(SMALL))
    with GistTree.open(path) as tree:
        assert_holds(tree, ids)
        if "ids.crc" in contents(path) and not tree.verify().problems:
            assert contents(path) == contents(whole)


def _read_all(tree: GistTree, ids: np.ndarray) -> None:
    """Without `verify`: whatever is read is right, or raises."""
    for block in range(len(ids) // SMALL.block):
        span = slice(block * SMALL.block, (block + 1) * SMALL.block)
        try:
            np.testing.assert_array_equal(tree.tokens(span.start, span.stop), ids[span])
        except DamagedTokens as error:
            assert error.spans == [(span.start, span.stop)]
    for level in range(1, tree.levels + 1):
        for node in range(tree.count(level)):
            try:
                tree.gists(level, node, 1)
            except StoreError:
                assert tree.state(level, node, 1) != State.CURRENT
                assert node in tree.pending(level)
    try:
        assert_holds(tree, ids)
    except DamagedTokens:
        pass


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 16
    path.write_bytes(data)


def test_build_makes_a_damaged_child_again_before_its_parent(copy):
    path = copy()
    with GistTree.open(path, writable=True) as tree:
        tree.set_version("v2")
        assert build(tree, gists_of(SMALL, "v2"), under=(1, 0, 39)).nodes == {1: 39}
    _flip(path / "level1.bin", 5 * SMALL.record(1).itemsize)
    with GistTree.open(path, writable=True) as tree:
        assert not len(tree.pending(1))  # nobody has looked yet
        assert build(tree, gists_of(SMALL, "v2")).nodes == {1: 1, 2: 13, 3: 4, 4: 1}
        assert_holds(tree, stream(0, TOKENS), "v2")
        assert tree.verify().ok


def test_what_is_made_beside_damaged_tokens_is_made_again_once_they_are_repaired(copy):
    """Block 7 is damaged: what is above it is partial, of use, and no more current than that."""
    path = copy()
    at = 2 * (7 * SMALL.block + 1)
    _flip(path / "ids.bin", at)
    with GistTree.open(path, writable=True) as tree:
        tree.set_version("v2")
        assert build(tree, gists_of(SMALL, "v2"), batch=4).skipped == [7]
        again = build(tree, gists_of(SMALL, "v2"), batch=4)
        assert again.nodes == {} and again.skipped == [7]
        assert tree.pending(1).tolist() == [7]
        assert tree.pending(2).tolist() == [2] and tree.pending(3).tolist() == [0]
        for level, node in ((2, 2), (3, 0), (4, 0)):
            assert tree.state(level, node, 1) == [State.PARTIAL]
        # The nearest sound sibling stands in for block 7.
        below = tree.gists(1, 6, 1)[0], tree.gists(1, 6, 1)[0], tree.gists(1, 8, 1)[0]
        made = gists_of(SMALL, "v2")(2, np.stack(below)[None])
        np.testing.assert_array_equal(tree.gists(2, 2, 1), made)
        assert tree.made_by(2)[1] == (2, 1, "v2 without damaged tokens")
        assert tree.lost(1, 7) and not tree.lost(2, 2) and not tree.lost(1, 6)
        with pytest.raises(DamagedTokens, match="tokens 28 to 32 are damaged"):
            tree.tokens(20, 60)
        np.testing.assert_array_equal(tree.tokens(32, 60), stream(32, 60))
        ids, damaged = tree.readable(22, 38)
        assert damaged == [7] and tree.damaged == {7}
        known = np.where(np.arange(22, 38) // 4 == 7, -1, stream(22, 38))
        np.testing.assert_array_equal(ids, known)
    _flip(path / "ids.bin", at)
    with GistTree.open(path, writable=True) as tree:
        assert build(tree, gists_of(SMALL, "v2"), batch=4).nodes == {1: 1, 2: 1, 3: 1, 4: 1}
        assert_holds(tree, stream(0, TOKENS), "v2")
        assert not any(len(tree.pending(level)) for level in range(1, 5))


def test_blocks_read_behind_damaged_ones_or_behind_another_text(copy):
    """Windows of four blocks with a lead of two: what a block may not be read behind is -1."""
    path, size = copy(), SMALL.block
    _flip(path / "ids.bin", 2 * (9 * size + 1))
    _flip(path / "ids.bin", 2 * (15 * size + 1))
    calls = {}

    def seen(level, children):
        if level == 1:
            found = np.asarray(children).reshape(-1, size)
            assert len(found) == 6
            calls[len(calls)] = found
            return np.zeros((4, 2, 3), np.float32)
        return gists_of(SMALL, "v2")(level, children)

    options = {"batch": 4, "neighbours": True, "lead": 2}
    with GistTree.open(path, writable=True) as tree:
        tree.set_version("v2")
        built = build(tree, seen, **options, breaks=[24], top=1)
        state = tree.state(1)
    assert built.skipped == [9, 15]
    # Blocks 10 and 11 behind 9, 12 to 14 with 10 and 11 as lead, 16 to 19 behind 15.
    partial = [10, 11, 16, 17, 18, 19]
    assert np.flatnonzero(state == State.PARTIAL).tolist() == partial
    assert np.flatnonzero(state < State.PARTIAL).tolist() == [9, 15]
    rows = list(calls.values())
    text = stream(0, TOKENS)[: 39 * size].reshape(-1, size)
    blank = lambda n: np.full((n, size), -1)  # noqa: E731
    np.testing.assert_array_equal(rows[0], [*blank(2), *text[:4]])
    np.testing.assert_array_equal(rows[2], [*text[6:9], *np.zeros((3, size), int)])
    np.testing.assert_array_equal(rows[3], [*blank(4), *text[10:12]])
    np.testing.assert_array_equal(rows[4], [*text[10:15], *np.zeros((1, size), int)])
    np.testing.assert_array_equal(rows[5], [*blank(2), *text[16:20]])
    np.testing.assert_array_equal(rows[7], [*blank(2), *text[24:28]])  # another text begins
    np.testing.assert_array_equal(rows[8], text[26:32])
    with GistTree.open(path, writable=True) as tree:
        with pytest.raises(StoreError, match="begins at block 25, within a batch of 4"):
            build(tree, seen, **options, breaks=[25])


def test_a_reader_names_damaged_gists_and_a_writer_forgets_them(copy):
    path = copy()
    for node in (3, 4, 9):
        _flip(path / "level1.bin", node * SMALL.record(1).itemsize + 2)
    with GistTree.open(path) as reader:
        with pytest.raises(DamagedGists, match="level 1, nodes 3 to 4, 9: damaged") as caught:
            reader.gists(1)
        assert caught.value.nodes == [3, 4, 9] == reader.pending(1).tolist()
        assert not reader.refresh()
    with GistTree.open(path, writable=True) as tree:
        assert tree.verify().nodes == {1: [3, 4, 9]}
        assert tree.verify().ok  # gone now: pending
    with GistTree.open(path) as reader:
        assert reader.pending(1).tolist() == [3, 4, 9]


def test_a_gist_in_anothers_place_is_found(copy):
    path = copy()
    for name, size in (("level1.bin", SMALL.record(1).itemsize), ("level1.head", 8)):
        data = bytearray((path / name).read_bytes())
        data[:size] = data[size : 2 * size]
        (path / name).write_bytes(data)
    with GistTree.open(path) as tree:
        assert tree.verify().nodes == {1: [0]}


def test_the_writer_restores_the_description(copy):
    path = copy()
    before = (path / "meta.json").read_bytes()
    (path / "meta.json").write_text("{")
    _flip(path / "commit.bin", 20)
    with GistTree.open(path) as tree:
        assert len(tree.problems) == 2
    GistTree.open(path, writable=True).close()
    assert (path / "meta.json").read_bytes() == before
    with GistTree.open(path) as tree:
        assert tree.verify().ok and len(tree) == TOKENS
