"""Questions and the passages that answer them, as a frozen base's states: rows for the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from latent_jax import data
from latent_jax.backbones import Backbone
from latent_jax.core.errors import DataError
from latent_jax.ops import bootstrap
from latent_jax.systems.megacontext import policies, recipe
from latent_jax.systems.megacontext.config import MegaRun
from latent_jax.systems.megacontext.matcher import Finder, States

_EPOCHS = 64  # of the questions; the last one comes again


class Fact(NamedTuple):
    """A question, and where the passage that answers it does so.

    Attributes:
      question: its last tokens.
      passage: number of the passage.
      first: first token of the answer.
      stop: token behind it.
    """

    question: Int[np.ndarray, " q"]
    passage: int
    first: int
    stop: int


def facts(
    config: MegaRun, tokenizer: Any, split: str, passages: int, asked: int
) -> tuple[list[Int[np.ndarray, " t"]], list[Fact]]:
    """Passages that fit a window with a block to spare, and questions about them, both drawn.

    Raises:
      DataError: none fits.
    """
    c, d, size = config.model.matcher, config.data, config.model.layout.block
    rng, room = np.random.default_rng(config.seed), (c.window - 1) * size
    by: dict[str, list[Any]] = {}
    for source in d.qa:
        for example in data.load_squad(source, split, d.root):
            by.setdefault(example.context, []).append(example)
    texts, found = [], []
    for context in rng.permutation(np.asarray(list(by), object)):
        ids = np.asarray(tokenizer.encode(context), np.int32)
        if len(ids) > room:
            continue
        own = by[context]
        for i in rng.permutation(len(own))[:asked]:
            answer, start = own[i].answers[0], own[i].starts[0]
            # Tokenizers join a space to the word after it.
            first = len(tokenizer.encode(context[:start].rstrip())) if start else 0
            stop = min(first + max(len(tokenizer.encode(f" {answer}")), 1), len(ids))
            question = np.asarray(tokenizer.encode(f"\n{own[i].question}"), np.int32)
            found.append(Fact(question[-c.question :], len(texts), min(first, stop - 1), stop))
        texts.append(ids)
        if len(texts) == passages:
            break
    if not found:
        raise DataError(
            f"data.qa: {', '.join(d.qa)} ({split}) has no passage of at most {room} tokens, the "
            "room of model.matcher.window"
        )
    return texts, found


def _padded(rows: Sequence[Int[np.ndarray, " t"]], width: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.stack([np.pad(row, (0, width - len(row))) for row in rows])
    return ids, np.arange(width) < np.asarray([len(row) for row in rows])[:, None]


class MatchRows:
    """What the base makes of the training questions, their passages and of other text, read once.

    Args:
      config: the run.
      backbone: the base.
      progress: called with what is read, how many texts of how many.

    Raises:
      DataError: no passage that fits, or no other text.
    """

    def __init__(self, config: MegaRun, backbone: Backbone, progress: Any = None):
        c, d, self.block = config.model.matcher, config.data, config.model.layout.block
        self.config, self.tokens = config, c.window * self.block
        tokenizer, states = backbone.tokenizer, States(backbone, c.layers)
        texts, self.facts = facts(config, tokenizer, "train", d.passages, d.asked)
        others = recipe.histories(config, tokenizer, "train", self.tokens, d.others)

        def read(name: str, rows: Sequence[np.ndarray], width: int) -> list[np.ndarray]:
            # Texts of like lengths together: the base computes no more than it has to.
            order, found = np.argsort([len(row) for row in rows], kind="stable"), {}
            for at in range(0, len(order), 256):
                part = order[at : at + 256]
                some = [rows[i] for i in part]
                longest = min(-(-len(some[-1]) // self.block) * self.block, width)
                read_ones = states(*_padded(some, max(longest, 1)))
                for i, x in zip(part, read_ones, strict=True):
                    found[i] = x[: len(rows[i])]
                if progress is not None:
                    progress(name, min(at + 256, len(order)), len(order))
            return [found[i] for i in range(len(rows))]

        self.passages = read("passages", texts, self.tokens)
        self.questions = read("questions", [f.question for f in self.facts], c.question)
        self.others = read("other text", list(others), self.tokens)

    def row(self, at: int) -> dict[str, Any]:
        """A question with its passage, which begins anywhere in a block, and other text; both are
        drawn anew in every epoch. NumPy alone: it is called in a reading thread.
        """
        number, size = at % len(self.facts), self.block
        fact, rng = self.facts[number], np.random.default_rng([self.config.seed, at])
        passage, shift = self.passages[fact.passage], int(rng.integers(size))
        stop, width = shift + len(passage), passage.shape[1]
        states = np.zeros((self.tokens, width), np.float16)
        states[shift:stop] = passage
        place = np.arange(self.tokens)
        question = np.zeros((self.config.model.matcher.question, width), np.float16)
        question[: len(fact.question)] = self.questions[number]
        begins = np.arange(self.tokens // size) * size  # a block stands for itself and the next
        holds = (begins <= shift + fact.first) & (shift + fact.stop <= begins + 2 * size)
        return {
            "question": question,
            "question_mask": np.arange(len(question)) < len(fact.question),
            "passage": states, "passage_mask": (shift <= place) & (place < stop),
            "fact": holds, "same": np.int32(fact.passage),
            "other": self.others[int(rng.integers(len(self.others)))],
        }  # fmt: skip

    def stream(self) -> data.BatchIterator:
        """Endless, shuffled, resumable rows."""
        rows, size = _EPOCHS * len(self.facts), self.config.train.batch_size
        return data.pipeline(
            self.row, size, size=rows, seed=self.config.seed,
            remainder="drop" if rows >= size else "wrap",
            process_index=jax.process_index(), process_count=jax.process_count(),
        )  # fmt: skip


def measure(
    finder: Finder, config: MegaRun, tokenizer: Any, blocks: Int[np.ndarray, " t"], count: int,
    progress: Any = None,
) -> dict[str, Any]:  # fmt: skip
    """Ranks of held-out facts among the blocks of another text, by the matcher and by BM25.

    Args:
      blocks: tokens of whole windows of that text.
      count: most questions, each on a passage of its own.

    Returns:
      ``questions.match.top1``, ``.top8``, ``.top64`` (share of questions whose fact is among so
      many blocks) and ``.median_rank``, the same of ``questions.bm25``, with intervals.
    """
    size = finder.block
    texts, found = facts(config, tokenizer, "validation", count, 1)
    index, ids = finder.index(blocks), blocks.reshape(-1, size)
    ranks: dict[str, list[int]] = {"match": [], "bm25": []}
    for number, fact in enumerate(found):
        passage = texts[fact.passage]
        whole = np.pad(passage, (0, -len(passage) % size), mode="edge")
        own = finder.index(whole)
        everything = np.concatenate([index, own]), np.concatenate([ids, whole.reshape(-1, size)])
        begins = np.arange(len(own)) * size
        holds = (begins <= fact.first) & (fact.stop <= begins + 2 * size)
        if not holds.any():
            holds = (begins <= fact.first) & (fact.first < begins + size)
        scores = {
            "match": finder.score(fact.question, everything[0]),
            "bm25": policies.across(
                lambda pair, q=fact.question: policies.bm25(pair, q), everything[1]
            ),
        }
        for name, score in scores.items():
            others, best = score[: len(index)], score[len(index) :][holds].max()
            ranks[name].append(1 + int((others > best).sum()))
        if progress is not None:
            progress("questions", number + 1, len(found))
    return _summary(ranks)


def _summary(ranks: dict[str, list[int]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, values in ranks.items():
        ranked: Float[np.ndarray, " n"] = np.asarray(values, np.float64)
        key = f"questions.{name}"
        found[f"{key}.median_rank"] = float(np.median(ranked))
        for top in (1, 8, 64):
            within = (ranked <= top).astype(np.float64)
            found[f"{key}.top{top}"] = float(within.mean())
            found[f"{key}.top{top}.ci95"] = list(bootstrap.mean_interval(within))
    return found
