"""A stretch of a history as a history of its own."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int32

from latent_jax.core.errors import StoreError
from latent_jax.systems.megacontext.store.tree import GistTree


class Stretch:
    """What reads a `GistTree` sees of it when the history begins at a later block.

    Args:
      tree: the whole history.
      first: block that is the first one here.
      top: highest level of nodes that are read; ``first`` must begin a node of it.

    Raises:
      StoreError: it begins none.
    """

    def __init__(self, tree: GistTree, first: int, top: int):
        if first % tree.spec.blocks_in(top):
            raise StoreError(f"{tree.path}: block {first} begins no node of level {top}")
        self.tree, self.first = tree, first
        self.path, self.spec, self.version = tree.path, tree.spec, tree.version

    def __len__(self) -> int:
        return max(len(self.tree) - self.first * self.spec.block, 0)

    def tokens(self, start: int, stop: int) -> Int32[np.ndarray, " n"]:
        """As `GistTree.tokens`."""
        shift = self.first * self.spec.block
        return self.tree.tokens(start + shift, stop + shift)

    def readable(self, start: int, stop: int) -> tuple[Int32[np.ndarray, " n"], list[int]]:
        """As `GistTree.readable`."""
        shift = self.first * self.spec.block
        ids, damaged = self.tree.readable(start + shift, stop + shift)
        return ids, [block - self.first for block in damaged]

    @property
    def damaged(self) -> set[int]:
        """As `GistTree.damaged`."""
        return {block - self.first for block in self.tree.damaged if block >= self.first}

    def lost(self, level: int, node: int) -> bool:
        """As `GistTree.lost`."""
        return self.tree.lost(level, node + self.first // self.spec.blocks_in(level))

    def gists(self, level: int, first: int, count: int) -> Float[np.ndarray, "n slots width"]:
        """As `GistTree.gists`."""
        return self.tree.gists(level, first + self.first // self.spec.blocks_in(level), count)
