"""Scores of answers in words: exact match and F1 of SQuAD v1.1's official script."""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation)


def normalise(text: str) -> str:
    """SQuAD v1.1's ``normalize_answer``: lower case, no punctuation, no articles, single spaces.

    Example:
      >>> normalise("The  cat's (black) hat.")
      'cats black hat'
    """
    text = "".join(c for c in text.lower() if c not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the normalised prediction equals any normalised gold answer."""
    guess = normalise(prediction)
    return float(any(guess == normalise(a) for a in answers))


def token_f1(prediction: str, answer: str) -> float:
    """Bag-of-words F1 of SQuAD v1.1's official script (an empty side scores 0)."""
    guess, gold = normalise(prediction).split(), normalise(answer).split()
    same = sum((collections.Counter(guess) & collections.Counter(gold)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(guess), same / len(gold)
    return 2 * precision * recall / (precision + recall)


def f1(prediction: str, answers: Sequence[str]) -> float:
    """The best `token_f1` over the gold answers."""
    return max((token_f1(prediction, a) for a in answers), default=0.0)
