"""Samples of a run, ready to show side by side.

A row of samples.jsonl is a reconstruction or an answer:

    {"kind": "reconstruction", "text": …, "reconstruction": …, "shuffled": …, "zero": …,
     "tokens": [strings of the text], "reconstruction_tokens": […], "token_accuracy": 0.9}
    {"kind": "answer", "question": …, "context": …, "answers": […], "predictions": {arm: text},
     "f1": {arm: score}}

Only `kind` and the texts are needed; every other field is shown as it is.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from latent_jax.report.names import ARMS
from latent_jax.report.tables import number

# A piece of a text and whether it is right ("same"), wrong or left out.
Piece = tuple[str, str]
_REBUILT = ("reconstruction", "output", "prediction", "latent")
_TEXTS = ("text", "reference", "gold")
_ASIDE = ("kind", "tokens", "text_tokens", *_TEXTS, *_REBUILT)


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """A text, what was rebuilt from its latents with wrong pieces marked, and other fields."""

    text: str
    pieces: list[Piece]
    others: list[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Answer:
    """A question with the gold answers and what each arm said: (arm, text, score)."""

    question: str
    context: str
    answers: list[str]
    said: list[tuple[str, str, str]]


def compare(reference: Sequence[str], rebuilt: Sequence[str]) -> list[Piece]:
    """Marks what differs between two sequences of pieces; the rebuilt one is what is shown.

    Example:
      >>> compare(["a", " b", " c"], ["a", " x", " c"])
      [('a', 'same'), (' x', 'wrong'), (' c', 'same')]
      >>> compare(["a", " b"], ["a"])
      [('a', 'same'), (' b', 'missing')]
    """
    pieces: list[Piece] = []
    matcher = difflib.SequenceMatcher(None, reference, rebuilt, autojunk=False)
    for kind, a0, a1, b0, b1 in matcher.get_opcodes():
        if kind == "equal":
            pieces += [(piece, "same") for piece in rebuilt[b0:b1]]
        elif b1 > b0:
            pieces += [(piece, "wrong") for piece in rebuilt[b0:b1]]
        else:
            pieces += [(piece, "missing") for piece in reference[a0:a1]]
    return pieces


def _words(text: str) -> list[str]:
    return re.findall(r"\s*\S+|\s+$", text)


def _strings(value: Any) -> list[str] | None:
    if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
        return value
    return None


def _show(value: Any) -> str:
    if isinstance(value, float):
        return number(value)
    if isinstance(value, list):
        return ", ".join(map(_show, value))
    return str(value)


def reconstructions(rows: Sequence[Mapping[str, Any]], limit: int = 12) -> list[Reconstruction]:
    """The reconstructions among the sample rows."""
    shown = []
    for row in rows:
        if row.get("kind") != "reconstruction":
            continue
        text = next((str(row[key]) for key in _TEXTS if key in row), "")
        rebuilt = next((key for key in _REBUILT if key in row), "")
        tokens = _strings(row.get("tokens") or row.get("text_tokens"))
        rebuilt_tokens = _strings(row.get(f"{rebuilt}_tokens"))
        if tokens and rebuilt_tokens:
            pieces = compare(tokens, rebuilt_tokens)
        else:
            pieces = compare(_words(text), _words(str(row.get(rebuilt, ""))))
        others = [
            (key, _show(value))
            for key, value in row.items()
            if key not in _ASIDE and not key.endswith("_tokens")
        ]
        shown.append(Reconstruction(text, pieces, others))
        if len(shown) == limit:
            break
    return shown


def answers(rows: Sequence[Mapping[str, Any]], limit: int = 20) -> list[Answer]:
    """The answers among the sample rows, arms in the order of the tables."""
    shown = []
    for row in rows:
        if row.get("kind") != "answer":
            continue
        said = row.get("predictions")
        if not isinstance(said, Mapping):
            said = {arm: row[arm] for arm in (*ARMS, "prediction", "answer") if arm in row}
        scores = row.get("f1") if isinstance(row.get("f1"), Mapping) else {}
        order = list(ARMS)
        arms = sorted(said, key=lambda arm: order.index(arm) if arm in ARMS else len(order))
        gold = row.get("answers", row.get("gold", []))
        shown.append(
            Answer(
                question=str(row.get("question", "")),
                context=str(row.get("context", row.get("text", ""))),
                answers=[str(a) for a in gold] if isinstance(gold, list) else [str(gold)],
                said=[
                    (arm, str(said[arm]), number(scores[arm]) if arm in scores else "")
                    for arm in arms
                ],
            )
        )
        if len(shown) == limit:
            break
    return shown


def others(
    rows: Sequence[Mapping[str, Any]], limit: int = 12
) -> list[tuple[str, list[tuple[str, str]]]]:
    """Samples of any other kind, a demonstration for one: (kind, fields), ``limit`` of each."""
    kinds = {str(row.get("kind", "sample")): [] for row in rows}
    for row in rows:
        kinds[str(row.get("kind", "sample"))].append(row)
    rows = [
        row for kind, found in kinds.items() if kind not in ("reconstruction", "answer")
        for row in found[:limit]
    ]
    return [
        (
            str(row.get("kind", "sample")).capitalize(),
            [(key, _show(value)) for key, value in row.items() if key != "kind"],
        )
        for row in rows
    ]
