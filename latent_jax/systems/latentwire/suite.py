"""The final evaluation of a LatentWire run: reconstruction, answers, a demonstration."""

from __future__ import annotations

from typing import Any

import numpy as np

from latent_jax.systems.latentwire import recipe
from latent_jax.systems.latentwire.api import LatentWire
from latent_jax.systems.latentwire.evaluate import evaluate_ae, evaluate_qa


def final_evaluation(
    system: Any, wire: LatentWire, progress: Any = None, tuned: Any = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Held-out reconstruction and answers, each with baselines and controls.

    Args:
      system: the `LatentWireSystem` (its config, data and prompt builder).
      wire: the trained compressor.
      progress: called as progress(what, done, total).
      tuned: ``{arm: soft prompt}`` of tuned controls.

    Returns:
      Flat metrics and artefacts (``samples``, ``demonstration``).
    """
    config = system.config
    e, model, builder = config.eval, config.model, system.builder
    metrics: dict[str, Any] = {}
    samples: list[dict[str, Any]] = []
    if e.segments:
        found, rows = evaluate_ae(
            wire.backbone, wire.latents, system.eval_data()[: e.segments],
            batch_size=e.batch_size, segment=model.segment, seed=config.seed, progress=progress,
        )  # fmt: skip
        metrics |= found
        samples += rows
    demonstration = None
    if e.questions:
        examples, _ = recipe.questions(config, builder, "validation", e.questions)
        found, rows = evaluate_qa(
            wire.backbone, wire.latents, examples, e.arms,
            builder=builder, ratio=model.ratio, max_context=config.data.max_context,
            max_new_tokens=e.max_new_tokens, batch_size=e.batch_size, segment=model.segment,
            seed=config.seed, tuned=tuned, progress=progress,
        )  # fmt: skip
        metrics |= found
        samples += rows
        demonstration = demonstrate(wire, examples[0].context, examples[0].question)
        demonstration["expected"] = examples[0].answers[0]
    metrics |= wire_cost(wire)
    return metrics, {"samples": samples, "demonstration": demonstration}


def demonstrate(wire: LatentWire, text: str, question: str | None) -> dict[str, Any]:
    """Compresses one text, rebuilds it from its latents alone, and asks about it."""
    z = wire.compress(text)
    ids = wire.builder.context_ids(text)
    rebuilt = wire.rebuild_ids(z)[0]
    right = float(np.mean(np.asarray(ids) == np.asarray(rebuilt)))
    latents = int(np.asarray(z.mask).sum())
    shown: dict[str, Any] = {
        "text": text,
        "sent": f"{latents} latents of {z.z.shape[-1]} numbers for {len(ids)} tokens",
        "rebuilt": wire.backbone.tokenizer.decode(rebuilt),
        "tokens rebuilt right": f"{right:.2f}",
    }
    if question is not None:
        shown["question"] = question
        shown["answer from the latents"] = wire.answer(z, question)[0]
    return shown


def wire_cost(wire: LatentWire) -> dict[str, Any]:
    """Numbers per latent and per text token, next to the reader's own cache."""
    reader, c = wire.backbone.config, wire.config
    kv = reader.kv_floats_per_token
    width = c.wire.d_z or (kv if c.encoder.output == "kv" else reader.hidden_size)
    return {
        "wire.d_z": width,
        "wire.floats_per_token": width / c.ratio,
        "wire.cache_floats_per_token": kv,
    }
