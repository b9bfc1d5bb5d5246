"""Text in which what was said before is asked for again: where a reader's far history matters.

A section states facts, goes on about something else, and asks for all facts in any order:
``amber: 42. cedar: 17. elm: 90. <prose> cedar? 17 elm? 90 amber? 42``. An answer can be copied by
induction (Olsson et al. 2022), but only from where the fact stands, unless it is asked for again.
Keys are used in turn: the three sections before have none of those of a section.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from latent_jax.core.errors import DataError
from latent_jax.data.lookup import KEYS

# The splits draw from disjoint seed spaces; see `lookup`.
_STREAMS = {"train": 3, "validation": 4}
_SECTIONS = {"train": 3000, "validation": 600}
_RANGES = ("facts", "words", "times")

Range = tuple[int, int]


def recall_text(
    prose: Sequence[str], split: str, facts: Range = (8, 10), words: Range = (40, 80),
    times: Range = (1, 1), sections: int | None = None, seed: int = 0,
) -> str:  # fmt: skip
    """One document of many sections.

    Args:
      prose: words that stand between facts and questions, cut out at random places.
      split: ``train`` or ``validation``, which never share a random stream.
      facts: fewest and most facts of a section.
      words: of prose after them.
      times: how often all its facts are asked for after that.
      sections: default 3,000 for training, 600 for validation.
      seed: same seed, same text.

    Raises:
      DataError: an unknown split, or impossible numbers.
    """
    if split not in _STREAMS:
        raise DataError(f"recall: split '{split}' unknown, use 'train' or 'validation'")
    for name, (low, high) in zip(_RANGES, (facts, words, times), strict=True):
        most = len(KEYS) // 4 if name == "facts" else len(prose) if name == "words" else 1000
        if not 1 <= low <= high <= most:
            raise DataError(f"recall: {name}={low}-{high} must satisfy 1 <= low <= high <= {most}")
    count = _SECTIONS[split] if sections is None else sections
    if count < 1:
        raise DataError(f"recall: sections={count} must be at least 1")
    rng = np.random.default_rng([seed, _STREAMS[split]])
    waiting = [KEYS[i] for i in rng.permutation(len(KEYS))]
    pieces = []
    for _ in range(count):
        size, length, asked = (int(rng.integers(a, b + 1)) for a, b in (facts, words, times))
        keys = waiting[:size]
        waiting = waiting[size:] + [keys[i] for i in rng.permutation(size)]
        values = rng.choice(np.arange(10, 100), size, replace=False)
        begin = int(rng.integers(len(prose) - length + 1))
        pieces += [f"{key}: {value}." for key, value in zip(keys, values, strict=True)]
        pieces += prose[begin : begin + length]
        for _ in range(asked):
            pieces += [f"{keys[i]}? {values[i]}" for i in rng.permutation(size)]
    return " ".join(pieces)


def load_recall(source: str, split: str, prose: Sequence[str]) -> str:
    """The document of a source string such as ``recall:facts=8-10,words=40-80,times=1``.

    Raises:
      DataError: an option that `recall_text` does not have, or a value it cannot read.
    """
    options: dict[str, Range | int] = {}
    for item in filter(None, source.partition(":")[2].split(",")):
        name, _, value = (part.strip() for part in item.partition("="))
        low, _, high = value.partition("-")
        try:
            if name in _RANGES:
                options[name] = int(low), int(high or low)
            elif name in ("sections", "seed"):
                options[name] = int(value)
            else:
                raise ValueError
        except ValueError:
            raise DataError(
                f"source '{source}': '{item}' is not one of facts=8-10, words=40-80, "
                "times=1, sections=3000, seed=0"
            ) from None
    return recall_text(prose, split, **options)
