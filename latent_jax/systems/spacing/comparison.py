"""Configurations side by side: how well they predict, and what their slots are worth."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

# Table → heading → the result's name. Goals are of 255 gaps.
_TABLES = {
    "Held-out scores (nats, mean gaps)": {
        "last position": "nll.last",
        "position-averaged": "nll.position_averaged",
        "CRPS": "crps",
        "PIT KS": "pit.ks",
        "RMSE": "rmse",
        "rollout slope (goal 0.5)": "rollout.slope",
        "runs away": "rollout.diverged.mean",
    },
    "Are slots necessary? Change of the last position's NLL (nats)": {
        "above no slots": "nll.above_none",
        "all overwritten": "slots.joint_delta",
        "one overwritten, the least (goal 0.02)": "slots.least_ablation_delta",
        "one hidden, the least": "slots.least_hidden_delta",
        "effect entropy": "slots.effect_entropy",
    },
    "Are slots anonymous? Change of the last position's NLL (nats)": {
        "identities permuted (goal 0.002)": "slots.permutation_increase",
        "contents permuted": "slots.permutation_increase.content",
        "content only": "slots.content_only_delta",
        "its share of all (goal 0.3)": "slots.content_only_loss",
        "identity only (goal 0.02)": "slots.id_only_delta",
    },
    "Do slots differ?": {
        "similarity (goal 0.3)": "slots.similarity",
        "gradient rank ratio (goal 0.5)": "slots.gradient_rank_ratio",
        "gradient correlation": "slots.gradient_correlation",
        "centres' std, gaps (goal 10)": "slots.centre_std",
        "the same within a window": "slots.centre_std_within",
    },
}
# Where a predictor that is no run has the scores of the first table.
_REFERENCE = re.compile(r"baseline\.(?P<row>.+)\.(?P<score>nll|crps|rmse)")
_SCORES = {"nll": "nll.last", "crps": "crps", "rmse": "rmse"}

Cell = tuple[float, float | None]


def compare(found: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Cell]]]:
    """Tables of scores and of diagnostics, a row for each configuration, then the baselines.

    Args:
      found: configuration → results and diagnosis, with ``<name>.std`` between seeds.

    Returns:
      Table → row → heading → (mean, standard deviation between seeds or None). ``above no slots``
      is the difference to the only configuration without slots, if there is one such.
    """
    rows = {name: {**own, **_derived(own)} for name, own in found.items()}
    bare = [own for own in rows.values() if "slots.joint_delta" not in own]
    if len(bare) == 1 and "nll.last" in bare[0]:
        for own in rows.values():
            if own is not bare[0] and "nll.last" in own:
                own |= _difference(own, bare[0])
    tables = {
        title: {
            row: {head: _cell(own, name) for head, name in columns.items() if name in own}
            for row, own in rows.items()
        }
        for title, columns in _TABLES.items()
    }
    scores, *others = tables
    for own in rows.values():
        for row, cells in _references(own).items():
            tables[scores].setdefault(row, cells)
    # Without slots there is nothing to say of them.
    for title in others:
        tables[title] = {row: cells for row, cells in tables[title].items() if cells}
    return {title: rows for title, rows in tables.items() if rows}


def _cell(own: Mapping[str, Any], name: str) -> Cell:
    return float(own[name]), own.get(f"{name}.std")


def _derived(own: Mapping[str, Any]) -> dict[str, Any]:
    """The attention profile under one name, whether slots attend or claim."""
    return {
        f"slots.{measure}{end}": own[f"attention.{kind}.{measure}{end}"]
        for kind in ("last", "claims")
        for measure in ("centre_std", "centre_std_within")
        for end in ("", ".std")
        if f"attention.{kind}.{measure}{end}" in own
    }


def _difference(own: Mapping[str, Any], bare: Mapping[str, Any]) -> dict[str, float]:
    spread = [other.get("nll.last.std") for other in (own, bare)]
    found = {"nll.above_none": own["nll.last"] - bare["nll.last"]}
    if None not in spread:
        found["nll.above_none.std"] = math.hypot(*spread)
    return found


def _references(own: Mapping[str, Any]) -> dict[str, dict[str, Cell]]:
    """Baselines and the exact law of random matrices, as rows of the table of scores."""
    head = {name: title for title, name in next(iter(_TABLES.values())).items()}
    rows: dict[str, dict[str, Cell]] = {}
    for name, value in own.items():
        match = _REFERENCE.fullmatch(name)
        if match is None:
            continue
        row, score = f"baseline: {match['row']}", _SCORES[match["score"]]
        if match["row"] == "position_averaged":
            row, score = "baseline: linear, from each position's past", "nll.position_averaged"
        rows.setdefault(row, {})[head[score]] = (float(value), None)
    floors = [name for name in own if name.startswith("floor.gue.")]
    if floors:
        k = max(int(name.rpartition(".k")[2]) for name in floors)
        value = float(own[f"floor.gue.k{k}"])
        rows[f"floor of random matrices, {k} gaps"] = {head["nll.last"]: (value, None)}
    return rows
