"""Arms and baselines of one measure side by side, for the sections of results that have them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from latent_jax.report import figures, tables

# What a run itself is called among the rows of such a figure.
OWN = "this run"


def recovery(results: Mapping[str, Any]) -> list[Markup]:
    """How much of a history each arm brings back, for each level of gists."""
    levels: dict[str, dict[str, str]] = {}
    for name in results:
        if match := re.fullmatch(r"recovery\.(lod\d+\.slots\d+)(?:\.(\w+))?", name):
            if match.group(2) != "ci95":
                levels.setdefault(match.group(1), {})[match.group(2) or "gist"] = name
    return [
        _dots(f"Recovery, {level}", arms, results, "0: nothing of the history, 1: all of it")
        for level, arms in levels.items()
        if len(arms) > 1
    ]


def likelihoods(results: Mapping[str, Any]) -> list[Markup]:
    """The last gap's NLL beside every baseline's, the best on top."""
    names = {
        match.group(1): name
        for name in results
        if (match := re.fullmatch(r"baseline\.(\w+)\.nll", name))
        and match.group(1) != "position_averaged"
    }
    if "nll.last" not in results or not names:
        return []
    names = {OWN: "nll.last", **names}
    ordered = dict(sorted(names.items(), key=lambda pair: results[pair[1]]))
    return [_dots("NLL of the last gap", ordered, results, "nats; less is better")]


def _dots(
    title: str, rows: Mapping[str, str], results: Mapping[str, Any], unit: str
) -> Markup:
    found = {row: tables.interval_of(results, name) for row, name in rows.items()}
    return figures.dots(
        title,
        {row: float(results[name]) for row, name in rows.items()},
        {row: bounds for row, bounds in found.items() if bounds},
        unit,
    )
