"""What a lens sees of a stored history: a vector for every node, read from the stored gists.

A node's vector is the mean over its slots (or its heads' entries) of the values in a few layers of
the base, each layer at unit root mean square. A raw block shows the gist that would stand for it,
so that all levels look alike and nothing has to be encoded for a look.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from latent_jax.backbones.config import DecoderConfig
from latent_jax.systems.megacontext.layout import Layout
from latent_jax.systems.megacontext.lens import TAIL_GISTS, LensNet, Tail
from latent_jax.systems.megacontext.model_config import LensConfig
from latent_jax.systems.megacontext.store import GistTree, Stretch

Node = tuple[int, int]  # level, index
_KEPT = 1 << 14  # vectors
_HEAVIEST = 40.0  # logarithm of a weight; a damaged one must not overflow


def lens_net(config: LensConfig, layout: Layout) -> LensNet:
    """The lens of a configuration."""
    return LensNet(
        layout.levels, config.width, config.heads, config.stacks, config.causal, config.words
    )


def sight_width(base: DecoderConfig, config: LensConfig) -> int:
    """Numbers in a node's vector."""
    return len(_layers(base, config)) * base.num_kv_heads * base.head_dim


class Look:
    """Vectors of gists as they are stored. NumPy alone: reading threads call it.

    Args:
      base: architecture of the model whose keys and values they are.
      config: of the lens.
      counts: entries of every head by level, of gists of single heads' entries; none: a record is
        a slot (`records.to_records`).
    """

    def __init__(
        self, base: DecoderConfig, config: LensConfig,
        counts: Mapping[int, Int[np.ndarray, "l g"]] | None = None,
    ):  # fmt: skip
        self.base, self.config, self.counts = base, config, counts
        self.width = sight_width(base, config)

    def __call__(
        self, records: Float[np.ndarray, "n s w"], level: int
    ) -> Float[np.ndarray, "n f"]:
        """Mean values of a few layers, each at unit root mean square."""
        base, layers = self.base, _layers(self.base, self.config)
        n, s, _ = records.shape
        records = np.asarray(records, np.float32)
        if self.counts is None:
            both = records.reshape(n, s, base.num_layers, 2, -1)
            mean = both[:, :, layers, 1].mean(1)
        else:
            found = _head_means(records.reshape(n, -1), self.counts[level], base.head_dim)
            mean = found[:, layers].reshape(n, len(layers), -1)
        scale = np.sqrt(np.mean(mean**2, axis=-1, keepdims=True))
        return (mean / np.maximum(scale, 1e-6)).reshape(n, -1)


def _head_means(
    packed: Float[np.ndarray, "n e"], counts: Int[np.ndarray, "l g"], d: int
) -> Float[np.ndarray, "n l g d"]:
    """Mean value of every head's entries, each with its weight; 0 of a head that has none."""
    flat = counts.reshape(-1)
    entries = packed[:, : flat.sum() * (2 * d + 1)].reshape(len(packed), -1, 2 * d + 1)
    weight = np.exp(np.minimum(entries[..., -1:], _HEAVIEST))
    heads = np.repeat(np.arange(flat.size), flat)
    sums = np.zeros((len(packed), flat.size, d + 1), np.float32)
    np.add.at(
        sums, (slice(None), heads),
        np.concatenate([weight * entries[..., d:-1], weight], axis=-1),
    )  # fmt: skip
    mean = sums[..., :-1] / np.maximum(sums[..., -1:], 1e-6)
    return mean.reshape(len(packed), *counts.shape, d)


class Sight:
    """Looks at one tree; vectors that were looked at are kept.

    Args:
      tree: its gists must be built.
      look: what it makes of a gist.
    """

    def __init__(self, tree: GistTree | Stretch, look: Look):
        self.tree, self.look = tree, look
        self._seen: dict[Node, Float[np.ndarray, " f"]] = {}

    @property
    def width(self) -> int:
        """Numbers in a vector."""
        return self.look.width

    def nodes(self, nodes: Sequence[Node]) -> Float[np.ndarray, "n f"]:
        """Vectors of some nodes; zeros of those whose tokens are damaged and that have no gist.

        Raises:
          PendingGists: gists are not there that could be.
        """
        if len(self._seen) > _KEPT:
            self._seen.clear()
        found = np.zeros((len(nodes), self.width), np.float32)
        for i, (level, index) in enumerate(nodes):
            key = (max(level, 1), index)
            if key not in self._seen:
                if self.tree.lost(*key):
                    continue
                self._seen[key] = self.look(self.tree.gists(*key, 1), key[0])[0]
            found[i] = self._seen[key]
        return found

    def tail(
        self, blocks: int, newer: Float[np.ndarray, "k s w"] | None = None
    ) -> Tail:
        """The newest gists of a history of so many blocks.

        Args:
          blocks: how many count.
          newer: records of gists of what follows them, such as of a prompt.
        """
        after = np.zeros((0, self.width), np.float32)
        if newer is not None:
            after = self.look(newer, 1)[-TAIL_GISTS:]
        stored = range(max(blocks - (TAIL_GISTS - len(after)), 0), blocks)
        found = np.concatenate([self.nodes([(1, i) for i in stored]), after])
        room = TAIL_GISTS - len(found)
        at = np.arange(stored.start, stored.start + len(found))
        return Tail(
            np.pad(found, [(room, 0), (0, 0)]), np.pad(at, (room, 0)).astype(np.int32),
            np.arange(TAIL_GISTS) >= room,
        )  # fmt: skip


def _layers(base: DecoderConfig, config: LensConfig) -> list[int]:
    """Evenly spread over the base's layers, the first and the last among them."""
    count = min(config.layers, base.num_layers)
    return np.linspace(0, base.num_layers - 1, count).round().astype(int).tolist()
