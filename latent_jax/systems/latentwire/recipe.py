"""LatentWire's data: three tasks in one record format, mixed batch by batch.

Every record is ``context`` (what is compressed), ``inputs`` (what the reader is fed after the
latents, teacher-forced) and ``supervised`` (which of the inputs it must predict). Reconstruction,
continuation and answers differ in nothing else, so they share one loss and one compiled step per
shape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from latent_jax import data
from latent_jax.core.errors import DataError
from latent_jax.data.squad import QAExample
from latent_jax.systems.latentwire.config import MAIN, TASKS, LatentWireRun
from latent_jax.systems.latentwire.prompts import PromptBuilder
from latent_jax.systems.latentwire.readers import Reader
from latent_jax.systems.latentwire.transcribe import FED, asked, fed, field, retold, room
from latent_jax.train.protocol import BatchSpec


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
    config: LatentWireRun, builder: PromptBuilder, split: str, limit: int,
    field: str = "data.qa",
) -> tuple[list[QAExample], list[list[int]]]:  # fmt: skip
    """Shuffled examples whose passage fits ``data.max_context``, with their context tokens.

    Args:
      field: setting that names their source, ``data.qa`` or ``eval.ood``.
    """
    d = config.data
    source = d.qa if field == "data.qa" else config.eval.ood
    examples = data.load_squad(source, split, d.root)
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
            f"{field}={source}: no passage of the {split} split fits data.max_context="
            f"{d.max_context} tokens"
        )
    return kept, ids


def _record(
    context: Sequence[int], inputs: Sequence[int], supervised: int
) -> dict[str, np.ndarray]:
    """One example; its last ``supervised`` inputs are what the reader must predict."""
    return {
        "context": np.asarray(context, np.int32),
        "context_mask": np.ones(len(context), bool),
        **fed(inputs, supervised),
    }


def _retold(get, task: str, tokenizer, readers: Sequence[Reader]):
    """Text records with the parts of further readers."""

    def both(i: int):
        record = get(i)
        inputs, supervised = record["inputs"], int(record["supervised"].sum())
        for reader in readers:
            stop = task == "reconstruct"
            record |= retold(tokenizer, reader, inputs, supervised, stop)
        return record

    return both if readers else get


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
        return _record(windows[i], stretch, d.continuation)

    return get, len(windows)


def _answer_records(config: LatentWireRun, builder: PromptBuilder, readers: Sequence[Reader]):
    d = config.data
    examples, contexts = questions(config, builder, "train", d.questions)
    rows = []
    for example, context in zip(examples, contexts, strict=True):
        prompt, gold = builder.supervised(example.question, example.answers[0])
        others = [asked(r, example.question, example.answers[0], d) for r in readers]
        if None in others or len(prompt) + len(gold) > d.max_prompt or len(gold) > d.max_answer:
            continue
        row = _record(context, prompt + gold, len(gold))
        for other in others:
            row |= other
        rows.append(row)
    if not rows:
        raise DataError(
            f"data.qa={d.qa}: no question with its answer fits data.max_prompt={d.max_prompt} and "
            f"data.max_answer={d.max_answer} tokens"
            + ("".join(f", and the room that {r.label} has" for r in readers))
        )
    return rows.__getitem__, len(rows)


def _bucket(n: int, segment: int) -> int:
    """Static context length: the segment length, or the next multiple of it."""
    return n if n <= segment else -(-n // segment) * segment


class Kind(NamedTuple):
    """Batches of one task and one length of text.

    Attributes:
      task: of `TASKS`.
      share: of the batches.
      rows: examples of a batch.
      length: of the texts, tokens.
      context: static length that they are padded to.
      inputs: static length of what the main reader is fed.
      readers: who reads the batches.
    """

    task: str
    share: float
    rows: int
    length: int
    context: int
    inputs: int
    readers: tuple[str, ...] = (MAIN,)


def kinds(config: LatentWireRun, phase: str = "main") -> dict[str, Kind]:
    """The kinds of batches of a phase.

    A task on texts has one per length of ``data.lengths``, of equal share; its batches have equally
    many tokens, not rows.
    """
    d, rows = config.data, config.train.batch_size
    mix = d.mix if phase == "main" else {"answer": 1.0}
    found: dict[str, Kind] = {}

    together = config.read_by if phase == "main" else (MAIN,)
    turns = [together]
    if d.turns == "alternating" and len(together) > 1:
        turns = [(reader,) for reader in together]

    def add(name, task, share, rows, length, inputs):
        context = _bucket(length, config.model.segment)
        for readers in turns:
            key = name if len(turns) == 1 else f"{name}-{readers[0]}"
            part = share / len(turns)
            found[key] = Kind(task, part, rows, length, context, inputs, readers)

    for task in TASKS:
        share = mix.get(task)
        if not share:
            continue
        if task == "answer":
            add(task, task, share, rows, d.max_context, d.max_prompt)
        elif task == "recall":
            add(task, task, share, rows, d.recall, d.cue + d.continuation)
        else:
            lengths = d.lengths or (d.length,)
            for length in lengths:
                inputs = length if task == "reconstruct" else d.continuation
                n = rows * d.length // length
                add(f"{task}-{length}", task, share / len(lengths), n, length, inputs)
    return found


def _marks(task: str, phase: str) -> tuple[str, ...]:
    """Fields whose presence says what a batch is."""
    own = {"answer": ("asked",), "recall": ("recalled",)}.get(task, ())
    return own if phase == "main" else (*own, "raw")


def _widths(config: LatentWireRun, kind: Kind) -> dict[str, int]:
    """Static width of every array of a batch."""
    widths = {"context": kind.context, "context_mask": kind.context}
    for reader in kind.readers:
        width = kind.inputs
        if reader != MAIN:
            width = room(config.model.readers[reader], width)
        widths |= {field(reader, name): width for name in FED}
    return widths


def batch_specs(config: LatentWireRun, phase: str = "main") -> tuple[BatchSpec, ...]:
    """Shapes of the batches of `train_stream`, from the configuration alone."""
    specs = []
    for name, kind in kinds(config, phase).items():
        sizes = {
            name: (width, bool if name.endswith(("mask", "supervised")) else np.int32)
            for name, width in _widths(config, kind).items()
        }
        arrays = {
            field: jax.ShapeDtypeStruct((kind.rows, size), dtype)
            for field, (size, dtype) in sizes.items()
        }
        arrays["task"] = jax.ShapeDtypeStruct((kind.rows,), np.int32)
        for mark in _marks(kind.task, phase):
            arrays[mark] = jax.ShapeDtypeStruct((kind.rows,), bool)
        specs.append(BatchSpec(name, kind.share, arrays))
    return tuple(specs)


def train_stream(
    config: LatentWireRun, tokenizer, builder: PromptBuilder, phase: str = "main",
    readers: Mapping[str, Reader] | None = None,
):  # fmt: skip
    """The endless, resumable mixture of `kinds`.

    Batches of questions carry ``asked``, of recall ``recalled``. In the phase ``prompt`` there are
    only questions, which carry ``raw`` as well: they are about the text, not its latents. For each
    of ``readers`` that reads a batch there is ``<reader>.inputs`` and so on beside ``inputs``.
    """
    streams, shares = {}, {}
    for name, kind in kinds(config, phase).items():
        others = [(readers or {})[r] for r in kind.readers if r != MAIN]
        if kind.task == "answer":
            get, size = _answer_records(config, builder, others)
        elif kind.task == "recall":
            get, size = _recall_records(config, tokenizer)
        else:
            get, size = _text_records(config, tokenizer, kind.task, kind.length)
        if kind.task != "answer":
            get = _retold(get, kind.task, tokenizer, others)
        fields = {mark: np.True_ for mark in _marks(kind.task, phase)}
        shares[name] = kind.share
        streams[name] = data.pipeline(
            _with(get, {"task": np.int32(TASKS.index(kind.task)), **fields}, kind.readers),
            kind.rows,
            size=size,
            buckets=_widths(config, kind),
            seed=config.seed + len(streams),
            remainder="drop" if size >= kind.rows else "wrap",
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
    return data.mix(streams, shares, seed=config.seed, task_field=None)


def _with(get, fields, readers):
    """Records with the marks of their kind, without the part of a main reader that has no turn."""
    gone = () if MAIN in readers else FED
    return lambda i: {k: v for k, v in {**get(i), **fields}.items() if k not in gone}
