"""Extractive question answering in SQuAD format, from several sources.

Sources: ``squad`` and ``qed`` (in the data root), ``embedded`` (shipped passages), ``lookup``
(generated key lookup), ``hf:ID`` (Hugging Face datasets), a local file or folder, and ``auto``
(``squad`` when the data root holds it, else ``embedded``).
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from latent_jax.assets import asset
from latent_jax.core.errors import DataError
from latent_jax.data import files

SQUAD_FILES = {"train": "squad/train-v1.1.json.xz", "validation": "squad/dev-v1.1.json.xz"}
QED_FILES = {"train": "qa/qed-train-history.jsonl.xz", "validation": "qa/qed-dev.jsonl.xz"}
SOURCES = ("auto", "squad", "embedded", "qed", "lookup")


@dataclasses.dataclass(frozen=True)
class QAExample:
    """One question on one passage.

    Attributes:
        id: unique within its file.
        title: article the passage is from.
        context: the passage.
        question: the question.
        answers: accepted answers, each verbatim in `context`.
        starts: character offset of each answer in `context`.
    """

    id: str
    title: str
    context: str
    question: str
    answers: tuple[str, ...]
    starts: tuple[int, ...] = ()


def load_squad(
    source: str = "auto", split: str = "train", root: str | os.PathLike | None = None
) -> list[QAExample]:
    """Loads question-answering examples.

    Args:
        source: one of `SOURCES`, ``lookup:pairs=2-4,values=word,n=500,seed=1``, ``hf:ID``, a
            SQuAD-format ``.json`` file (also ``.xz``/``.gz``), or a folder with ``train*.json*``
            and ``dev*.json*`` or ``validation*.json*``. A single file is split by passage, unless
            its articles carry a ``split`` field.
        split: ``train``, ``validation`` or ``all``.
        root: data folder; default the environment variable ``LATENT_JAX_DATA``.

    Returns:
        The examples in file order.

    Raises:
        DataError: unknown source or split, unreadable file, or an example that is malformed
            (names the file, the example's id and what is wrong).
    """
    files.check_split(split, source)
    if source == "auto":
        source = "squad" if files.has_file(SQUAD_FILES["train"], root) else "embedded"
    if source in ("squad", "qed"):
        table = SQUAD_FILES if source == "squad" else QED_FILES
        parts = list(table) if split == "all" else [split]
        read = _read_squad_file if source == "squad" else _read_qed
        return [e for part in parts for e in read(files.in_root(table[part], source, root))]
    if source == "embedded":
        return _select(asset("passages.json"), split)
    if source.partition(":")[0] == "lookup":
        from latent_jax.data.lookup import load_lookup

        parts = ("train", "validation") if split == "all" else (split,)
        return [e for part in parts for e in load_lookup(source, part)]
    if source.startswith("hf:"):
        return _read_hub(source[3:], split)
    return _read_local(source, split)


def _read_local(source: str, split: str) -> list[QAExample]:
    path = Path(source).expanduser()
    if path.is_dir():
        patterns = {"train": ("train*.json*",), "validation": ("dev*.json*", "validation*.json*")}
        parts = ("train", "validation") if split == "all" else (split,)
        found = [p for part in parts for glob in patterns[part] for p in sorted(path.glob(glob))]
        if not found:
            wanted = ", ".join(glob for part in parts for glob in patterns[part])
            raise DataError(f"{path}: no {wanted} in this folder")
        return [example for file in found for example in _read_squad_file(file)]
    if not path.exists():
        raise DataError(
            f"QA source '{source}': neither a file nor one of {', '.join(SOURCES)}, hf:ID"
        )
    return _select(path, split)


def _select(path: Path, split: str) -> list[QAExample]:
    """Examples of one split from a single file: by its own marks, else by passage."""
    marks: dict[str, str] = {}
    examples = _read_squad_file(path, marks)
    if split == "all":
        return examples
    if marks:
        chosen = [e for e in examples if marks.get(e.title, "train") == split]
    else:
        held = files.held_out([e.context for e in examples])
        chosen = [e for e in examples if (e.context in held) == (split == "validation")]
    if not chosen:
        raise DataError(
            f"{path}: no examples left for split '{split}'; a file with a single passage cannot "
            "be split: use split 'all' or another file"
        )
    return chosen


def _read_squad_file(path: Path, marks: dict[str, str] | None = None) -> list[QAExample]:
    """Parses SQuAD v1.1 JSON (`data` → `paragraphs` → `qas`).

    Unanswerable questions of SQuAD 2.0 (``is_impossible``) are left out with one warning.

    Args:
        path: the file.
        marks: filled with title → split for articles that carry a ``split`` field.
    """
    tree = files.read_json(path)
    articles = _get(tree, "data", list, path, "top level")
    examples: list[QAExample] = []
    skipped = 0
    for number, article in enumerate(articles):
        where = f"article {number}"
        paragraphs = _get(article, "paragraphs", list, path, where)
        title = str(article.get("title", ""))
        if marks is not None and "split" in article:
            if article["split"] not in ("train", "validation"):
                raise DataError(
                    f"{path}: {where} '{title}': split '{article['split']}' is neither "
                    "'train' nor 'validation'"
                )
            marks[title] = article["split"]
        for index, paragraph in enumerate(paragraphs):
            spot = f"{where} '{title}', paragraph {index}"
            context = _get(paragraph, "context", str, path, spot)
            for qa in _get(paragraph, "qas", list, path, spot):
                if isinstance(qa, dict) and qa.get("is_impossible"):
                    skipped += 1
                    continue
                examples.append(_example(qa, title, context, path, spot))
    if not examples:
        raise DataError(f"{path}: no answerable question in the file")
    if skipped:
        warnings.warn(f"{path}: left out {skipped} unanswerable questions", stacklevel=3)
    _check_unique(examples, path)
    return examples


def _example(qa: Any, title: str, context: str, path: Path, spot: str) -> QAExample:
    ident = str(_get(qa, "id", (str, int), path, spot))
    where = f"id {ident}"
    question = _get(qa, "question", str, path, where)
    answers = _get(qa, "answers", list, path, where)
    spans = []
    for answer in answers:
        text = _get(answer, "text", str, path, where)
        spans.append((text, answer.get("answer_start")))
    return build_example(ident, title, context, question, spans, str(path))


def build_example(
    ident: str,
    title: str,
    context: str,
    question: str,
    spans: Iterable[tuple[str, int | None]],
    where: str,
) -> QAExample:
    """Validates the pieces and makes a `QAExample`.

    An offset that does not point at its answer is replaced by the nearest occurrence.

    Args:
        ident: the example's id.
        title: article title.
        context: the passage.
        question: the question.
        spans: (answer text, character offset or None) pairs.
        where: file or data set, for error messages.

    Raises:
        DataError: blank passage or question, no answer, or an answer that is not in the passage.
    """
    spot = f"{where}: id {ident}"
    if not context.strip():
        raise DataError(f"{spot}: the context is empty")
    if not question.strip():
        raise DataError(f"{spot}: the question is empty")
    texts, starts = [], []
    for text, start in spans:
        if not text.strip():
            raise DataError(f"{spot}: an answer is empty")
        if start is not None and (isinstance(start, bool) or not isinstance(start, int)):
            raise DataError(f"{spot}: answer_start is {start!r}, a whole number is needed")
        found = _locate(context, text, start)
        if found < 0:
            raise DataError(f"{spot}: answer '{text}' is not in the context")
        texts.append(text)
        starts.append(found)
    if not texts:
        raise DataError(f"{spot}: no answers")
    return QAExample(ident, title, context, question.strip(), tuple(texts), tuple(starts))


def _locate(context: str, text: str, start: int | None) -> int:
    """Offset of `text` in `context` at or nearest to `start`; -1 when it is not there."""
    if start is None:
        return context.find(text)
    if start >= 0 and context.startswith(text, start):
        return start
    near = max(start, 0)
    before = context.rfind(text, 0, near + len(text))
    after = context.find(text, near)
    if before < 0 or after < 0:
        return max(before, after)
    return before if near - before <= after - near else after


def _get(node: Any, key: str, kind: type | tuple[type, ...], path: Path, where: str) -> Any:
    if not isinstance(node, dict):
        raise DataError(f"{path}: {where}: a JSON object is needed, found {type(node).__name__}")
    if key not in node:
        raise DataError(f"{path}: {where}: field '{key}' is missing")
    value = node[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        found = type(value).__name__
        raise DataError(f"{path}: {where}: field '{key}' has the wrong type ({found})")
    return value


def _check_unique(examples: list[QAExample], path: Path) -> None:
    seen: set[str] = set()
    for example in examples:
        if example.id in seen:
            raise DataError(f"{path}: id {example.id} occurs twice")
        seen.add(example.id)


def _read_qed(path: Path) -> list[QAExample]:
    """Parses QED rows; only answers that are one contiguous span are kept as gold answers.

    Questions whose every annotation is a list of several spans are left out, since an
    extractive F1 is undefined for them.
    """
    examples = []
    for number, row in enumerate(files.read_jsonl(path), 1):
        where = f"line {number}"
        ident = str(_get(row, "example_id", (str, int), path, where))
        context = _get(row, "paragraph_text", str, path, f"id {ident}")
        question = _get(row, "question_text", str, path, f"id {ident}")
        spans: dict[str, int] = {}
        for annotation in _qed_annotations(row, path, ident):
            # a few rows of the published file have one blank answer, which is no answer
            if len(annotation) == 1 and annotation[0][0].strip():
                spans.setdefault(*annotation[0])
        if spans:
            title = str(row.get("title_text", ""))
            examples.append(
                build_example(ident, title, context, question, spans.items(), str(path))
            )
    if not examples:
        raise DataError(f"{path}: no answerable question in the file")
    return examples


def _qed_annotations(row: dict, path: Path, ident: str) -> list[list[tuple[str, int]]]:
    """(text, start) spans of each annotator; the training file keeps only one annotation."""
    where = f"id {ident}"
    try:
        if "answer_text" in row:
            starts = [start for start, _ in row["answer_spans"]]
            return [list(zip(row["answer_text"], starts, strict=True))]
        answers = _get(row, "original_nq_answers", list, path, where)
        return [[(span["string"], span["start"]) for span in spans] for spans in answers]
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{path}: {where}: malformed answer spans") from None


def _read_hub(name: str, split: str) -> list[QAExample]:
    """Reads a SQuAD-format data set through Hugging Face `datasets`."""
    try:
        import datasets
    except ImportError:
        raise DataError(f"hf:{name}: needs the package 'datasets' (pip install datasets)") from None
    parts = ("train", "validation") if split == "all" else (split,)
    examples = []
    for part in parts:
        try:
            rows = datasets.load_dataset(name, split=part)
        except Exception as error:  # the hub client raises many unrelated types
            line = str(error).strip().splitlines()[0] if str(error).strip() else ""
            kind = type(error).__name__
            raise DataError(f"hf:{name} ({part}): cannot be loaded: {kind} {line}") from None
        missing = {"context", "question", "answers"} - set(rows.column_names)
        if missing:
            raise DataError(
                f"hf:{name} ({part}): columns {sorted(missing)} are missing; it is not in SQuAD "
                f"format (found {rows.column_names})"
            )
        for number, row in enumerate(rows):
            answers = row["answers"]
            if not answers["text"]:
                continue  # unanswerable questions of SQuAD 2.0
            ident = str(row.get("id", f"{part}-{number}"))
            spans = zip(answers["text"], answers["answer_start"], strict=True)
            examples.append(
                build_example(
                    ident, str(row.get("title", "")), row["context"], row["question"], spans,
                    f"hf:{name}",
                )
            )
    if not examples:
        raise DataError(f"hf:{name}: no answerable question in split '{split}'")
    return examples
