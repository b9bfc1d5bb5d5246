"""What a lens sees of a stored history: a vector for every node, read from the stored gists.

A node's vector is the mean over its slots of the values in a few layers of the base, each layer at
unit root mean square. A raw block shows the gist that would stand for it, so that all levels look
alike and nothing has to be encoded for a look.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from latent_jax.backbones.config import DecoderConfig
from latent_jax.systems.megacontext.config import LensConfig
from latent_jax.systems.megacontext.layout import Layout
from latent_jax.systems.megacontext.lens import TAIL_GISTS, LensNet, Tail
from latent_jax.systems.megacontext.store import GistTree, Stretch

Node = tuple[int, int]  # level, index
_KEPT = 1 << 14  # vectors


def lens_net(config: LensConfig, layout: Layout) -> LensNet:
    """The lens of a configuration."""
    return LensNet(layout.levels, config.width, config.heads, config.stacks, config.causal)


def sight_width(base: DecoderConfig, config: LensConfig) -> int:
    """Numbers in a node's vector."""
    return len(_layers(base, config)) * base.num_kv_heads * base.head_dim


def sight(
    records: Float[np.ndarray, "n s w"], base: DecoderConfig, config: LensConfig
) -> Float[np.ndarray, "n f"]:
    """Vectors of gists as they are stored (`records.to_records`)."""
    n, s, _ = records.shape
    both = np.asarray(records, np.float32).reshape(n, s, base.num_layers, 2, -1)
    mean = both[:, :, _layers(base, config), 1].mean(1)
    scale = np.sqrt(np.mean(mean**2, axis=-1, keepdims=True))
    return (mean / np.maximum(scale, 1e-6)).reshape(n, -1)


class Sight:
    """Looks at one tree; vectors that were looked at are kept.

    Args:
      tree: its gists must be built.
      base: architecture of the model whose keys and values they are.
      config: of the lens.
    """

    def __init__(self, tree: GistTree | Stretch, base: DecoderConfig, config: LensConfig):
        self.tree, self.base, self.config = tree, base, config
        self._seen: dict[Node, Float[np.ndarray, " f"]] = {}

    @property
    def width(self) -> int:
        """Numbers in a vector."""
        return sight_width(self.base, self.config)

    def nodes(self, nodes: Sequence[Node]) -> Float[np.ndarray, "n f"]:
        """Vectors of some nodes.

        Raises:
          PendingGists: their gists are not there.
        """
        if len(self._seen) > _KEPT:
            self._seen.clear()
        found = np.zeros((len(nodes), self.width), np.float32)
        for i, (level, index) in enumerate(nodes):
            key = (max(level, 1), index)
            if key not in self._seen:
                self._seen[key] = sight(self.tree.gists(*key, 1), self.base, self.config)[0]
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
            after = sight(newer, self.base, self.config)[-TAIL_GISTS:]
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
