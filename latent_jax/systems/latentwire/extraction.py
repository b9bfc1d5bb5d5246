"""Shorter answers cut out of what a reader said, by rules that know neither text nor question, or
by a trained head (`span_head`).

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
#: The span that a trained head picks.
SPAN = "span"


def check_rules(rules: Sequence[str]) -> None:
    """Refuses rules that do not exist.

    Raises:
      ConfigError: none of ``words:N`` with N of at least 1, ``punctuation`` and ``span``.
    """
    for rule in rules:
        if rule not in (PUNCTUATION, SPAN) and not re.fullmatch(r"words:[1-9]\d*", rule):
            raise ConfigError(
                f"eval.extract: unknown rule {rule!r}; allowed: words:N (the first N words), "
                f"{PUNCTUATION} (up to the first), {SPAN} (a trained head's)"
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
    examples: Sequence[QAExample], seed: int, spans: Mapping[str, Mapping[int, str]],
) -> None:  # fmt: skip
    """Adds ``<name>.extract.<rule>.f1.<arm>`` and the like to ``out``.

    Args:
      table: of every arm, with what it said.
      rules: of ``eval.extract``.
      examples: what was asked.
      seed: of the intervals.
      spans: of every arm, what the head kept of each answer, for the rule ``span``.
    """
    for rule in dict.fromkeys(rules):
        for arm, scores in table.items():
            cut = ArmScores(len(examples))
            for i, example in enumerate(examples):
                kept = spans[arm][i] if rule == SPAN else extract(rule, scores.said[i])
                cut.add(i, kept, example.answers, {}, i)
            cut.report(out, f"{name}.extract.{rule.replace(':', '')}", arm, seed)
