"""Scores of questions per arm, and how the latents compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from latent_jax.ops.bootstrap import difference_interval, mean_interval, ratio_interval
from latent_jax.systems.latentwire import metrics

TUNED = "_tuned"
#: Text before the compressor's own soft prompt, which was trained on raw text.
PROMPTED = "_prompted"


def base_arm(arm: str) -> str:
    """What stands for the text in an arm, whatever soft prompt follows."""
    return arm.removesuffix(TUNED).removesuffix(PROMPTED)


#: Arms that ought to be beaten by a margin rather than matched by a share.
CONTROLS = ("no_context", "shuffled", "scrambled", "zero")


#: Of the prediction of an answer's first token, see `scoring.score_answers`.
FIRST = ("top1", "top5", "margin", "entropy")


class ArmScores:
    """Per-example scores of one arm.

    Args:
      n: examples.
    """

    def __init__(self, n: int):
        self.said = [""] * n
        self.values = {k: np.zeros(n) for k in ("f1", "em", "empty", "nll", "count", *FIRST)}

    def add(self, i: int, said: str, answers: Sequence[str], forced: Mapping[str, Any], j: int):
        """Scores example ``i``, which is row ``j`` of the teacher-forced scores of its batch."""
        self.said[i] = said
        v = self.values
        v["f1"][i] = metrics.f1(said, answers)
        v["em"][i] = metrics.exact_match(said, answers)
        v["empty"][i] = not said
        for key in ("nll", "count", *FIRST):
            if key in forced:
                v[key][i] = forced[key][j]

    def report(self, out: dict[str, Any], name: str, arm: str, seed: int) -> None:
        """Adds means, and intervals of F1 and exact match, to ``out`` as ``<name>.<key>.<arm>``."""
        v = self.values
        for key in ("f1", "em"):
            out[f"{name}.{key}.{arm}"] = float(v[key].mean())
            out[f"{name}.{key}.{arm}.ci95"] = list(mean_interval(v[key], seed=seed))
        out[f"{name}.empty.{arm}"] = float(v["empty"].mean())
        if v["count"].any():
            out[f"{name}.nll.{arm}"] = float(v["nll"].sum() / v["count"].sum())
            for key in FIRST:
                out[f"{name}.first_{key}.{arm}"] = float(v[key].mean())


def compare(out: dict[str, Any], name: str, table: Mapping[str, ArmScores], seed: int) -> None:
    """The latent arm against the others, paired: gain over controls, share of everything else."""
    if "latent" not in table:
        return
    ours = table["latent"].values["f1"]
    for arm, scores in table.items():
        theirs = scores.values["f1"]
        if base_arm(arm) in CONTROLS:
            out[f"{name}.f1_gain.{arm}"] = float(ours.mean() - theirs.mean())
            out[f"{name}.f1_gain.{arm}.ci95"] = list(difference_interval(ours, theirs, seed=seed))
        elif arm != "latent" and theirs.any():
            out[f"{name}.f1_share.{arm}"] = float(ours.mean() / theirs.mean())
            out[f"{name}.f1_share.{arm}.ci95"] = list(ratio_interval(ours, theirs, seed=seed))
