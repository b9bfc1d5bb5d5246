"""Labelled working contexts as rows for the trainer: what the lens sees, and what it should say."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from latent_jax import data
from latent_jax.backbones import Backbone
from latent_jax.core import trees
from latent_jax.core.errors import ConfigError
from latent_jax.systems.megacontext import labels
from latent_jax.systems.megacontext.config import MegaRun
from latent_jax.systems.megacontext.head_gists import HeadGists
from latent_jax.systems.megacontext.labels import Snapshot
from latent_jax.systems.megacontext.memory import digest, spec_fields
from latent_jax.systems.megacontext.sight import Look, Sight
from latent_jax.systems.megacontext.store import GistTree
from latent_jax.train.init_from import read_weights

_HELD_OUT = 0.2  # of the snapshots of a table, the last ones


class LensRows:
    """The snapshots of ``data.labels`` with the vectors of their nodes.

    Args:
      config: the run; its gists are those of ``train.init_from``.
      backbone: the base.

    Raises:
      ConfigError: no table, or no run whose gists they were measured with.
      StoreError: a table that is stale or of another history; a store that is not there.
    """

    def __init__(self, config: MegaRun, backbone: Backbone):
        paths, source = config.data.labels, config.train.init_from
        if not paths:
            raise ConfigError(
                "train.phases: data lens needs data.labels; `latent-jax mega label` makes a table"
            )
        if source is None:
            raise ConfigError(
                "train.phases: data lens needs train.init_from, the run whose gists data.labels "
                "were measured with (and train.init_partial=true, for it has no lens yet)"
            )
        flat = read_weights(source).items()
        gist = {k.removeprefix("params/gist/"): v for k, v in flat if k.startswith("params/gist/")}
        version = digest(trees.unflatten(gist), config.model.gist)
        layout, counts = config.model.layout, None
        if config.model.gist.kind == "heads":
            counts = HeadGists(config.model, backbone.decoder, 0).all_counts(
                trees.unflatten(gist)
            )
        look = Look(backbone.config, config.model.lens, counts)
        self._widths = layout.widths
        self.train: list[tuple[Sight, Snapshot]] = []
        self.held_out: list[tuple[Sight, Snapshot]] = []
        budget = 0
        for path in paths:
            columns, provenance = labels.read(path)
            store = config.data.store or provenance["store"]
            tree = GistTree.open(store, **spec_fields(backbone, config.model))
            labels.check(path, provenance, tree, version)
            sight = Sight(tree, look)
            rows = [(sight, found) for found in labels.snapshots(columns, layout)]
            budget = max(budget, provenance["budget"])
            kept = max(round(len(rows) * (1 - _HELD_OUT)), 1)
            self.train += rows[:kept]
            self.held_out += rows[kept:]
        self.nodes = layout.capacity(budget)

    def row(self, sight: Sight, found: Snapshot) -> dict[str, Any]:
        """One snapshot, padded. NumPy alone: it is called in a reading thread."""
        count, room = len(found.level), self.nodes - len(found.level)
        shift = found.first // self._widths[found.level]
        nodes = list(zip(found.level.tolist(), (found.index + shift).tolist(), strict=True))
        tail = sight.tail(found.first + found.cursor)
        # Nodes count from the stretch's first block; a causal lens compares the two.
        return {
            "level": np.pad(found.level, (0, room), constant_values=-1).astype(np.int32),
            "index": np.pad(found.index, (0, room)).astype(np.int32),
            "count": np.int32(count),
            "entry": np.pad(sight.nodes(nodes), [(0, room), (0, 0)]),
            "tail": tail.feature, "tail_mask": tail.mask,
            "tail_at": tail.at - np.int32(found.first),
            "utility": np.pad(found.utility, (0, room)),
            "measured": np.pad(found.measured, (0, room)),
        }  # fmt: skip

    def stream(self, config: MegaRun) -> data.BatchIterator:
        """Endless, shuffled, resumable rows."""
        rows, size = self.train, config.train.batch_size
        return data.pipeline(
            lambda i: self.row(*rows[i]), size, size=len(rows), seed=config.seed,
            remainder="drop" if len(rows) >= size else "wrap",
            process_index=jax.process_index(), process_count=jax.process_count(),
        )  # fmt: skip

    def held_out_batch(self) -> dict[str, np.ndarray] | None:
        """All held-out snapshots as one batch, if there are any."""
        if not self.held_out:
            return None
        return data.collate([self.row(*pair) for pair in self.held_out], {})
