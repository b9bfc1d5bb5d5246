"""What the tests of the gist store share: small specs, a gist function, and a slow reference."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np

from latent_jax.systems.megacontext.store import GistTree, State, TreeSpec
from latent_jax.systems.megacontext.store.tokens import runs

# Deep trees of few tokens: 4 tokens a block, 3 children above.
SMALL = TreeSpec(vocab_size=1000, width=3, slots=(2, 1), block=4, branch=3, tokenizer="t", base="b")


def stream(start: int, stop: int, seed: int = 0, vocab: int = 1000) -> np.ndarray:
    """Tokens that depend on their position and the seed alone."""
    at = np.arange(start, stop, dtype=np.uint64)
    mixed = (at + np.uint64(7919 * seed + 1)) * np.uint64(0x9E3779B97F4A7C15)
    return ((mixed >> np.uint64(40)) % np.uint64(vocab)).astype(np.int32)


def gists_of(spec: TreeSpec, version: str = "v1"):
    """A gist function that every child, its place, the level and the version enter.

    Whole numbers below 1009, which all stored floats hold exactly.
    """
    salt = zlib.crc32(version.encode()) % 97

    def fn(level: int, children: np.ndarray) -> np.ndarray:
        flat = np.asarray(children, np.float64).reshape(len(children), -1).astype(np.int64)
        shape = (spec.slots_at(level), spec.width)
        outputs = np.arange(shape[0] * shape[1])
        inputs = np.arange(flat.shape[1])
        weights = (inputs[:, None] * 31 + outputs * 17 + 11 + level * 5 + salt) % 1009
        return (flat @ weights % 1009).reshape(len(flat), *shape).astype(np.float32)

    return fn


def reference(spec: TreeSpec, ids: np.ndarray, version: str = "v1") -> dict[int, np.ndarray]:
    """All gists of a history, one node after the other."""
    fn = gists_of(spec, version)
    found: dict[int, np.ndarray] = {}
    level, below, width = 1, np.asarray(ids), spec.block
    while len(below) >= width:
        nodes = [fn(level, below[i : i + width][None])[0] for i in _starts(below, width)]
        found[level] = below = np.stack(nodes)
        level, width = level + 1, spec.branch
    return found


def _starts(below: np.ndarray, width: int) -> range:
    return range(0, len(below) // width * width, width)


def assert_holds(tree: GistTree, ids: np.ndarray, version: str = "v1") -> None:
    """The tree's tokens are `ids`, and every gist it calls current is the right one."""
    np.testing.assert_array_equal(tree.tokens(), ids)
    for level, gists in reference(tree.spec, ids, version).items():
        state = tree.state(level)
        assert len(state) == len(gists)
        for first, count in runs(np.flatnonzero(state == State.CURRENT)):
            found = tree.gists(level, first, count)
            np.testing.assert_array_equal(found, gists[first : first + count])


def contents(path: Path) -> dict[str, bytes]:
    """Bytes of the files that hold the history and its gists."""
    kept = ("ids.bin", "ids.crc", "level")
    return {p.name: p.read_bytes() for p in sorted(path.iterdir()) if p.name.startswith(kept)}
