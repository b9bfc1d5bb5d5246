"""The gist tree in use: representations, refusals, readers beside a writer."""

from __future__ import annotations

import dataclasses
import doctest
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import latent_jax
from latent_jax.core.errors import StoreError
from latent_jax.systems.megacontext import store
from latent_jax.systems.megacontext.store import GistTree, State, build
from tests.systems.megacontext.store.gist_store import (
    SMALL,
    assert_holds,
    gists_of,
    stream,
)

ROOT = Path(latent_jax.__file__).parents[1]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int8"])
def test_representations(where, dtype):
    spec = dataclasses.replace(SMALL, dtype=dtype, width=64)
    gists = np.random.default_rng(0).normal(size=(7, 2, 64)).astype(np.float32)
    gists[3, 1] = 0
    with GistTree.create(where(), spec) as tree:
        tree.append(stream(0, 28))
        tree.set_version("v1")
        tree.write(1, 0, gists)
        found = tree.gists(1)
        if dtype == "int8":
            step = np.abs(gists).max(axis=2, keepdims=True) / 127
            assert found.dtype == np.float32 and tree.mapped(1)["values"].dtype == np.int8
            assert (np.abs(found - gists) <= step * 0.5001).all()
            assert not found[3, 1].any()
        else:
            wanted = gists.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
            assert found.dtype == wanted.dtype
            np.testing.assert_array_equal(found, wanted)
        gists[5, 0, 9] = np.nan
        with pytest.raises(StoreError, match="gist 5 of 7 for level 1 holds NaN"):
            tree.write(1, 0, gists)
        with pytest.raises(StoreError, match=r"\(7, 3, 64\); the store holds \[nodes, 2 slots, 64"):
            tree.write(1, 0, np.zeros((7, 3, 64)))
        if dtype == "float16":
            with pytest.raises(StoreError, match="more than float16 can"):
                tree.write(1, 0, np.full((1, 2, 64), 70000.0))


def test_wrong_ids_and_nodes_are_refused(where):
    with GistTree.create(where(), SMALL) as tree:
        tree.append(stream(0, 10))
        for wrong in ([1000], [-1], [[1]], [0.5], ["a"]):
            with pytest.raises(StoreError):
                tree.append(wrong)
        with pytest.raises(StoreError, match=r"token id 1000 \(number 2 of 3\) is outside"):
            tree.append([1, 2, 1000])
        tree.append([])
        assert len(tree) == 10
        for level, first, count in ((0, 0, 1), (1, 0, 3), (1, -1, 1), (2, 0, 1), (9, 0, 1)):
            with pytest.raises(StoreError, match="complete nodes there"):
                tree.state(level, first, count)
        with pytest.raises(StoreError, match="no gists of level 1"):
            tree.mapped(1)
        for wrong in ("", "a\nb", "x" * 200):
            with pytest.raises(StoreError, match="give a digest"):
                tree.set_version(wrong)


@pytest.mark.parametrize(
    ("field", "value"),
    [("vocab_size", 0), ("width", 0), ("slots", ()), ("slots", (0,)), ("slots", ("4",)),
     ("dtype", "int4"), ("block", 0), ("branch", 1), ("width", 1.5), ("tokenizer", "x" * 300),
     ("vocab_size", 1 << 40)],
)  # fmt: skip
def test_impossible_specs_are_refused(field, value):
    with pytest.raises(StoreError, match=field):
        dataclasses.replace(SMALL, **{field: value})


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [("tokenizer", "other", "made with tokenizer t, but other"),
     ("base", "", r"made with base b, but \(none\)"), ("width", 576, "width 3, but 576"),
     ("slots", [4], r"slots \(2, 1\), but \(4,\)"), ("block", 32, "block 4, but 32"),
     ("branch", 32, "branch 3, but 32"), ("dtype", "int8", "dtype float16, but int8"),
     ("vocab_size", 9, "vocab_size 1000, but 9")],
)  # fmt: skip
def test_a_store_of_another_spec_is_refused(where, field, value, said):
    path = where()
    GistTree.create(path, SMALL).close()
    with pytest.raises(StoreError, match=said):
        GistTree.open(path, writable=True, **{field: value})
    GistTree.open(path, writable=True, tokenizer="t", slots=[2, 1]).close()  # the lock is free
    with pytest.raises(TypeError, match="tokeniser"):
        GistTree.open(path, tokeniser="t")


def test_a_store_of_another_format_is_refused(where, monkeypatch):
    from latent_jax.systems.megacontext.store import commits

    path = where()
    monkeypatch.setattr(commits, "FORMAT", 2)
    GistTree.create(path, SMALL).close()
    monkeypatch.undo()
    with pytest.raises(StoreError, match="a store of format 2, this library reads format 1"):
        GistTree.open(path)


def test_what_is_no_store_is_refused(where):
    path = where()
    with pytest.raises(StoreError, match="no such store"):
        GistTree.open(path)
    path.mkdir()
    with pytest.raises(StoreError, match="not a store of gists"):
        GistTree.open(path, writable=True)
    assert not list(path.iterdir())
    (path / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="holds other files"):
        GistTree.create(path, SMALL)
    other = where()
    GistTree.create(other, SMALL).close()
    with pytest.raises(StoreError, match="already holds a store"):
        GistTree.create(other, SMALL)
    (path / "notes.txt").rename(other / "notes.txt")
    with (
        pytest.raises(StoreError, match=r"notes\.txt: "),
        GistTree.create(other / "notes.txt", SMALL),
    ):
        pass


def test_an_error_inside_keeps_the_last_flush(where):
    path = where()
    with pytest.raises(ZeroDivisionError), GistTree.create(path, SMALL) as tree:
        tree.append(stream(0, 10))
        tree.flush()
        tree.append(stream(10, 20))
        1 / 0  # noqa: B018
    with GistTree.open(path) as tree:
        assert len(tree) == 10
    with pytest.raises(StoreError, match="closed"):
        tree.tokens(0, 5)
    tree.close()


def test_a_reader_sees_flushes_and_is_not_blocked(where):
    path = where()
    with GistTree.create(path, SMALL) as writer:
        writer.append(stream(0, 30))
        writer.flush()
        with GistTree.open(path) as reader:
            writer.append(stream(30, 60))
            writer.set_version("v1")  # flushes
            build(writer, gists_of(SMALL))
            assert len(reader) == 30 and reader.version == ""
            np.testing.assert_array_equal(reader.tokens(), stream(0, 30))
            assert reader.refresh() and len(reader) == 60 and reader.version == "v1"
            assert (reader.state(1) == State.ABSENT).all()  # built, but not flushed
            writer.flush()
            assert reader.refresh() and not reader.refresh()
            assert_holds(reader, stream(0, 60))
            assert (reader.state(2) == State.CURRENT).all()
            changes = [
                lambda: reader.append([1]),
                lambda: reader.set_version("v2"),
                lambda: reader.write(1, 0, np.zeros((1, 2, 3))),
                reader.flush,
            ]
            for change in changes:
                with pytest.raises(StoreError, match="open for reading only"):
                    change()


def test_the_writer_imports_no_jax():
    code = (
        "import sys, tempfile, latent_jax\n"
        "from latent_jax.systems.megacontext.store import TreeSpec, build, ingest\n"
        "tree = latent_jax.GistTree.create(tempfile.mkdtemp() + '/s', TreeSpec(99, 2, block=4))\n"
        "tree.append(range(9)); tree.set_version('v')\n"
        "build(tree, lambda level, children: children[:, None, :2]); tree.close()\n"
        "print([m for m in ('jax', 'flax', 'torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_examples_run():
    for module in (store.tree, store.tokens):
        failed, tried = doctest.testmod(module)
        assert tried and not failed
