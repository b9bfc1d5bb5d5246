"""Questions on long documents: JSON lines of LongBench and of InfiniteBench.

LongBench (Bai et al. 2023, arXiv:2308.14508): ``input``, ``context``, ``answers``, ``length``,
``dataset``, ``language``, ``all_classes``, ``_id``. InfiniteBench (Zhang et al. 2024,
arXiv:2402.13718): ``id``, ``context``, ``input``, ``answer`` (a string or several) and
``options``. Which of the two a line is, its fields say.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from latent_jax.core.errors import DataError
from latent_jax.data import files


@dataclasses.dataclass(frozen=True)
class LongQuestion:
    """A question on a long document.

    Attributes:
        id: unique within its file.
        dataset: such as ``narrativeqa``; InfiniteBench has one task in a file, named like it.
        context: the document.
        question: what is asked; empty where the document ends with it.
        answers: accepted answers.
        options: what may be chosen from; empty for an open question.
        language: of the document.
    """

    id: str
    dataset: str
    context: str
    question: str
    answers: tuple[str, ...]
    options: tuple[str, ...] = ()
    language: str = "en"


def load_long_questions(path: str | os.PathLike) -> list[LongQuestion]:
    """Reads a ``.jsonl`` file (also ``.xz`` or ``.gz``), or all of a folder.

    Raises:
        DataError: missing, unreadable or empty; a line that is of neither schema; an empty
            document, no answer, an id that occurs twice. The file and the line are named.
    """
    place = Path(path).expanduser()
    found = [place]
    if place.is_dir():
        found = sorted(p for p in place.rglob("*.jsonl*") if p.is_file())
        if not found:
            raise DataError(f"{place}: no .jsonl in this folder")
    return [question for file in found for question in _file(file)]


def _file(path: Path) -> list[LongQuestion]:
    questions, seen = [], {}
    for number, row in enumerate(files.read_jsonl(path), 1):
        where = f"{path}: line {number}"
        question = _question(row, path, where)
        if question.id in seen:
            raise DataError(f"{where}: id {question.id} is that of line {seen[question.id]} too")
        seen[question.id] = number
        questions.append(question)
    return questions


def _question(row: dict[str, Any], path: Path, where: str) -> LongQuestion:
    context, question = (_text(row, name, where) for name in ("context", "input"))
    if not context.strip():
        raise DataError(f"{where}: field 'context' is empty")
    if "answers" in row:  # LongBench
        ident, dataset = row.get("_id"), row.get("dataset") or path.name.partition(".")[0]
        told, options = row["answers"], row.get("all_classes")
    elif "answer" in row:  # InfiniteBench
        ident, dataset = row.get("id"), path.name.partition(".")[0]
        told, options = row["answer"], row.get("options")
    else:
        raise DataError(
            f"{where}: neither 'answers' (LongBench) nor 'answer' (InfiniteBench); it has "
            f"{', '.join(map(repr, sorted(row)))}"
        )
    answers = _several(told, "the answer", where)
    if not any(answer.strip() for answer in answers):
        raise DataError(f"{where}: no answer")
    if ident is None or isinstance(ident, dict | list):
        raise DataError(f"{where}: field '_id' (LongBench) or 'id' (InfiniteBench) is missing")
    return LongQuestion(
        str(ident), str(dataset), context, question.strip(), answers,
        _several(options or [], "'options'", where), str(row.get("language") or "en"),
    )  # fmt: skip


def _text(row: dict[str, Any], name: str, where: str) -> str:
    if not isinstance(row.get(name), str):
        raise DataError(f"{where}: field '{name}' is missing or no string")
    return row[name]


def _several(value: Any, name: str, where: str) -> tuple[str, ...]:
    """Strings, or what some tasks have instead: numbers, and lists of them."""
    if isinstance(value, dict) or value is None:
        raise DataError(f"{where}: {name} is neither a string nor a list")
    values = value if isinstance(value, list) else [value]
    return tuple(v if isinstance(v, str) else json.dumps(v) for v in values)
