"""A history that goes on in memory is the one that would have been stored."""

from __future__ import annotations

import numpy as np
import pytest

from latent_jax.core.errors import StoreError
from latent_jax.systems.megacontext.store import GistTree, Overlay, PendingGists, State, build
from tests.systems.megacontext.store.gist_store import (
    SMALL,
    assert_holds,
    contents,
    gists_of,
    stream,
)


@pytest.fixture
def store(tmp_path):
    """23 blocks and a part of the next."""
    path = tmp_path / "store"
    with GistTree.create(path, SMALL) as tree:
        tree.set_version("v1")
        tree.append(stream(0, 94))
        build(tree, gists_of(SMALL))
    return path


def test_it_holds_what_a_store_would(store):
    before = contents(store)
    with GistTree.open(store) as tree:
        grown = Overlay(tree)
        for start in range(94, 158, 7):
            assert grown.append(stream(start, min(start + 7, 158))) == (start, min(start + 7, 158))
            build(grown, gists_of(SMALL))
        assert_holds(grown, stream(0, 158))
        assert grown.levels == 4 and [grown.count(level) for level in (1, 2, 3)] == [39, 13, 4]
        np.testing.assert_array_equal(grown.tokens(90, 99), stream(90, 99))
        assert all((grown.state(level) == State.CURRENT).all() for level in (1, 2, 3, 4))
        assert len(tree) == 94 and tree.count(1) == 23
        with pytest.raises(StoreError, match="has 0 to 158"):
            grown.tokens(90, 159)
        with pytest.raises(StoreError, match="outside the store's vocabulary"):
            grown.append([1000])
        with pytest.raises(StoreError, match="is the store's own"):
            grown.write(1, 22, np.ones((1, 2, 3)))
        grown.append(stream(158, 166))
        with pytest.raises(PendingGists):
            grown.gists(1, 38, 2)
        grown.close()
        assert len(tree.tokens()) == 94
    assert contents(store) == before


def test_a_block_that_the_store_began_is_as_damaged_as_its_beginning(store):
    raw = bytearray((store / "ids.bin").read_bytes())
    raw[2 * 93] ^= 1
    raw[2 * 5] ^= 1
    (store / "ids.bin").write_bytes(raw)
    with GistTree.open(store) as tree:
        grown = Overlay(tree)
        grown.append(stream(94, 120))
        for start, stop in ((0, 120), (90, 93), (95, 96), (4, 95)):
            ids, damaged = grown.readable(start, stop)
            blocks = np.arange(start, stop) // SMALL.block
            np.testing.assert_array_equal(
                ids, np.where(np.isin(blocks, [1, 23]), -1, stream(start, stop))
            )
            assert damaged == [b for b in (1, 23) if b in blocks]
        assert grown.damaged == {1, 23} and grown.lost(1, 23) and not grown.lost(1, 24)
        assert build(grown, gists_of(SMALL)).skipped == [23]
        assert grown.state(2, 7, 1) == [State.PARTIAL] and grown.state(1, 1, 1) == [State.CURRENT]
