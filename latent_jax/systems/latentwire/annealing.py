"""What weighting generation in does to latents that were to rebuild embeddings: a verdict.

A compressor whose soft tokens resemble the text's embeddings (``losses.embeddings``) need not be
read well, and the losses of reading pull them away from there. The log says how both went.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from latent_jax.systems.latentwire.config import TASKS

#: Best first; as a number in results, `improved` is 1, `collapsed` -2.
VERDICTS = ("improved", "stable", "degraded", "collapsed")
# Below it a soft token has more of something else than of its tokens: the run is stopped there.
FLOOR = 0.60
# Batches differ by less; a tenth of the loss of reading is progress.
COSINE_LOST, LOSS_WON = 0.02, 0.1
# Rows of an end, as a share of the log, and at least.
SHARE, LEAST = 0.05, 3


class Verdict(NamedTuple):
    """How annealing went.

    Attributes:
      name: of `VERDICTS`.
      cosine: of soft tokens to the embeddings that they stand for, before generation had a weight
        and at the end.
      loss: of generation, nats per token, at the same places.
    """

    name: str
    cosine: tuple[float, float]
    loss: tuple[float, float]

    def numbers(self) -> dict[str, float]:
        """For ``results.json``."""
        return {
            "annealing.verdict": float(1 - VERDICTS.index(self.name)),
            "annealing.cosine_before": self.cosine[0], "annealing.cosine": self.cosine[1],
            "annealing.nats_before": self.loss[0], "annealing.nats": self.loss[1],
        }  # fmt: skip

    def line(self) -> str:
        """For people."""
        return (
            f"{self.name}: cosine to the text's embeddings {self.cosine[0]:.2f} to "
            f"{self.cosine[1]:.2f}, generation {self.loss[0]:.2f} to {self.loss[1]:.2f} nats"
        )


def verdict(log: Sequence[Mapping[str, Any]]) -> Verdict | None:
    """Judges a run's ``metrics.jsonl``; None where not both losses were there.

    *Collapsed*: the cosine ends below 0.60. *Degraded*: it ends lower than before by more than
    0.02. *Improved*: it does not, and the loss of generation fell by a tenth. *Stable*: neither.
    ``Before`` are the last steps without a weight on generation, or the first of all.
    """
    rows = [row for row in log if "embedding_cosine" in row]
    generation = [name for name in TASKS if any(row.get(f"weight.{name}") for row in rows)]
    if len(rows) < 2 * LEAST or not generation:
        return None
    n = max(LEAST, round(SHARE * len(rows)))
    on = [i for i, row in enumerate(rows) if any(row.get(f"weight.{g}") for g in generation)]
    before = rows[max(0, on[0] - n) : on[0]] if on[0] >= LEAST else rows[:n]

    def mean(part: Sequence[Mapping[str, Any]], *names: str) -> float:
        found = [row[name] for row in part for name in names if name in row]
        return float(np.mean(found)) if found else float("nan")

    ends = before, rows[-n:]
    cosine = tuple(mean(part, "embedding_cosine") for part in ends)
    loss = tuple(mean(part, *(f"term.{g}" for g in generation)) for part in ends)
    name = "stable"
    if not cosine[1] >= FLOOR:
        name = "collapsed"
    elif cosine[1] < cosine[0] - COSINE_LOST:
        name = "degraded"
    elif loss[1] < (1 - LOSS_WON) * loss[0]:
        name = "improved"
    return Verdict(name, cosine, loss)
