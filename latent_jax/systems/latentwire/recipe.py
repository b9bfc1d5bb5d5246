"""LatentWire's data: three tasks in one record format, mixed batch by batch.

Every record is ``context`` (what is compressed), ``inputs`` (what the reader is fed after the
latents, teacher-forced) and ``supervised`` (which of the inputs it must predict). Reconstruction,
continuation and answers differ in nothing else, so they share one loss and one compiled step per
shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np

from latent_jax import data
from latent_jax.core.errors import DataError
from latent_jax.data.squad import QAExample
from latent_jax.systems.latentwire.config import TASKS, LatentWireRun
from latent_jax.systems.latentwire.prompts import PromptBuilder


def text_segments(
    config: LatentWireRun, tokenizer, split: str, limit: int, continuation: int = 0,
    length: int | None = None,
):  # fmt: skip
    """Token windows of ``data.text``, held-out ones of ``eval.text`` if that is given:
    ``[n, length + continuation]``.
    """
    d, e = config.data, config.eval
    length, text = length or d.length, d.text
    if split != "train":
        length, text = e.length or length, e.text or text
    return data.load_segments(
        tokenizer, text, split, length, limit,
        seed=config.seed, continuation=continuation, root=d.root,
    )  # fmt: skip


def questions(
    config: LatentWireRun, builder: PromptBuilder, split: str, limit: int
) -> tuple[list[QAExample], list[list[int]]]:
    """Shuffled examples whose passage fits ``data.max_context``, with their context tokens."""
    d = config.data
    examples = data.load_squad(d.qa, split, d.root)
    order = np.random.default_rng([config.seed, 7]).permutation(len(examples))
    kept, ids = [], []
    for i in order:
        context = builder.context_ids(examples[i].context)
        if len(context) <= d.max_context:
            kept.append(examples[i])
            ids.append(context)
        if len(kept) == limit:
            break
    if not kept:
        raise DataError(
            f"data.qa={d.qa}: no passage of the {split} split fits data.max_context="
            f"{d.max_context} tokens"
        )
    return kept, ids


def _record(
    context: Sequence[int], inputs: Sequence[int], supervised: int
) -> dict[str, np.ndarray]:
    """One example; its last ``supervised`` inputs are what the reader must predict."""
    mask = np.zeros(len(inputs), bool)
    mask[len(inputs) - supervised :] = True
    return {
        "context": np.asarray(context, np.int32),
        "context_mask": np.ones(len(context), bool),
        "inputs": np.asarray(inputs, np.int32),
        "inputs_mask": np.ones(len(inputs), bool),
        "supervised": mask,
    }


def _text_records(config: LatentWireRun, tokenizer, task: str, length: int):
    d = config.data
    continuation = d.continuation if task == "continue" else 0
    windows = text_segments(config, tokenizer, "train", d.segments, continuation)
    parts, span = d.length // length, math.ceil(config.model.ratio)

    def get(i: int):
        # A window of the longest length holds several shorter texts.
        window = windows[i // parts][i % parts * length :]
        rng = np.random.default_rng([config.seed, 11, i])
        cut = int(rng.integers(1, span)) if span > 1 and rng.random() < d.ragged else 0
        context = window[: max(1, length - cut)]
        target = context if task == "reconstruct" else window[len(context) :][:continuation]
        return _record(context, target, len(target))

    return get, len(windows) * parts


def _recall_records(config: LatentWireRun, tokenizer):
    """A stretch of the text, from anywhere in it: its first tokens are the cue by which the reader
    must find the place, the rest is to be recalled.
    """
    d = config.data
    windows = text_segments(config, tokenizer, "train", d.segments, length=d.recall)

    def get(i: int):
        rng = np.random.default_rng([config.seed, 13, i])
        cue = int(rng.integers(min(2, d.cue), d.cue + 1))
        begin = int(rng.integers(0, d.recall - cue - d.continuation + 1))
        stretch = windows[i][begin : begin + cue + d.continuation]
        return {**_record(windows[i], stretch, d.continuation), "recalled": np.True_}

    return get, len(windows)


def _answer_records(config: LatentWireRun, builder: PromptBuilder):
    d = config.data
    examples, contexts = questions(config, builder, "train", d.questions)
    rows = []
    for example, context in zip(examples, contexts, strict=True):
        prompt, gold = builder.supervised(example.question, example.answers[0])
        if len(prompt) + len(gold) <= d.max_prompt and len(gold) <= d.max_answer:
            rows.append((context, prompt + gold, len(gold)))
    if not rows:
        raise DataError(
            f"data.qa={d.qa}: no question with its answer fits data.max_prompt={d.max_prompt} and "
            f"data.max_answer={d.max_answer} tokens"
        )
    return (lambda i: {**_record(*rows[i]), "asked": np.True_}), len(rows)


def _bucket(n: int, segment: int) -> int:
    """Static context length: the segment length, or the next multiple of it."""
    return n if n <= segment else -(-n // segment) * segment


def train_stream(
    config: LatentWireRun, tokenizer, builder: PromptBuilder, phase: str = "main"
):
    """The endless, resumable mixture of the tasks with a positive share.

    A task on texts has one stream per length of ``data.lengths``, of equal share; its batches have
    equally many tokens, not rows. Batches of questions carry ``asked``, of recall ``recalled``. In
    the phase ``prompt`` there are only questions, which carry ``raw`` as well: they are about the
    text, not its latents.
    """
    d, rows = config.data, config.train.batch_size
    mix, marks = (d.mix, {}) if phase == "main" else ({"answer": 1.0}, {"raw": np.True_})
    streams, shares = {}, {}

    def add(name, share, task, records, rows, context, inputs):
        get, size = records
        context = _bucket(context, config.model.segment)
        sizes = {"context": context, "inputs": inputs}
        buckets = {**sizes, **{f"{k}_mask": n for k, n in sizes.items()}, "supervised": inputs}
        shares[name] = share
        streams[name] = data.pipeline(
            _with(get, {"task": np.int32(TASKS.index(task)), **marks}),
            rows,
            size=size,
            buckets=buckets,
            seed=config.seed + len(streams),
            remainder="drop" if size >= rows else "wrap",
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    for task in TASKS:
        share = mix.get(task)
        if not share:
            continue
        if task == "answer":
            records = _answer_records(config, builder)
            add(task, share, task, records, rows, d.max_context, d.max_prompt)
            continue
        if task == "recall":
            records = _recall_records(config, tokenizer)
            add(task, share, task, records, rows, d.recall, d.cue + d.continuation)
            continue
        lengths = d.lengths or (d.length,)
        for length in lengths:
            records = _text_records(config, tokenizer, task, length)
            inputs = length if task == "reconstruct" else d.continuation
            name = f"{task}-{length}"
            n = rows * d.length // length
            add(name, share / len(lengths), task, records, n, length, inputs)
    return data.mix(streams, shares, seed=config.seed, task_field=None)


def _with(get, fields):
    return lambda i: {**get(i), **fields}
