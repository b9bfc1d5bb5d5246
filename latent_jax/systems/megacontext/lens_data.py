"""Labelled working contexts as rows for the trainer: what the lens sees, and what it should say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from latent_jax import data
from latent_jax.backbones import Backbone
from latent_jax.backbones.config import DecoderConfig
from latent_jax.core import trees
from latent_jax.core.errors import ConfigError
from latent_jax.systems.megacontext import base_lora, labels
from latent_jax.systems.megacontext.config import MegaRun
from latent_jax.systems.megacontext.head_gists import HeadGists
from latent_jax.systems.megacontext.labels import Snapshot
from latent_jax.systems.megacontext.lens import TAIL_GISTS, WORDS, shared_words
from latent_jax.systems.megacontext.memory import digest, reader_version, spec_fields
from latent_jax.systems.megacontext.policies import words_of
from latent_jax.systems.megacontext.sight import Look, Sight, sight_width
from latent_jax.systems.megacontext.store import GistTree
from latent_jax.train.init_from import read_weights
from latent_jax.train.protocol import BatchSpec

_HELD_OUT = 0.2  # of the snapshots of a table, the last ones


class LensRows:
    """Labelled contexts with the vectors of their nodes.

    Args:
      config: the run.
      backbone: the base.
      params: of the gists that the labels are of, and of the reader (``gist``, ``lora``).
      tables: of labels, for `labels.read`.
      store: what they were measured on; none: where it was then.

    Raises:
      StoreError: a table that is stale or of another history; a store that is not there.
    """

    def __init__(
        self, config: MegaRun, backbone: Backbone, params: Mapping[str, Any],
        tables: Sequence[str | Path], store: str | Path | None = None,
    ):  # fmt: skip
        version = digest(params["gist"], config.model.gist)
        reader = reader_version(base_lora.deltas(config.model.lora, backbone.config, params))
        layout, counts = config.model.layout, None
        if config.model.gist.kind == "heads":
            counts = HeadGists(config.model, backbone.decoder, 0).all_counts(params["gist"])
        look = Look(backbone.config, config.model.lens, counts)
        self._layout, self._words = layout, config.model.lens.words
        self.train: list[tuple[Sight, Snapshot]] = []
        self.held_out: list[tuple[Sight, Snapshot]] = []
        budget = 0
        for path in tables:
            columns, provenance = labels.read(path)
            where = store or provenance["store"]
            tree = GistTree.open(where, **spec_fields(backbone, config.model))
            labels.check(path, provenance, tree, version, reader)
            sight = Sight(tree, look)
            rows = [(sight, found) for found in labels.snapshots(columns, layout)]
            budget = max(budget, provenance["budget"])
            kept = max(round(len(rows) * (1 - _HELD_OUT)), 1)
            self.train += rows[:kept]
            self.held_out += rows[kept:]
        self.nodes = layout.capacity(budget)

    @classmethod
    def of_tables(cls, config: MegaRun, backbone: Backbone) -> LensRows:
        """Those of ``data.labels``, measured with the gists of ``train.init_from``.

        Raises:
          ConfigError: no table, or no run whose gists they were measured with.
          StoreError: see the constructor.
        """
        tables, source = config.data.labels, config.train.init_from
        if not tables:
            raise ConfigError(
                "train.phases: data lens needs data.labels; `latent-jax mega label` makes a table"
            )
        if source is None:
            raise ConfigError(
                "train.phases: data lens needs train.init_from, the run whose gists data.labels "
                "were measured with (and train.init_partial=true, for it has no lens yet)"
            )
        params = trees.unflatten({
            name.removeprefix("params/"): x for name, x in read_weights(source).items()
            if name.startswith(("params/gist/", "params/lora/"))
        })  # fmt: skip
        return cls(config, backbone, params, tables, config.data.store)

    def row(self, sight: Sight, found: Snapshot) -> dict[str, Any]:
        """One snapshot, padded. NumPy alone: it is called in a reading thread."""
        count, room = len(found.level), self.nodes - len(found.level)
        shift = found.first // self._layout.widths[found.level]
        nodes = list(zip(found.level.tolist(), (found.index + shift).tolist(), strict=True))
        tail = sight.tail(found.first + found.cursor)
        # Nodes count from the stretch's first block; a causal lens compares the two.
        seen = {"words": self._shared(sight, found)} if self._words else {}
        return seen | {
            "level": np.pad(found.level, (0, room), constant_values=-1).astype(np.int32),
            "index": np.pad(found.index, (0, room)).astype(np.int32),
            "count": np.int32(count),
            "entry": np.pad(sight.nodes(nodes), [(0, room), (0, 0)]),
            "tail": tail.feature, "tail_mask": tail.mask,
            "tail_at": tail.at - np.int32(found.first),
            "utility": np.pad(found.utility, (0, room)),
            "measured": np.pad(found.measured, (0, room)),
        }  # fmt: skip

    def _shared(self, sight: Sight, found: Snapshot) -> np.ndarray:
        """`shared_words` of a snapshot's nodes, as `Focus` would find them."""
        layout = self._layout
        end, size = found.cursor - layout.protected, layout.block
        ids, _ = sight.tree.readable(found.first * size, (found.first + end) * size)
        query, _ = sight.tree.readable(
            (found.first + end) * size, (found.first + found.cursor) * size
        )
        best = np.append(words_of(np.maximum(query, 0), ids.reshape(end, size)), 0.0)
        widths = layout.widths[found.level]
        start = np.minimum(found.index * widths, end)
        stop = np.minimum((found.index + 1) * widths, end)
        # The largest of each stretch: `reduceat` of pairs of indices, of which every other counts.
        most = np.maximum.reduceat(best, np.stack([start, np.maximum(stop, start)], 1).reshape(-1))
        shared = shared_words(most[::2], stop > start)
        return np.pad(shared, [(0, self.nodes - len(shared)), (0, 0)])

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


class Unmeasured:
    """What stands for the labels of a run's first phase until they are measured in it
    (`alternation`): batches that have only their shapes.
    """

    def __init__(self, config: MegaRun, base: DecoderConfig):
        spec = batch_spec(config, base).arrays
        self._batch = {name: np.zeros(x.shape, x.dtype) for name, x in spec.items()}

    def __iter__(self) -> Unmeasured:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return self._batch

    def get_state(self) -> dict[str, Any]:
        """Nothing: it has no position."""
        return {}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Nothing: a position is of the labels, once they are there."""


def batch_spec(config: MegaRun, base: DecoderConfig) -> BatchSpec:
    """Shapes of the batches of labels that are measured in the run (``data.label``)."""
    b, n = config.train.batch_size, config.model.layout.capacity(config.data.label.budget)
    width, tail = sight_width(base, config.model.lens), TAIL_GISTS
    shapes = {
        "level": ((b, n), np.int32), "index": ((b, n), np.int32), "count": ((b,), np.int32),
        "entry": ((b, n, width), np.float32), "tail": ((b, tail, width), np.float32),
        "tail_mask": ((b, tail), bool), "tail_at": ((b, tail), np.int32),
        "utility": ((b, n), np.float32), "measured": ((b, n), bool),
    }  # fmt: skip
    if config.model.lens.words:
        shapes["words"] = ((b, n, WORDS), np.float32)
    arrays = {name: jax.ShapeDtypeStruct(*found) for name, found in shapes.items()}
    return BatchSpec("lens", 1.0, arrays)
