"""Several readers of one wire judge each other's answers.

Each reader answers every question from the same latents; the answers together are the candidates.
Each reader then gives each candidate the probability with which it would have said it. Tokens are
not comparable between tokenizers, bytes are: the candidate with the highest mean (over the readers)
log-probability per byte is the joint answer; by the *product* of the probabilities of the whole
answers it is compared as well. The oracle takes whichever candidate is best: no rule of choosing
can be better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from latent_jax.backbones.backbone import Backbone
from latent_jax.backbones.padding import bucket
from latent_jax.data.squad import QAExample
from latent_jax.ops.bootstrap import mean_interval, ratio_interval
from latent_jax.systems.latentwire import baselines, metrics
from latent_jax.systems.latentwire.compressed import Compressed, for_task
from latent_jax.systems.latentwire.given import Asked
from latent_jax.systems.latentwire.prompts import PromptBuilder, pad_rows
from latent_jax.systems.latentwire.reader_lora import reading
from latent_jax.systems.latentwire.scoring import (
    batches,
    context_width,
    score_answers,
    task_embedding,
)

#: How log-probabilities of answers of different lengths are made comparable.
RULES = ("mean", "product")


class Judge(NamedTuple):
    """One reader with what it needs to judge.

    Attributes:
      backbone: the LLM.
      latents: the compressor as it receives from it.
      builder: how questions are put to it.
    """

    backbone: Backbone
    latents: Compressed
    builder: PromptBuilder


def candidates(said: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """The different answers to each question, over all readers.

    Example:
      >>> candidates({"a": ["42", "red"], "b": ["42", "blue"]})
      [['42'], ['red', 'blue']]
    """
    return [list(dict.fromkeys(row)) for row in zip(*said.values(), strict=True)]


def log_probabilities(
    judge: Judge,
    source: PromptBuilder,
    examples: Sequence[QAExample],
    answers: Sequence[Sequence[str]],
    *,
    batch_size: int = 16,
    segment: int = 64,
    task: str | None = "answer",
) -> list[Float[np.ndarray, " c"]]:
    """Log-probability (nats) of each answer to each question, stop token included.

    Args:
      judge: the reader.
      source: prompt builder of the encoder.
      examples: questions.
      answers: candidates of each question.
      task: which learned task embedding follows the latents; None for none.
    """
    flat = [(i, a) for i, row in enumerate(answers) for a in row]
    builder, reader = judge.builder, reading(judge.latents, judge.backbone)
    contexts = [source.context_ids(e.context) for e in examples]
    prompts = [builder.prompt_ids(e.question) for e in examples]
    gold = [builder.answer_ids(a) for _, a in flat]
    width = context_width(max(map(len, contexts)), segment)
    widths = bucket(max(map(len, prompts)), 8), bucket(max(map(len, gold)), 4)
    found = np.zeros(len(flat))
    for at in batches([len(contexts[i]) for i, _ in flat], batch_size):
        rows = [flat[k][0] for k in at]
        ids, mask = pad_rows([contexts[i] for i in rows], width, source.pad_id)
        prompt = pad_rows([prompts[i] for i in rows], widths[0], builder.pad_id, left=True)
        wire = baselines.encode(judge.latents, ids, mask)
        given = baselines.latent_given(
            "latent", reader.decoder, reader.params, for_task(judge.latents, task), wire,
            at.astype(np.int32), jax.random.key(0),
        )  # fmt: skip
        lead = task_embedding(judge.latents, "latent", task, len(at))
        forced = score_answers(
            reader.decoder, reader.params, Asked(given, *prompt, lead),
            *map(jnp.asarray, pad_rows([gold[k] for k in at], widths[1], builder.pad_id)),
        )  # fmt: skip
        found[at] = -np.asarray(forced["nll"])
    ends = np.cumsum([len(row) for row in answers])
    return np.split(found, ends[:-1])


def choose(
    answers: Sequence[Sequence[str]],
    scores: Sequence[Sequence[Float[np.ndarray, " c"]]],
    rule: str,
) -> list[str]:
    """The candidate that the readers together find likeliest, per question.

    Args:
      answers: candidates of each question.
      scores: of each reader, for each question: log-probabilities of its candidates.
      rule: ``mean`` of the readers' log-probabilities per byte, or ``product`` of their
        probabilities of the whole answer.
    """
    chosen = []
    for i, row in enumerate(answers):
        joint = np.mean([reader[i] for reader in scores], axis=0)
        if rule == "mean":  # the stop counts as one byte, so that no answer has none
            joint = joint / np.array([len(a.encode()) + 1 for a in row])
        chosen.append(row[int(np.argmax(joint))])
    return chosen


def rescored(
    judges: Mapping[str, Judge],
    source: PromptBuilder,
    examples: Sequence[QAExample],
    said: Mapping[str, Sequence[str]],
    *,
    name: str = "joint",
    seed: int = 0,
    **options: Any,
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """F1 and exact match of the joint answers, by each of `RULES`, and of the oracle.

    Args:
      judges: the readers.
      source: prompt builder of the encoder.
      examples: questions.
      said: what each reader answered.
      name: prefix of the metrics.
      seed: of the intervals.
      **options: of `log_probabilities`.

    Returns:
      ``<name>.f1.<mean|product|oracle>`` and ``em`` with intervals, ``<name>.f1_share.<…>`` of the
      best single reader's F1, ``<name>.agree`` (share of questions with one candidate); and the
      answers of each.
    """
    answers = candidates(said)
    scores = [
        log_probabilities(judge, source, examples, answers, **options)
        for judge in judges.values()
    ]
    golds = [e.answers for e in examples]
    picked = {rule: choose(answers, scores, rule) for rule in RULES}
    picked["oracle"] = [
        max(row, key=lambda a, gold=gold: metrics.f1(a, gold))
        for row, gold in zip(answers, golds, strict=True)
    ]
    single = max((_each(row, golds, metrics.f1) for row in said.values()), key=np.mean)
    out: dict[str, Any] = {f"{name}.agree": float(np.mean([len(row) == 1 for row in answers]))}
    for rule, row in picked.items():
        for key, score in (("f1", metrics.f1), ("em", metrics.exact_match)):
            values = _each(row, golds, score)
            out[f"{name}.{key}.{rule}"] = float(values.mean())
            out[f"{name}.{key}.{rule}.ci95"] = list(mean_interval(values, seed=seed))
            if key == "f1" and single.any():
                out[f"{name}.f1_share.{rule}"] = float(values.mean() / single.mean())
                interval = ratio_interval(values, single, seed=seed)
                out[f"{name}.f1_share.{rule}.ci95"] = list(interval)
    return out, picked


def _each(said: Sequence[str], golds: Sequence[Sequence[str]], score: Any) -> np.ndarray:
    return np.array([score(a, gold) for a, gold in zip(said, golds, strict=True)])
