"""Labels that are measured in the run, where a lens's turn comes in alternating training.

Labels belong to the gists and the reader that they were measured with. When both have been trained
on, a lens needs new ones: the run keeps a store of training text, makes its gists anew and measures
the actions of contexts that its own policies lead to.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from latent_jax.core.errors import DataError, StoreError
from latent_jax.systems.megacontext import labels, recipe
from latent_jax.systems.megacontext.config import MegaRun
from latent_jax.systems.megacontext.labelling import label
from latent_jax.systems.megacontext.lens_data import LensRows
from latent_jax.systems.megacontext.memory import Memory
from latent_jax.train.config import PhaseConfig
from latent_jax.train.phases import phase_at, span


class Alternation:
    """Mixed into the system; needs its ``config``, ``backbone``, ``memory`` and ``notify``."""

    config: MegaRun
    backbone: Any
    measured: LensRows | None = None

    def begin_phase(
        self, phase: PhaseConfig, start: int, variables: Any, frozen: Any, out: Path
    ) -> bool:
        """Measures the labels of a phase of the lens; see `latent_jax.train.protocol.System`.

        Tables stay in ``out/labels`` and are used again while the gists and the reader are the
        same, so that a run that was stopped does not measure twice. Several processes measure
        together, each with a store of its own.
        """
        c, chosen = self.config, self.config.data.label
        if phase.data != "lens" or chosen is None:
            return False
        # Places of every turn are its own.
        chosen = dataclasses.replace(chosen, seed=chosen.seed + start)
        own = Path(out)
        if jax.process_index():
            own = own / f"process{jax.process_index()}"
        # The same in every process: all have to agree on each.
        turns = {
            span(c.train, step)[0] for step in range(start + 1)
            if phase_at(c.train, step)[1].data == "lens"
        }
        tables = [own / "labels" / f"{turn:08d}.parquet" for turn in sorted(turns)]
        table, store = tables[-1], own / "store"
        with self.memory(variables, frozen, str(store), writable=True) as memory:
            if not len(memory.tree):
                memory.tree.append(self._history())
                memory.tree.flush()
            self._say(f"phase {phase.name}: making the gists of {len(memory.tree):,} tokens")
            memory.build()
            memory.tree.flush()
            if not _everywhere(_usable(table, memory)):
                found, provenance = label(memory, chosen, self._labelled)
                labels.write(table, found, provenance)
            usable = [path for path in tables if _everywhere(_usable(path, memory))]
        self.measured = LensRows(
            c, self.backbone, variables["params"], usable, str(store)
        )
        return True

    def _history(self) -> np.ndarray:
        """Training text that labels are measured on.

        Raises:
          DataError: there is not enough.
        """
        c, wanted = self.config, self.config.data.label_blocks
        tokens = wanted * c.model.layout.block
        rows = recipe.histories(c, self.backbone.tokenizer, "train", tokens, 1)
        if not len(rows):
            raise DataError(
                f"data.text: no text of {tokens:,} tokens (data.label_blocks={wanted}) to measure "
                "labels on: lower data.label_blocks"
            )
        return rows[0]

    def _labelled(self, done: int, total: int) -> None:
        self._say(f"measuring labels: {done} of {total} contexts")

    def _say(self, text: str) -> None:
        if self.notify is not None:
            self.notify(text)


def _everywhere(found: bool) -> bool:
    """Whether it is so in every process: what is measured next, all measure together."""
    if jax.process_count() == 1:
        return found
    return bool(multihost_utils.process_allgather(np.asarray(found)).all())


def _usable(path: Path, memory: Memory) -> bool:
    """Whether a table is of these gists, this reader and this history."""
    try:
        labels.check(
            path, labels.read(path)[1], memory.tree, memory.tree.version, memory.reader
        )
    except StoreError:
        return False
    return True
