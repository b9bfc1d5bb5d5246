"""LatentWire's data: three tasks in one record format, mixed batch by batch.

Every record is ``context`` (what is compressed), ``inputs`` (what the reader is fed after the
latents, teacher-forced) and ``supervised`` (which of the inputs it must predict). Reconstruction,
continuation and answers differ in nothing else, so they share one loss and one compiled step per
shape.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from latent_jax import data
from latent_jax.core.errors import DataError
from latent_jax.data.squad import QAExample
from latent_jax.systems.latentwire.config import TASKS, LatentWireRun
from latent_jax.systems.latentwire.prompts import PromptBuilder


def text_segments(config: LatentWireRun, tokenizer, split: str, limit: int, continuation: int = 0):
    """Token windows of the text source, ``[n, length + continuation]``."""
    d = config.data
    texts = data.load_texts(d.text, split, d.root)
    length = d.length if split == "train" else (config.eval.length or d.length)
    return data.segments(
        tokenizer, texts, length, limit, seed=config.seed, continuation=continuation
    )


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


def _text_records(config: LatentWireRun, tokenizer, task: str):
    d = config.data
    continuation = d.continuation if task == "continue" else 0
    windows = text_segments(config, tokenizer, "train", d.segments, continuation)
    shortest = d.min_length or d.length

    def get(i: int):
        window = windows[i]
        length = int(np.random.default_rng([config.seed, 11, i]).integers(shortest, d.length + 1))
        context = window[:length]
        target = context if task == "reconstruct" else window[length : length + continuation]
        return _record(context, target, len(target))

    return get, len(windows)


def _answer_records(config: LatentWireRun, builder: PromptBuilder):
    d = config.data
    examples, contexts = questions(config, builder, "train", d.questions)
    rows = []
    for example, context in zip(examples, contexts, strict=True):
        prompt, gold = builder.supervised(example.question, example.answers[0])
        if len(prompt) + len(gold) <= d.max_prompt:
            rows.append((context, prompt + gold, len(gold)))
    if not rows:
        raise DataError(
            f"data.qa={d.qa}: no question with its answer fits data.max_prompt="
            f"{d.max_prompt} tokens"
        )
    return (lambda i: _record(*rows[i])), len(rows)


def _bucket(n: int, segment: int) -> int:
    """Static context length: the segment length, or the next multiple of it."""
    return n if n <= segment else -(-n // segment) * segment


def train_stream(config: LatentWireRun, tokenizer, builder: PromptBuilder):
    """The endless, resumable mixture of the tasks with a positive share."""
    d = config.data
    streams = {}
    for number, task in enumerate(TASKS):
        if not d.mix.get(task):
            continue
        if task == "answer":
            get, size = _answer_records(config, builder)
            context, inputs = d.max_context, d.max_prompt
        else:
            get, size = _text_records(config, tokenizer, task)
            context = d.length
            inputs = d.length if task == "reconstruct" else d.continuation
        context = _bucket(context, config.model.segment)
        streams[task] = data.pipeline(
            _with_task(get, number),
            config.train.batch_size,
            size=size,
            buckets={
                "context": context,
                "context_mask": context,
                "inputs": inputs,
                "inputs_mask": inputs,
                "supervised": inputs,
            },
            seed=config.seed + number,
            remainder="drop" if size >= config.train.batch_size else "wrap",
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
    return data.mix(streams, {t: d.mix[t] for t in streams}, seed=config.seed, task_field=None)


def _with_task(get, number: int):
    return lambda i: {**get(i), "task": np.int32(number)}
