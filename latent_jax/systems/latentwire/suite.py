"""The final evaluation of a LatentWire run: reconstruction, answers, a demonstration."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from latent_jax.core.errors import DataError
from latent_jax.systems.latentwire import annealing, bits, diagnose, reader_lora
from latent_jax.systems.latentwire.api import LatentWire, compress_ids
from latent_jax.systems.latentwire.beside_text import beside_text
from latent_jax.systems.latentwire.continuation import continuable, evaluate_continuation
from latent_jax.systems.latentwire.evaluate import evaluate_ae, evaluate_qa
from latent_jax.systems.latentwire.findings import findings
from latent_jax.systems.latentwire.latency import first_token
from latent_jax.systems.latentwire.reconstruct import rebuildable
from latent_jax.systems.latentwire.several import evaluate_readers
from latent_jax.systems.latentwire.span_training import cutter
from latent_jax.systems.latentwire.symptoms import said_from_latents
from latent_jax.train.diagnose import term_gradients

_BATCHES = 8  # among which the kinds of training batches are looked for


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
    # Without the task's embedding nothing asks the reader for the text.
    if e.segments and "reconstruct" in wire.tasks:
        found, rows = evaluate_ae(
            wire.backbone, wire.latents, system.eval_data()[: e.segments],
            batch_size=e.batch_size, segment=model.segment, seed=config.seed, progress=progress,
            arms=("latent", *(("cramming",) if "cramming" in e.arms else ()), "shuffled", "zero",
                  *rebuildable(e.arms)),
            cramming_steps=e.cramming_steps, ratio=model.ratio, sink=wire.sink,
        )  # fmt: skip
        metrics |= found
        samples += rows
    if e.continuations:
        metrics |= evaluate_continuation(
            wire.backbone, wire.latents, *system.windows(), continuable(e.arms),
            ratio=model.ratio, batch_size=e.batch_size, segment=model.segment, seed=config.seed,
            task="continue" if "continue" in wire.tasks else None, sink=wire.sink,
            progress=progress,
        )  # fmt: skip
    demonstration, answered, sets = None, [], system.question_sets() if e.questions else {}
    asking = {
        "ratio": model.ratio, "max_context": config.data.max_context,
        "max_new_tokens": e.max_new_tokens, "batch_size": e.batch_size, "segment": model.segment,
        "seed": config.seed, "sink": wire.sink, "progress": progress,
    }  # fmt: skip
    listener = cutter(system, wire.backbone, builder, **asking) if sets else None
    for name, examples in sets.items():
        found, rows = evaluate_qa(
            wire.backbone, wire.latents, examples, e.arms, builder=builder, tuned=tuned, name=name,
            task="answer" if "answer" in wire.tasks else None, cramming_steps=e.cramming_steps,
            rebuild_task="reconstruct" if "reconstruct" in wire.tasks else None, faults=e.faults,
            extract=e.extract, nudges=e.nudges, listener=listener, **asking,
        )  # fmt: skip
        metrics |= found
        if name != "squad":  # findings are about the task that was trained
            samples += [{**row, "kind": f"answer in {name}"} for row in rows]
            continue
        samples += rows
        answered = rows
        demonstration = demonstrate(wire, examples[0].context, examples[0].question)
        demonstration["expected"] = examples[0].answers[0]
    if system.readers:
        found, rows = evaluate_readers(system, wire, answered, progress)
        metrics |= found
        samples += rows
    metrics |= wire_cost(wire) | latent_numbers(system, wire)
    metrics |= reader_lora.numbers(wire.config, wire.params)
    if e.cost_rows:
        asked = [x.question for x in system.held_out_questions()] if e.questions else ["Who?"]
        asked = list(itertools.islice(itertools.cycle(asked), e.cost_rows))
        metrics |= first_token(wire, asked, e.cost_tokens, e.cost_pairs, config.seed, progress)
    if e.wire_bits:
        exact = dict(metrics), [row["f1"]["latent"] for row in answered if "latent" in row["f1"]]
        metrics |= quality_against_bits(system, wire, exact, progress)
    return metrics, {"samples": samples, "demonstration": demonstration}


def quality_against_bits(
    system: Any,
    wire: LatentWire,
    exact: tuple[dict[str, Any], list[float]] = ({}, []),
    progress: Any = None,
) -> dict[str, Any]:
    """The latent arm once per number format of ``eval.wire_bits``, on the same texts.

    Args:
      system: the `LatentWireSystem`.
      wire: the trained compressor.
      exact: metrics of the latents as they are and F1 of every question, where they are known:
        what is not is measured.
      progress: called as progress(what, done, total).
    """
    config, e = system.config, system.config.eval
    centre = system.centre(wire.latents) if wire.centre is None else wire.centre
    centre = None if centre is None else jnp.asarray(centre)
    rebuilds = bool(e.segments) and "reconstruct" in wire.tasks
    known = (len(exact[1]) > 0) == bool(e.questions) and ("ae.nll" in exact[0]) == rebuilds
    scores, ratio = {"fp32": exact} if known else {}, config.model.ratio
    memory = bits.Memory()
    for form in dict.fromkeys(("fp32", *e.wire_bits)):
        if form not in scores:
            sent = bits.Rounded(wire.latents, centre, form, memory)
            scores[form] = _scored(system, wire, sent, rebuilds, progress)
    exact = scores["fp32"]
    measured = exact[0].get("squad.ratio", exact[0].get("ratio", ratio))
    scores = {form: scores[form] for form in e.wire_bits}
    return bits.report(wire.width, measured, scores, exact[1], config.seed)


def _scored(system, wire, sent, rebuilds, progress) -> tuple[dict[str, Any], list[float]]:
    """Metrics of latents as they were sent, and F1 of every question."""
    config, e = system.config, system.config.eval
    shared = {"batch_size": e.batch_size, "segment": config.model.segment, "seed": config.seed}
    found: dict[str, Any] = {}
    if rebuilds:
        found, _ = evaluate_ae(
            wire.backbone, sent, system.eval_data()[: e.segments], arms=("latent",), samples=0,
            progress=progress, **shared,
        )  # fmt: skip
    if not e.questions:
        return found, []
    answers, rows = evaluate_qa(
        wire.backbone, sent, system.held_out_questions(), ("latent",),
        builder=system.builder, ratio=config.model.ratio, max_context=config.data.max_context,
        max_new_tokens=e.max_new_tokens, sink=wire.sink, score=False, progress=progress,
        task="answer" if "answer" in wire.tasks else None, **shared,
    )  # fmt: skip
    return found | answers, [row["f1"]["latent"] for row in rows]


def latent_numbers(system: Any, wire: LatentWire, texts: int = 64) -> dict[str, float]:
    """``latent.*``: spread, norm and rank of the latents of held-out segments, and what the reader
    gets of them beside what it makes of the text.
    """
    ids = jnp.asarray(system.eval_data()[:texts, : system.config.model.segment])
    mask = jnp.ones(ids.shape, bool)
    z = compress_ids(wire.latents, ids, mask)
    shown = np.asarray(wire.latents.module.informative(z))
    statistics = diagnose.latent_statistics(shown, np.asarray(z.mask))
    statistics |= beside_text(wire, z, ids, mask)
    return {f"latent.{name}": value for name, value in statistics.items()}


def diagnosis(system: Any, wire: LatentWire, run: str | Path | None) -> dict[str, Any]:
    """Numbers about latents, parameters and answers, and findings from them and a run's log."""
    numbers = latent_numbers(system, wire)
    log, results, samples = [], {}, []
    if run is not None:
        path = Path(run)
        if (path / "metrics.jsonl").is_file():
            log = diagnose.read_log(path / "metrics.jsonl")
        if (path / "results.json").is_file():
            results = json.loads((path / "results.json").read_text(encoding="utf-8"))
        if (path / "samples.jsonl").is_file():
            samples = diagnose.read_log(path / "samples.jsonl")
    found = found_in(results | numbers, samples, log)
    # A LoRA or a gate that has stayed where it began shows here.
    numbers |= {f"norm.{part}": float(optax.global_norm(x)) for part, x in wire.params.items()}
    if said := said_from_latents(samples):
        told = diagnose.predictions(said)
        for name in ("distinct", "distinct_words", "empty", "repetitive", "commonest_share"):
            numbers[f"answers.{name}"] = told[name]
    told = {} if (judged := annealing.verdict(log)) is None else {"annealing": judged.line()}
    told |= {} if wire.not_frozen is None else {"reader": wire.not_frozen}
    return {**numbers, **told, "findings": found or "nothing known is wrong"}


def found_in(
    results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]],
    log: Sequence[Mapping[str, Any]],
) -> list[str]:  # fmt: skip
    """Findings of a run from its files alone: the statistics are among its results."""
    statistics = {
        name.removeprefix("latent."): x for name, x in results.items() if name.startswith("latent.")
    }
    return findings(statistics, results, samples, log)


def trained_again(system: Any, variables: Mapping[str, Any], frozen: Any) -> dict[str, float]:
    """``train.<term>`` of the weights that were evaluated, on the first training batch, as in an
    evaluation: what is evaluated is what was trained, or this is far above the end of the log.

    Empty where nothing was trained, or its data is not here.
    """
    if not system.config.train.steps:
        return {}
    try:
        batch = next(system.train_data("main", None))
    except DataError:
        return {}

    @jax.jit
    def terms(variables, frozen, batch):
        return system.loss_terms(variables, frozen, batch, {}, False)[0]

    found = terms(variables, frozen, batch)
    return {f"train.{name}": float(term.value) for name, term in found.items() if term.count}


def gradients(system: Any, variables: Mapping[str, Any], frozen: Any) -> dict[str, float]:
    """What each weighted term asks of the parameters, on the first training batch of every kind.

    With the weights of the last step: ``gradient.norm.<term>``, ``gradient.<group>.<term>`` of one
    group of parameters, and ``gradient.cosine.<term>`` to the gradient of the whole loss.
    """
    found: dict[str, float] = {}
    seen: set[frozenset[str]] = set()
    last = max(system.config.train.steps - 1, 0)
    for batch in itertools.islice(system.train_data("main", None), _BATCHES):
        if frozenset(batch) in seen:
            continue
        seen.add(frozenset(batch))
        rows = term_gradients(system, variables, frozen, batch, step=last)
        for term, row in rows.items():
            if not row["weight"]:
                continue
            for name in row.keys() - {"value", "weight"}:
                what = name.removeprefix("grad_").removeprefix("norm.")
                found.setdefault(f"gradient.{what}.{term}", row[name])
    return dict(sorted(found.items()))


def demonstrate(wire: LatentWire, text: str, question: str | None) -> dict[str, Any]:
    """Compresses one text, rebuilds it from its latents alone, and asks about it."""
    z = wire.encode(text)
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
    if wire.not_frozen is not None:
        shown["reader"] = wire.not_frozen
    if question is not None:
        shown["question"] = question
        shown["answer from the latents"] = wire.answer(z, question)[0]
    return shown


def wire_cost(wire: LatentWire) -> dict[str, Any]:
    """Numbers (and bits, where they have levels) per latent and per text token, next to the
    reader's own cache.
    """
    c, bits_each = wire.config, {}
    if c.wire.levels:
        bits_each["wire.bits_per_token"] = wire.width * math.log2(c.wire.levels) / c.ratio
    if c.wire.codes:
        bits_each["wire.bits_per_token"] = c.wire.stages * math.log2(c.wire.codes) / c.ratio
    return bits_each | {
        "wire.d_z": wire.width,
        "wire.floats_per_token": wire.width / wire.config.ratio,
        "wire.cache_floats_per_token": wire.backbone.config.kv_floats_per_token,
    }
