"""Shorter answers cut out of what a reader said, by rules that know neither text nor question.

What is scored is what the reader said; these scores stand beside it, under names of their own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from latent_jax.core.errors import ConfigError
from latent_jax.data.squad import QAExample
from latent_jax.systems.latentwire.tally import ArmScores

#: Up to the first of these, unless it stands inside a number or a word (3.5, U.S.A, 1,024).
_END = re.compile(r"[.,;:!?()\[\]\"](?=\s|$)|[;!?()\[\]\"]")
PUNCTUATION = "punctuation"


def check_rules(rules: Sequence[str]) -> None:
    """Refuses rules that do not exist.

    Raises:
      ConfigError: neither ``words:N`` with N of at least 1 nor ``punctuation``.
    """
    for rule in rules:
        if rule != PUNCTUATION and not re.fullmatch(r"words:[1-9]\d*", rule):
            raise ConfigError(
                f"eval.extract: unknown rule {rule!r}; allowed: words:N (the first N words), "
                f"{PUNCTUATION} (up to the first)"
            )


def extract(rule: str, said: str) -> str:
    """The part of an answer that a rule keeps.

    Example:
      >>> extract("words:2", "the old mill at Dunmore"), extract("punctuation", "1,024 men. They")
      ('the old', '1,024 men')
    """
    if rule == PUNCTUATION:
        end = _END.search(said)
        return said if end is None else said[: end.start()].strip()
    return " ".join(said.split()[: int(rule.partition(":")[2])])


def report(
    out: dict[str, Any], name: str, table: Mapping[str, ArmScores], rules: Sequence[str],
    examples: Sequence[QAExample], seed: int,
) -> None:  # fmt: skip
    """Adds ``<name>.extract.<rule>.f1.<arm>`` and the like to ``out``.

    Args:
      table: of every arm, with what it said.
      rules: of ``eval.extract``.
      examples: what was asked.
      seed: of the intervals.
    """
    for rule in dict.fromkeys(rules):
        for arm, scores in table.items():
            cut = ArmScores(len(examples))
            for i, example in enumerate(examples):
                cut.add(i, extract(rule, scores.said[i]), example.answers, {}, i)
            cut.report(out, f"{name}.extract.{rule.replace(':', '')}", arm, seed)
