"""Histories of whole blocks with facts hidden in them, built of the texts of `data.needles`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from latent_jax.core.errors import DataError
from latent_jax.data import needles

# Characters of what a builder writes; the rest of a history is filler.
_PART = 1200
# How often the two topics take turns before the first one comes back; each turn has a code.
_ROUNDS = 4
# Kinds whose filler changes its topic.
SWITCHING = ("late_query", "topic_switch")


class Filler(NamedTuple):
    """Text around facts, and its tokens."""

    text: str
    ids: Int[np.ndarray, " f"]


class Episode(NamedTuple):
    """A history with a question.

    Attributes:
      ids: whole blocks of tokens.
      hops: blocks of each fact that the answer needs, in the order of the history.
      question: tokens that follow.
      answers: continuations, the right one first.
    """

    ids: Int[np.ndarray, " t"]
    hops: list[list[int]]
    question: Int[np.ndarray, " q"]
    answers: list[Int[np.ndarray, " a"]]

    @property
    def needle(self) -> list[int]:
        """Blocks that the answer needs."""
        return sorted({block for hop in self.hops for block in hop})


class _Room(NamedTuple):
    """Where filler goes: before which character, of which topic, and its share of what is left."""

    at: int
    topic: int
    share: float


def evenly(rows: int) -> list[float]:
    """So many depths, evenly spread."""
    return [(row + 0.5) / rows for row in range(rows)]


def episodes(
    kind: str, filler: Filler, topics: Sequence[Filler], tokenizer: Any, block: int, blocks: int,
    depths: Iterable[float], seed: int = 0, unit: int | None = None,
) -> Iterator[Episode]:  # fmt: skip
    """Episodes of one kind, one for each depth.

    The depth is that of the fact among the filler; of ``two_hop`` that of the first fact in the
    first half of the history, the second follows half a history later; where the topic switches,
    that within the stretch of text that holds the fact.

    Args:
      kind: one of `eval_config.TASKS`.
      filler: around the facts; its tokens are repeated if they are too few.
      topics: the same where the topic switches, two of them.
      tokenizer: of the base.
      block: tokens of a block.
      blocks: of a history.
      depths: 0 the start, 1 the end.
      seed: of the first; the others count up.
      unit: tokens; what stands around a fact ends, and the filler is shifted, by whole ones, so
        that histories share what a reader makes of so many tokens; none: as it comes.

    Raises:
      DataError: a history too short for the part with the facts.
    """
    fillers = topics if kind in SWITCHING else [filler]
    step = unit or block
    for row, depth in enumerate(depths):
        built = _built(kind, [f.text for f in fillers], tokenizer, block, seed + row)
        rooms, facts = _rooms(kind, built, depth), [_whole(built.text, s) for s in built.needles]
        # Tokenizers join a space to the word after it.
        rooms = [room._replace(at=_word(built.text, room.at)) for room in rooms]
        parts = [
            _encoded(tokenizer, built.text, facts, room.at, after.at)
            for room, after in zip(rooms, [*rooms[1:], _Room(len(built.text), 0, 0)], strict=True)
        ]
        if unit:  # filled up with what follows
            parts = [_up_to(part, unit, fillers[0].ids) for part in parts]
        left, total = blocks * block - sum(len(ids) for ids, _ in parts), blocks * block
        if left < 0:
            raise DataError(
                f"eval.tasks: {kind} takes {total - left} tokens and a history of {blocks} blocks "
                f"has {total}: raise eval.task_blocks (or eval.passkey_blocks)"
            )
        # Whole blocks before a part keep a cut at a block's boundary where it is.
        sizes = [round(room.share * left) // step * step for room in rooms]
        used, pieces, spans, at = [0] * len(fillers), [], [], 0
        ends = [*zip((r.topic for r in rooms), sizes, parts, strict=True)]
        ends.append((_last(kind), left - sum(sizes), (np.zeros(0, np.int32), [])))
        for topic, size, (ids, inside) in ends:
            own = fillers[topic].ids
            own = own[: len(own) // unit * unit] if unit else own
            own = np.roll(own, -(unit or 17) * row - used[topic])
            used[topic] += size
            pieces += [np.resize(own, size), ids]
            spans += [(at + size + first, at + size + stop) for first, stop in inside]
            at += size + len(ids)
        yield Episode(
            np.concatenate(pieces),
            [list(range(first // block, (stop - 1) // block + 1)) for first, stop in spans],
            np.asarray(tokenizer.encode(built.question), np.int32),
            [np.asarray(tokenizer.encode(a), np.int32) for a in (built.answer, *built.distractors)],
        )


def _built(
    kind: str, texts: Sequence[str], tokenizer: Any, block: int, seed: int
) -> needles.Episode:
    count: Callable[[str], int] = lambda s: len(tokenizer.encode(s))  # noqa: E731
    if kind == "straddling":
        return needles.straddling(texts[0], _PART, 0.5, count, block, seed)
    if kind == "two_hop":
        return needles.two_hop(texts[0], _PART, (0.25, 0.75), seed)
    if kind == "topic_switch":
        return needles.topic_switch(texts, _PART, _ROUNDS, seed)
    if kind == "late_query":
        return needles.late_query(texts, _PART, 0.5, seed)
    return getattr(needles, kind)(texts[0], _PART, 0.5, seed)


def _rooms(kind: str, built: needles.Episode, depth: float) -> list[_Room]:
    """Where a part is opened for filler; what is left of it follows the part."""
    if kind == "two_hop":
        return [_Room(0, 0, depth / 2), _Room(built.needles[0][1], 0, 0.5)]
    if not built.switches:
        return [_Room(0, 0, depth)]
    share = 1 / (len(built.switches) + 1)
    # The first stretch ends where the topic first switches, and so on.
    later = [_Room(at, i % 2, share) for i, at in enumerate(built.switches)]
    later[0] = later[0]._replace(share=(1 - depth) * share)
    return [_Room(0, 0, depth * share), *later]


def _last(kind: str) -> int:
    """The topic with which a history ends."""
    return 1 if kind == "late_query" else 0


def _word(text: str, at: int) -> int:
    return at - (text[at - 1 : at] == " ")


def _whole(text: str, span: tuple[int, int]) -> tuple[int, int]:
    return _word(text, span[0]), span[1]


def _encoded(
    tokenizer: Any, text: str, facts: Sequence[tuple[int, int]], start: int, stop: int
) -> tuple[Int[np.ndarray, " n"], list[tuple[int, int]]]:
    """Tokens of a piece of text, and which of them each fact in it has."""
    here = [fact for fact in facts if start <= fact[0] < stop]
    marks = [start, *(at for fact in here for at in fact), stop]
    pieces = [
        np.asarray(tokenizer.encode(text[a:b]) if a < b else [], np.int32)
        for a, b in zip(marks[:-1], marks[1:], strict=True)
    ]
    ends = np.cumsum([len(piece) for piece in pieces]).tolist()
    spans = [(ends[2 * i], ends[2 * i + 1]) for i in range(len(here))]
    return np.concatenate(pieces), spans


def _up_to(part: tuple[Int[np.ndarray, " n"], list], unit: int, ids: Int[np.ndarray, " f"]):
    """A part with filler after it, up to whole units."""
    return np.concatenate([part[0], ids[: -len(part[0]) % unit]]), part[1]
