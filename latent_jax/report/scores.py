"""Scores over an axis: number formats of a wire, code bits, compression ratios."""

from __future__ import annotations

import re
from collections.abc import Mapping
from operator import itemgetter
from typing import Any

from latent_jax.report.load import is_number
from latent_jax.report.tables import interval_of, size


def by_bits(
    results: Mapping[str, Any], measures: tuple[str, ...] = ("f1", "token_accuracy")
) -> tuple[list[str], dict[str, dict[str, tuple[float, tuple[float, float] | None]]]]:
    """Scores over the number formats of a wire: ("format, bytes per token", ascending) and
    measure → that → (score, interval).
    """
    found = {
        match.group(1): float(value)
        for name, value in results.items()
        if (match := re.fullmatch(r"wire\.([a-z0-9]+)\.bytes_per_token", name)) and is_number(value)
    }
    ordered = sorted(found.items(), key=itemgetter(1))
    names = {form: f"{form}\n{size(round(count))}" for form, count in ordered}
    lines = {
        measure: {
            label: (float(results[name]), interval_of(results, name))
            for form, label in names.items()
            if is_number(results.get(name := f"wire.{form}.{measure}"))
        }
        for measure in measures
    }
    return list(names.values()), {m: points for m, points in lines.items() if points}


def by_code_bits(
    results: Mapping[str, Any],
) -> tuple[list[str], dict[str, dict[str, tuple[float, tuple[float, float] | None]]]]:
    """Byte accuracy over the code bits that are kept: bits per byte, ascending, and level → that →
    (score, no interval).
    """
    points = []
    wanted = re.compile(r"rate_distortion\.(?:(level\d+)\.)?stages\d+\.code_bits_per_byte")
    for name, bits in results.items():
        match = wanted.fullmatch(name)
        score = results.get(name.replace("code_bits_per_byte", "byte_accuracy"))
        if match and is_number(bits) and is_number(score):
            points.append((float(bits), match.group(1) or "level0", float(score)))
    lines: dict[str, dict[str, tuple[float, None]]] = {}
    for bits, level, score in sorted(points):
        lines.setdefault(level, {})[f"{bits:.3g}"] = (score, None)
    return list(dict.fromkeys(f"{bits:.3g}" for bits, _, _ in sorted(points))), lines


def by_ratio(
    results: Mapping[str, Any], task: str = "squad", measure: str = "f1", main_reader: str = ""
) -> dict[str, dict[str, dict[float, tuple[float, tuple[float, float] | None]]]]:
    """Scores of every arm over compression ratios: reader → arm → ratio → (score, interval).

    The names `<task>.<measure>.<arm>` are of `main_reader`, at the ratio `<task>.ratio` or `ratio`.
    """
    found: dict[str, dict[str, dict[float, Any]]] = {}
    main = re.compile(rf"{re.escape(task)}\.{measure}\.([^.]+)")
    other = re.compile(rf"{re.escape(task)}\.(.+)\.x([0-9.]+?)\.{measure}\.([^.]+)")
    for name, value in results.items():
        if not is_number(value):
            continue
        if match := main.fullmatch(name):
            reader, arm = main_reader, match.group(1)
            ratio = results.get(f"{task}.ratio", results.get("ratio", 1.0))
        elif match := other.fullmatch(name):
            reader, ratio, arm = match.group(1), float(match.group(2)), match.group(3)
        else:
            continue
        # A measured ratio of 3.98 and one of the config's 4 are the same point of a plot.
        ratio = round(float(ratio), 1) if is_number(ratio) else 1.0
        point = (float(value), interval_of(results, name))
        found.setdefault(reader, {}).setdefault(arm, {})[ratio] = point
    return found
