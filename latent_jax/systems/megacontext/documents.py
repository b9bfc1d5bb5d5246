"""Questions on long documents, answered from a store of each, from its end, and from nothing."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from latent_jax.core.errors import ConfigError
from latent_jax.data.answers import exact_match, f1
from latent_jax.data.long_documents import LongQuestion
from latent_jax.ops import bootstrap
from latent_jax.systems.megacontext.layout import Layout, cover_cost
from latent_jax.systems.megacontext.memory import Memory
from latent_jax.systems.megacontext.runtime import Runtime, RuntimeConfig

_SHOWN = 400  # characters of a document in a report


def prompt(question: LongQuestion) -> str:
    """What is asked behind the document."""
    options = "".join(f"\n- {option}" for option in question.options)
    options = f"\nOne of:{options}" if options else ""
    return f"\n\nQuestion: {question.question}{options}\nAnswer:"


def cut(ids: Int[np.ndarray, " t"], most: int | None) -> Int[np.ndarray, " n"]:
    """A document without its middle where it is longer than that, as LongBench does it."""
    if most is None or len(ids) <= most:
        return ids
    return np.concatenate([ids[: most - most // 2], ids[len(ids) - most // 2 :]])


def said(text: str) -> str:
    """The first line of what was generated, which is the answer."""
    lines = text.strip().splitlines()
    return lines[0].strip() if lines else ""


def check(
    questions: Sequence[LongQuestion], tokenizer: Any, layout: Layout, budget: int,
    most: int | None = None,
) -> None:  # fmt: skip
    """Refuses documents that a working context cannot hold, before any is read.

    Args:
      budget: entries of the working context, W.
      most: tokens of a document; longer ones lose their middle.

    Raises:
      ConfigError: W cannot hold one at its coarsest, or it has no whole block.
    """
    for question in questions:
        blocks = len(cut(np.asarray(tokenizer.encode(question.context)), most)) // layout.block
        room = int(cover_cost(layout, blocks, layout.levels))
        if not blocks or room > budget:
            what = f"costs {room} entries at its coarsest" if blocks else "has no whole block"
            raise ConfigError(
                f"eval.documents: {question.id} {what}, and eval.budgets begins with {budget}: "
                "raise it, or lower eval.document_tokens"
            )


def measure(
    make: Callable[[str], Memory], questions: Sequence[LongQuestion], policies: Sequence[str],
    budget: int, most: int | None = None, new_tokens: int = 32,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:  # fmt: skip
    """Answers behind contexts that policies bring, behind the newest text, and behind nothing.

    Args:
      make: opens an empty store for writing, by path.
      questions: what is asked of which document.
      policies: what may move the focus.
      budget: entries of the working context, W; the arm ``newest`` has as many raw tokens.
      most: tokens of a document; longer ones lose their middle.
      new_tokens: of an answer; its first line counts.

    Returns:
      ``documents.<arm>.f1`` and ``.em``, with intervals over the questions, and as
      ``documents.<dataset>.<arm>.…`` where there are several; then what was said.

    Raises:
      ConfigError: a document that W cannot hold at its coarsest.
    """
    arms = [*policies, "newest", "no_context"]
    scores: dict[str, list[tuple[str, float, float]]] = {arm: [] for arm in arms}
    samples = []
    for number, question in enumerate(questions):
        with (
            tempfile.TemporaryDirectory() as folder,
            make(str(Path(folder) / "store")) as memory,
        ):
            ids = np.asarray(memory.backbone.tokenizer.encode(question.context), np.int32)
            memory.tree.append(cut(ids, most))
            memory.build()
            texts = {arm: said(_answer(memory, question, arm, budget, new_tokens)) for arm in arms}
        gold = question.answers
        for arm, text in texts.items():
            row = question.dataset, f1(text, gold), exact_match(text, gold)
            scores[arm].append(row)
        samples.append(
            {
                "kind": "answer", "id": question.id, "dataset": question.dataset,
                "tokens": len(ids), "context": question.context[:_SHOWN],
                "question": question.question, "answers": list(gold), "predictions": texts,
                "f1": {arm: f1(text, gold) for arm, text in texts.items()},
            }
        )  # fmt: skip
        if progress is not None:
            progress("documents", number + 1, len(questions))
    names = sorted({question.dataset for question in questions})
    found: dict[str, Any] = {"documents.questions": len(questions)}
    for arm, rows in scores.items():
        groups = {"": rows}
        if len(names) > 1:
            groups |= {f"{name}.": [row for row in rows if row[0] == name] for name in names}
        for group, members in groups.items():
            for at, score in enumerate(("f1", "em"), 1):
                values = np.asarray([row[at] for row in members])
                name = f"documents.{group}{arm}.{score}"
                found[name] = float(values.mean())
                found[f"{name}.ci95"] = list(bootstrap.mean_interval(values))
    return found, samples


def _answer(memory: Memory, question: LongQuestion, arm: str, budget: int, new_tokens: int) -> str:
    asked = prompt(question)
    if arm not in ("newest", "no_context"):
        return Runtime(memory, RuntimeConfig(budget, arm)).answer(asked, new_tokens).text
    live, tokens = np.asarray(memory.backbone.tokenizer.encode(asked), np.int32), len(memory.tree)
    if arm == "no_context":
        return memory.continued(None, live, 0, 0, new_tokens)
    # What does not fill a block is read live, as it is behind any context.
    size = memory.model.layout.block
    blocks = tokens // size
    kept = [(0, i) for i in range(max(blocks - budget // size, 0), blocks)]
    live = np.concatenate([memory.tree.tokens(blocks * size, tokens), live])
    start = blocks * size
    return memory.continued(memory.gather(kept, start), live, start, budget, new_tokens)
