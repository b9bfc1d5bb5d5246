"""The final evaluation of further readers of the wire, and of all of them together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latent_jax.data.squad import QAExample
from latent_jax.systems.latentwire import baselines
from latent_jax.systems.latentwire.api import LatentWire
from latent_jax.systems.latentwire.config import MAIN, LatentWireRun, ModelConfig
from latent_jax.systems.latentwire.evaluate import evaluate_ae, evaluate_qa
from latent_jax.systems.latentwire.prompts import PromptBuilder
from latent_jax.systems.latentwire.readers import Reader
from latent_jax.systems.latentwire.rescore import Judge, rescored
from latent_jax.systems.latentwire.span_training import cutter
from latent_jax.systems.latentwire.tally import PROMPTED, base_arm
from latent_jax.systems.latentwire.transcribe import own_tokens, room
from latent_jax.systems.latentwire.tuned import train_controls
from latent_jax.systems.latentwire.wire import places


def own_ratio(
    c: ModelConfig, encoder: PromptBuilder, reader: Reader, texts: Sequence[str]
) -> float:
    """Tokens of the reader's own per latent that it is given: the budget of its text arms."""
    ours = [len(encoder.context_ids(t)) for t in texts]
    width = c.segment * -(-max(ours) // c.segment)
    mask, _ = places(ours, width, c.ratio, c.segment, reader.config.private)
    theirs = sum(len(reader.builder.context_ids(t)) for t in texts)
    return theirs / int(mask.sum())


def evaluate_readers(
    system: Any, wire: LatentWire, main: Sequence[dict[str, Any]], progress: Any = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Every further reader with its own baselines and controls, then all readers jointly.

    Args:
      system: the `LatentWireSystem`.
      wire: the trained compressor.
      main: the main reader's answers, of `evaluate_qa`.
      progress: called as progress(what, done, total).

    Returns:
      ``ae.<reader>.*``, ``squad.<reader>.x<ratio>.*`` (and of a second source of questions, see
      `LatentWireSystem.question_sets`), and ``joint.*`` where there are questions; and samples.
    """
    config = system.config
    e, model = config.eval, config.model
    shared = {"batch_size": e.batch_size, "segment": model.segment}
    task = "answer" if "answer" in wire.tasks else None
    found: dict[str, Any] = {}
    samples: list[dict[str, Any]] = []
    sets = system.question_sets() if e.questions else {}
    examples = sets.get("squad", [])
    judges = {MAIN: Judge(wire.backbone, wire.latents, wire.builder)}
    together = bool(examples) and "latent" in e.arms
    said = {MAIN: [row["predictions"]["latent"] for row in main]} if together else {}
    for label, reader in system.readers.items():
        latents = reader.latents(wire.latents)
        if e.segments and "reconstruct" in wire.tasks:
            segments = system.eval_data()[: e.segments]
            rows = own_tokens(wire.backbone.tokenizer, reader, segments)
            scores, texts = evaluate_ae(
                reader.backbone, latents, segments, said=rows, name=f"ae.{label}",
                seed=config.seed, progress=progress, cramming_steps=e.cramming_steps, **shared,
            )  # fmt: skip
            found |= scores
            samples += _by(label, texts)
        asking = {
            "max_context": config.data.max_context, "max_new_tokens": longest(system, reader),
            "seed": config.seed, "sink": reader.sink, "source": wire.builder, "progress": progress,
            **shared,
        }  # fmt: skip
        listener = None
        if sets:
            listener = cutter(system, reader.backbone, reader.builder, ratio=model.ratio, **asking)
        for name, asked in sets.items():
            ratio = own_ratio(model, wire.builder, reader, [x.context for x in asked])
            scores, answers = evaluate_qa(
                reader.backbone, latents, asked, text_arms(e.arms), builder=reader.builder,
                ratio=ratio, tuned=system.tuned_by.get(label), task=task,
                name=f"{name}.{label}.x{model.ratio:g}", cramming_steps=e.cramming_steps,
                extract=e.extract, nudges=e.nudges, listener=listener, **asking,
            )  # fmt: skip
            found |= scores
            if name == "squad":
                samples += _by(label, answers)
                if together:
                    said[label] = [row["predictions"]["latent"] for row in answers]
        judges[label] = Judge(reader.backbone, latents, reader.builder)
    if together:
        joint, picked = rescored(
            judges, wire.builder, examples, said, seed=config.seed, task=task, **shared
        )
        found |= joint
        samples += [_joint(x, i, said, picked) for i, x in enumerate(examples)]
    return found, samples


def longest(system: Any, reader: Reader) -> int:
    """Room for an answer in the reader's own tokens."""
    return int(np.ceil(system.config.eval.max_new_tokens * reader.config.tokens))


def text_arms(arms: Sequence[str]) -> list[str]:
    """Those that another reader has too: not what the main reader rebuilds or is prompted with."""
    return [a for a in arms if base_arm(a) != baselines.REBUILT and not a.endswith(PROMPTED)]


def alone(config: LatentWireRun, reader: Reader, ratio: float) -> LatentWireRun:
    """The run as it would be for a reader alone, in its own tokens: its tuned controls'."""
    data, own = config.data, reader.config
    segment = room(own, config.model.segment)
    length = data.max_context
    length = room(own, length) if length <= config.model.segment else segment * -(
        -room(own, length) // segment
    )
    return dataclasses.replace(
        config,
        prompt=own.prompt or config.prompt,
        model=dataclasses.replace(
            config.model, segment=segment, ratio=ratio, readers={}, private=0, start=None
        ),
        data=dataclasses.replace(
            data, max_context=length, max_prompt=room(own, data.max_prompt),
            max_answer=room(own, data.max_answer), read_by=(), turns="summed",
        ),
    )  # fmt: skip


def train_reader_controls(
    system: Any, fit: Callable[..., Any], out: Path, mesh: Any
) -> dict[str, dict[str, Any]]:
    """The soft prompts of ``eval.tuned`` for each further reader, in ``out/<reader>``.

    Args:
      system: the `LatentWireSystem`.
      fit: see `tuned.train_controls`.
      out: folder of the controls.
      mesh: device mesh.
    """
    found = {}
    for label, reader in system.readers.items():
        texts = [x.context for x in system.held_out_questions()]
        ratio = own_ratio(system.config.model, system.builder, reader, texts)
        own = alone(system.config, reader, ratio)
        found[label] = train_controls(
            own, reader.backbone, reader.builder, system.config.eval.tuned, fit, out / label, mesh
        )
    return found


def _by(label: str, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Samples of another reader: what is said of the main one does not count them in."""
    return [{**row, "kind": f"{row['kind']} by {label}"} for row in rows]


def _joint(example: QAExample, i: int, said: Any, picked: Any) -> dict[str, Any]:
    return {
        "kind": "joint answer", "id": example.id, "question": example.question,
        "answers": list(example.answers),
        "predictions": {name: rows[i] for name, rows in {**said, **picked}.items()},
    }  # fmt: skip
