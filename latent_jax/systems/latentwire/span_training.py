"""The span head of an evaluation, trained on questions of the training split."""

from __future__ import annotations

from typing import Any

from latent_jax.backbones.backbone import Backbone
from latent_jax.systems.latentwire import recipe, span_head
from latent_jax.systems.latentwire.evaluate import evaluate_qa
from latent_jax.systems.latentwire.extraction import SPAN
from latent_jax.systems.latentwire.prompts import PromptBuilder


def cutter(
    system: Any, reader: Backbone, builder: PromptBuilder, **options: Any
) -> span_head.Cutter | None:
    """What cuts a reader's answers as ``eval.extract: [span]`` asks; None where it does not.

    Args:
      system: the `LatentWireSystem`.
      reader: the frozen LLM, whose greedy answers from full text are learned from.
      builder: of its prompts.
      options: of `evaluate_qa`, as they are of the evaluation.

    Raises:
      DataError: no question of the training split fits.
    """
    config = system.config
    if SPAN not in config.eval.extract:
        return None
    examples, _ = recipe.questions(
        config, system.builder, "train", config.eval.span_questions
    )
    heard = span_head.Collector(builder)
    evaluate_qa(
        reader, None, examples, (span_head.TAUGHT_BY,), builder=builder, score=False,
        listener=heard, name="answers for the span head", **options,
    )  # fmt: skip
    head = span_head.fit(heard.spoken, config.eval.span_steps, config.seed)
    return span_head.Cutter(builder, head)
