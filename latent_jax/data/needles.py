"""Facts hidden in long filler text, with a question that only they answer.

Builders know characters and not tokens; the filler is given (a novel, articles, code). The same
arguments give the same text. An `Episode` says where its facts lie and what a wrong answer would
look like, so that an answer can be scored by its likelihood and by its rank among distractors.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence

import numpy as np

from latent_jax.core.errors import DataError
from latent_jax.data.lookup import KEYS, WORDS
from latent_jax.data.paraphrases import PARAPHRASES

_NAMES = tuple(
    "Ada Boris Clara Dmitri Elena Felix Greta Hugo Irene Jonas Karin Leon Marta Nils Olga Pavel "
    "Rosa Stefan Tilda Ulrich Vera Walter Yvonne Zoltan".split()
)
# Characters from the wanted place within which a fact may slip to the start of a sentence.
_NEAR = 500
_SENTENCE_END = re.compile(r"[.!?][\"')\]]*\s+|\n\s*\n")


@dataclasses.dataclass(frozen=True)
class Episode:
    """A long text with facts in it, and a question about them.

    Attributes:
      kind: the builder's name.
      text: filler with the facts in it.
      question: what follows the text; the answer continues it.
      answer: the right continuation.
      distractors: wrong continuations of the same form.
      needles: character spans of the facts that the answer needs, in the order of the text.
      switches: where the filler changes its topic.
    """

    kind: str
    text: str
    question: str
    answer: str
    distractors: tuple[str, ...]
    needles: tuple[tuple[int, int], ...]
    switches: tuple[int, ...] = ()


def passkey(filler: str, length: int, depth: float, seed: int = 0, distractors: int = 9) -> Episode:
    """A five-digit number said once (Mohtashami & Jaggi 2023).

    Args:
      filler: text around it, repeated if it is too short.
      length: characters of the text, about: it ends where a sentence does.
      depth: place of the fact, 0 at the start and 1 at the end.
      seed: draws the number and where the filler begins.
      distractors: how many other numbers.

    Raises:
      DataError: a filler without text, or a length or depth that cannot be.
    """
    rng = np.random.default_rng([seed, 0])
    numbers = _distinct(rng, 10_000, 100_000, distractors + 1)
    fact = f"The pass key is {numbers[0]}. Remember it: {numbers[0]} is the pass key."
    text, needles = _place(_cut(filler, length, rng), [(depth, fact)])
    question = "\nWhat is the pass key? The pass key is"
    return Episode("passkey", text, question, f" {numbers[0]}", _spaced(numbers[1:]), needles)


def key_value(filler: str, length: int, depth: float, seed: int = 0, pairs: int = 8) -> Episode:
    """Several codes through the text, one of them asked for; the others are the distractors.

    Args:
      filler: text around them.
      length: characters of the text, about.
      depth: place of the code that is asked for; the others are spread at random.
      seed: draws keys, codes and places.
      pairs: how many codes.

    Raises:
      DataError: as `passkey`, or more pairs than there are keys.
    """
    if not 2 <= pairs <= len(KEYS):
        raise DataError(f"key_value: pairs={pairs} must be 2 to {len(KEYS)}")
    rng = np.random.default_rng([seed, 1])
    keys = rng.choice(len(KEYS), pairs, replace=False)
    codes = _distinct(rng, 1_000, 10_000, pairs)
    places = [depth, *rng.uniform(size=pairs - 1)]
    facts = [f"The code of {KEYS[k]} is {c}." for k, c in zip(keys, codes, strict=True)]
    text, spans = _place(_cut(filler, length, rng), list(zip(places, facts, strict=True)))
    question = f"\nWhat is the code of {KEYS[keys[0]]}? The code of {KEYS[keys[0]]} is"
    return Episode("key_value", text, question, f" {codes[0]}", _spaced(codes[1:]), spans[:1])


def paraphrased(
    filler: str, length: int, depth: float, seed: int = 0, distractors: int = 9
) -> Episode:
    """A fact that is asked for in other words (`paraphrases.PARAPHRASES`): no word search finds it.

    Args:
      filler: text around it.
      length: characters of the text, about.
      depth: place of the fact.
      seed: counts through the facts, draws the number and where the filler begins.
      distractors: how many other numbers.

    Raises:
      DataError: as `passkey`.
    """
    rng = np.random.default_rng([seed, 5])
    numbers = _distinct(rng, 10_000, 100_000, distractors + 1)
    said, asked, begun = PARAPHRASES[seed % len(PARAPHRASES)]
    fact = said.format(n=numbers[0])
    text, needles = _place(_cut(filler, length, rng), [(depth, fact)])
    question = f"\n{asked} {begun}"
    return Episode(
        "paraphrased", text, question, f" {numbers[0]}", _spaced(numbers[1:]), needles
    )


def two_hop(
    filler: str, length: int, depths: tuple[float, float], seed: int = 0, chains: int = 4
) -> Episode:
    """Who keeps which box, and what is in the box: two facts apart, and other chains like it.

    Args:
      filler: text around them.
      length: characters of the text, about.
      depths: places of the first and the second fact.
      seed: draws names, boxes, contents and the places of the other chains.
      chains: chains in the text, the one asked for included.

    Raises:
      DataError: as `passkey`, or more chains than there are names.
    """
    if not 2 <= chains <= min(len(_NAMES), len(WORDS)):
        raise DataError(f"two_hop: chains={chains} must be 2 to {min(len(_NAMES), len(WORDS))}")
    rng = np.random.default_rng([seed, 2])
    names = [_NAMES[i] for i in rng.choice(len(_NAMES), chains, replace=False)]
    boxes = [WORDS[i] for i in rng.choice(len(WORDS), chains, replace=False)]
    things = _distinct(rng, 1_000, 10_000, chains)
    facts = []
    for i, (name, box, thing) in enumerate(zip(names, boxes, things, strict=True)):
        first, second = depths if i == 0 else rng.uniform(size=2)
        facts.append((first, f"{name} keeps the {box} box."))
        facts.append((second, f"The {box} box holds the number {thing}."))
    text, spans = _place(_cut(filler, length, rng), facts)
    question = f"\nWhich number is in the box that {names[0]} keeps? It is the number"
    needles = tuple(sorted(spans[:2]))
    return Episode("two_hop", text, question, f" {things[0]}", _spaced(things[1:]), needles)


def straddling(
    filler: str,
    length: int,
    depth: float,
    count: Callable[[str], int],
    block: int = 32,
    seed: int = 0,
    distractors: int = 9,
) -> Episode:
    """A pass key cut by a block's boundary, as near to its middle as words allow.

    Args:
      filler: text around it.
      length: characters of the text, about.
      depth: place of the fact.
      count: tokens of a text, e.g. ``lambda s: len(tokenizer.encode(s))``, counted from its start.
      block: tokens of a block.
      seed: draws the number and where the filler begins.
      distractors: how many other numbers.

    Raises:
      DataError: as `passkey`, or no cut of the filler puts a boundary inside the fact.
    """
    rng = np.random.default_rng([seed, 3])
    numbers = _distinct(rng, 10_000, 100_000, distractors + 1)
    fact = f"The pass key is {numbers[0]}."
    text = _cut(filler, length, rng)
    at = _boundary(text, depth)
    words = [m.start() for m in re.finditer(r"\S+", text[:at])][-2 * block :]
    best: tuple[float, str] | None = None
    # Dropping words just before the fact shifts it by a token or so at a time.
    for end in [at, *words[::-1]]:
        # Tokenizers join a space to the word after it, so the fact starts before its space.
        head = text[:end].rstrip()
        first, last = count(head), count(f"{head} {fact}")
        to_boundary = block - first % block
        off = abs(to_boundary - (last - first) / 2)
        if to_boundary < last - first and (best is None or off < best[0]):
            best = off, head
    if best is None:
        raise DataError(
            f"straddling: no boundary of {block}-token blocks falls inside the fact at depth "
            f"{depth:g}: give a longer text or another depth"
        )
    head = f"{best[1]} "
    whole = f"{head}{fact} {text[at:]}"
    question = "\nWhat is the pass key? The pass key is"
    spans = ((len(head), len(head) + len(fact)),)
    return Episode("straddling", whole, question, f" {numbers[0]}", _spaced(numbers[1:]), spans)


def late_query(
    fillers: Sequence[str], length: int, depth: float, seed: int = 0, pairs: int = 8
) -> Episode:
    """Several codes in a first text, then a text on something else, and only then a question.

    While the first text is read nothing says which code will be asked for, and when it is asked the
    newest text is about something else. The other codes are the distractors.

    Args:
      fillers: the first text (C1) and the second (C2).
      length: characters of both, about; half each.
      depth: place in C1 of the code that is asked for; the others are spread over it at random.
      seed: draws keys, codes, places and where each text begins.
      pairs: how many codes.

    Raises:
      DataError: as `passkey`, not two fillers, or more pairs than there are keys.
    """
    if len(fillers) != 2:
        raise DataError(f"late_query: {len(fillers)} fillers; it needs two, C1 and C2")
    if not 2 <= pairs <= len(KEYS):
        raise DataError(f"late_query: pairs={pairs} must be 2 to {len(KEYS)}")
    rng = np.random.default_rng([seed, 6])
    keys = [KEYS[i] for i in rng.choice(len(KEYS), pairs, replace=False)]
    codes = _distinct(rng, 1_000, 10_000, pairs)
    places = [depth, *rng.uniform(size=pairs - 1)]
    facts = [f"The code of {k} is {c}." for k, c in zip(keys, codes, strict=True)]
    first = _cut(fillers[0], length // 2, rng)
    first, spans = _place(first, list(zip(places, facts, strict=True)))
    first += "\n\n"
    text = first + _cut(fillers[1], length // 2, rng)
    question = f"\nWhat is the code of {keys[0]}? The code of {keys[0]} is"
    return Episode(
        "late_query", text, question, f" {codes[0]}", _spaced(codes[1:]), spans[:1], (len(first),)
    )


def topic_switch(fillers: Sequence[str], length: int, rounds: int = 1, seed: int = 0) -> Episode:
    """Topics in turn, each part with a code of its own, and at the end the first topic again.

    The question asks for the code said in the first part, so a focus has to come back to what it
    blurred meanwhile. The other parts' codes are the distractors.

    Args:
      fillers: texts of different topics, in the order in which they come.
      length: characters of the text, about.
      rounds: how often the topics come before the first one's return.
      seed: draws codes and where each part begins.

    Raises:
      DataError: as `passkey`, fewer than two fillers, or more parts than there are keys.
    """
    parts = len(fillers) * rounds
    if len(fillers) < 2 or not 2 <= parts <= len(KEYS):
        raise DataError(
            f"topic_switch: {len(fillers)} fillers in {rounds} rounds; it needs at least 2 fillers "
            f"and 1 round, and at most {len(KEYS)} parts"
        )
    rng = np.random.default_rng([seed, 4])
    keys = [KEYS[i] for i in rng.choice(len(KEYS), parts, replace=False)]
    codes = _distinct(rng, 1_000, 10_000, parts)
    text, changes, needles = "", [], ()
    for i in range(parts + 1):
        part = _cut(fillers[i % len(fillers)], length // (parts + 1), rng)
        if i:
            text += "\n\n"
            changes.append(len(text))
        if i < parts:
            part, spans = _place(part, [(0.5, f"The code of {keys[i]} is {codes[i]}.")])
            needles = spans if i == 0 else needles
        text += part
    question = f"\nWhat is the code of {keys[0]}? The code of {keys[0]} is"
    return Episode(
        "topic_switch", text, question, f" {codes[0]}", _spaced(codes[1:]), needles, tuple(changes)
    )


def _distinct(rng: np.random.Generator, low: int, high: int, count: int) -> list[int]:
    if not 1 <= count <= (high - low) // 2:
        raise DataError(f"{count} distinct numbers of {low} to {high - 1} cannot be drawn")
    return [int(x) for x in rng.choice(np.arange(low, high), count, replace=False)]


def _spaced(numbers: Sequence[int]) -> tuple[str, ...]:
    return tuple(f" {number}" for number in numbers)


def _cut(filler: str, length: int, rng: np.random.Generator) -> str:
    """About ``length`` characters from a random sentence of the filler on, going round its end."""
    filler = filler.strip()
    if not filler:
        raise DataError("the filler holds no text: give one with sentences in it")
    if length < 1:
        raise DataError(f"length={length} must be at least 1 character")
    starts = [0, *(m.end() for m in _SENTENCE_END.finditer(filler))]
    start = int(starts[rng.integers(len(starts))])
    rest = filler[start:] + "\n\n"
    text = rest + (filler + "\n\n") * max(0, -(-(length - len(rest)) // (len(filler) + 2)))
    return text[: _boundary(text, length / len(text)) or length].strip()


def _boundary(text: str, depth: float) -> int:
    """The sentence start nearest to a depth; in text without sentences nearby, the word start."""
    if not 0 <= depth <= 1:
        raise DataError(f"depth={depth} must be 0 to 1")
    wanted = round(depth * len(text))
    if depth in (0, 1):
        return wanted
    for pattern in (_SENTENCE_END, re.compile(r"\s+")):
        ends = [m.end() for m in pattern.finditer(text, max(0, wanted - _NEAR), wanted + _NEAR)]
        if ends:
            return min(ends, key=lambda end: abs(end - wanted))
    return wanted


def _place(
    text: str, facts: Sequence[tuple[float, str]]
) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Puts facts at their depths; returns their spans in the order given."""
    at = [(_boundary(text, depth), i) for i, (depth, _) in enumerate(facts)]
    pieces, done, size = [], 0, 0
    spans: dict[int, tuple[int, int]] = {}
    for place, i in sorted(at):
        before = text[done:place]
        lead = before if not before or before[-1].isspace() else before + " "
        fact = facts[i][1]
        spans[i] = (size + len(lead), size + len(lead) + len(fact))
        pieces += [lead, fact, " "]
        size += len(lead) + len(fact) + 1
        done = place
    return "".join(pieces) + text[done:], tuple(spans[i] for i in range(len(facts)))
