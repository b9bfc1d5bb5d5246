"""Questions answered from every arm with one prompt, greedily, with intervals."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from latent_jax.backbones.backbone import Backbone
from latent_jax.backbones.padding import bucket
from latent_jax.core.errors import ConfigError, DataError
from latent_jax.data.squad import QAExample
from latent_jax.systems.latentwire import baselines, extraction, span_head
from latent_jax.systems.latentwire import faults as faults_made
from latent_jax.systems.latentwire.compressed import Compressed, for_task
from latent_jax.systems.latentwire.cramming import cram
from latent_jax.systems.latentwire.given import Asked, prefill, widen
from latent_jax.systems.latentwire.nudge_config import NudgeConfig
from latent_jax.systems.latentwire.nudges import nudged
from latent_jax.systems.latentwire.prompts import PromptBuilder, pad_rows
from latent_jax.systems.latentwire.reader_lora import reading
from latent_jax.systems.latentwire.reconstruct import evaluate_ae, rebuild
from latent_jax.systems.latentwire.scoring import (
    Progress,
    batch_widths,
    batches,
    common_lead,
    context_width,
    decode,
    score_answers,
    task_embedding,
)
from latent_jax.systems.latentwire.tally import PROMPTED, TUNED, ArmScores, base_arm, compare

__all__ = [
    "Progress", "check_arms", "check_examples", "evaluate_ae", "evaluate_qa", "partners", "prepare",
]  # fmt: skip

@dataclasses.dataclass(frozen=True)
class Row:
    """One tokenised question; ``source`` is its context in the encoder's tokens."""

    example: QAExample
    context: list[int]
    source: list[int]
    prompt: list[int]
    gold: list[int]


def check_arms(arms: Sequence[str], tuned: Sequence[str] = (), prompt_tokens: int = 0) -> None:
    """Refuses unknown arms before anything is compiled.

    Args:
      prompt_tokens: of the compressor's own soft prompt, for the arms that borrow it.

    Raises:
      ConfigError: an arm that does not exist, a tuned arm of a trained compressor, or an arm that
        borrows a prompt which is not there or its own already.
    """
    for arm in (*arms, *tuned):
        if base_arm(arm) not in baselines.ARMS:
            raise ConfigError(f"eval.arms: unknown arm {arm!r}; known: {', '.join(baselines.ARMS)}")
        if arm.endswith(PROMPTED):
            if not prompt_tokens:
                raise ConfigError(f"eval.arms: {arm!r} borrows a prompt: set model.prompt_tokens")
            if base_arm(arm) in baselines.LATENT_ARMS:
                raise ConfigError(f"eval.arms: {base_arm(arm)!r} has the prompt already")
    for arm in tuned:
        if arm in baselines.LATENT_ARMS:
            raise ConfigError(f"eval.tuned: {arm!r} has trained parts already; name text arms")


def prepare(
    builder: PromptBuilder,
    examples: Sequence[QAExample],
    max_context: int,
    source: PromptBuilder | None = None,
) -> tuple[list[Row], int]:
    """Tokenises examples and leaves out those whose passage is longer than ``max_context``.

    They are left out and counted, not cut: a cut passage may have lost the answer.

    Args:
      builder: of the reader.
      examples: questions.
      max_context: longest passage, in the encoder's tokens.
      source: of the encoder, if that is another LLM than the reader.

    Raises:
      DataError: no example is left.
    """
    contexts = {text: builder.context_ids(text) for text in {e.context for e in examples}}
    sources = contexts if source is None else {t: source.context_ids(t) for t in contexts}
    rows = [
        Row(
            e,
            contexts[e.context],
            sources[e.context],
            builder.prompt_ids(e.question),
            builder.answer_ids(e.answers[0], stop=False),
        )
        for e in examples
        if 0 < len(sources[e.context]) <= max_context
    ]
    if not rows:
        raise DataError(f"no question's passage fits {max_context} tokens: raise data.max_context")
    return rows, len(examples) - len(rows)


def partners(rows: Sequence[Row], seed: int) -> np.ndarray:
    """For each row a random row with another passage (the ``shuffled`` control).

    Raises:
      DataError: all rows share one passage.
    """
    passages = {c: i for i, c in enumerate(dict.fromkeys(r.example.context for r in rows))}
    if len(passages) < 2:
        raise DataError(
            "eval.arms: shuffled needs questions on at least two passages; this data has one"
        )
    number = np.array([passages[r.example.context] for r in rows])
    rng = np.random.default_rng([seed, 23])
    # Rows in passage order: those of other passages are all but one contiguous run.
    order = np.argsort(number, kind="stable")
    first = np.searchsorted(number[order], number, side="left")
    count = np.searchsorted(number[order], number, side="right") - first
    draw = rng.integers(0, len(rows) - count)
    return order[np.where(draw < first, draw, draw + count)]


def check_examples(
    builder: PromptBuilder, examples: Sequence[QAExample], max_context: int, arms: Sequence[str]
) -> None:
    """Refuses questions that cannot serve an evaluation.

    Raises:
      DataError: no passage fits, or the arm ``shuffled`` with a single passage.
    """
    rows, _ = prepare(builder, examples, max_context)
    if "shuffled" in arms:
        partners(rows, seed=0)


def evaluate_qa(
    reader: Backbone,
    latents: Compressed | None,
    examples: Sequence[QAExample],
    arms: Sequence[str],
    *,
    builder: PromptBuilder,
    ratio: float,
    max_context: int = 512,
    max_new_tokens: int = 16,
    batch_size: int = 16,
    segment: int = 64,
    seed: int = 0,
    task: str | None = "answer",
    rebuild_task: str | None = "reconstruct",
    tuned: Mapping[str, Float[Array, "n d"]] | None = None,
    name: str = "squad",
    score: bool = True,
    sink: int | None = None,
    cramming_steps: int = 200,
    source: PromptBuilder | None = None,
    faults: Sequence[str] = (),
    extract: Sequence[str] = (),
    nudges: NudgeConfig = NudgeConfig(),  # noqa: B008 (frozen)
    listener: span_head.Listener | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Answers questions from every arm with the same prompt, greedily.

    Args:
      reader: the frozen LLM.
      latents: the trained compressor (None if no latent arm is asked for).
      examples: questions.
      arms: of `baselines.ARMS`; with ``_tuned`` for those that have a soft prompt in ``tuned``,
        with ``_prompted`` for those that borrow the compressor's.
      builder: the one prompt builder of training and evaluation.
      ratio: context tokens per latent, and per slot of the budgeted arms.
      max_context: longest passage in (the encoder's) tokens; questions on longer ones are left out
        and counted.
      max_new_tokens: longest answer in tokens.
      batch_size: rows at once.
      segment: contexts are padded to multiples of this (the compressor's segment).
      seed: of the random arms and the intervals.
      task: which learned task embedding follows the latents; None for none.
      rebuild_task: the same where the text is rebuilt first.
      tuned: ``{arm: soft prompt}`` of the tuned controls, put before the question.
      name: prefix of the metrics.
      sink: token that every arm gets first, outside its budget (`sink`).
      cramming_steps: of the arm ``cramming``.
      score: also compute teacher-forced NLL and first-token ranks.
      faults: of `faults.FAULTS`, made on purpose.
      extract: rules of `extraction.extract`; their scores are ``<name>.extract.<rule>.f1.<arm>``
        and so on.
      nudges: of a second decoding of every arm, whose scores are ``<name>.nudged.f1.<arm>`` and so
        on.
      listener: hears every answer with the reader's states at it; the rule ``span`` needs a
        `span_head.Cutter`.
      progress: called after every arm of every batch.

    Returns:
      Flat metrics (``<name>.f1.<arm>`` with ``.ci95``, ``em``, ``nll``, ``empty``; of the first
      token ``first_top1``, ``first_top5``, ``first_margin`` and ``first_entropy``; ``padding``, the
      most that other ids in the padding change a row's loss, nats per token; comparisons of
      ``latent`` as ``<name>.f1_share.<arm>`` and ``<name>.f1_gain.<arm>``), and one sample per
      example.
    """
    tuned = dict(tuned or {})
    arms = [*arms, *(a + TUNED for a in tuned if a + TUNED not in arms)]
    own_prompt = task_embedding(latents, "latent", task, 1)
    check_arms(arms, (), 0 if own_prompt is None else own_prompt.shape[1])
    # What was rebuilt is read as text is.
    tuned |= {baselines.REBUILT: tuned["full_text"]} if "full_text" in tuned else {}
    missing = [a for a in arms if a.endswith(TUNED) and a.removesuffix(TUNED) not in tuned]
    if missing:
        raise ConfigError(
            f"eval.arms: {', '.join(missing)} needs a trained soft prompt (eval.tuned)"
        )
    behind, asked_of = reading(latents, reader), for_task(latents, task)
    rows, dropped = prepare(builder, examples, max_context, source)
    partner = partners(rows, seed) if "shuffled" in arms else None
    widths = (
        bucket(max(len(r.prompt) for r in rows), 8),
        bucket(max(len(r.gold) for r in rows), 4),
    )
    table = {arm: ArmScores(len(rows)) for arm in arms}
    beside = {arm: ArmScores(len(rows)) for arm in arms if nudges.on}
    anchor = jnp.asarray(builder.replay_anchor_ids, jnp.int32)
    first = None if sink is None else jnp.int32(sink)
    plan = list(batches([len(r.context) for r in rows], batch_size))
    lengths = [max(len(rows[i].context) for i in at) for at in plan]
    context_widths = batch_widths(lengths, segment)
    source_width = context_width(max(len(r.source) for r in rows), segment)
    size = reader.config.hidden_size
    leads = {a: tuned[a.removesuffix(TUNED)] for a in arms if a.endswith(TUNED)}
    leads |= {a: own_prompt[0] for a in arms if a.endswith(PROMPTED)}
    for arm in arms:
        if (task_lead := task_embedding(latents, arm, task, 1)) is not None:
            leads[arm] = task_lead[0]
    lead_width = max((len(v) for v in leads.values()), default=0)
    tokens, slots, done, padding, again = 0, 0, 0, {}, None
    for at, wide in zip(plan, context_widths, strict=True):
        real = len(dict.fromkeys(at.tolist()))

        def texts(which, wide=wide):
            longest = max(len(rows[i].context) for i in which)
            width = min((w for w in context_widths if w >= longest), default=wide)
            width = max(width, wide)
            return pad_rows([rows[i].context for i in which], width, builder.pad_id)

        def sources(which):
            if source is None:
                return texts(which)
            return pad_rows([rows[i].source for i in which], source_width, source.pad_id)

        prompt = pad_rows([rows[i].prompt for i in at], widths[0], builder.pad_id, left=True)
        gold = pad_rows([rows[i].gold for i in at], widths[1], builder.pad_id)
        own, cache, wire = texts(at), None, None
        real_ids = own[1], prompt[1]
        if faults_made.PADDING in faults:
            own, prompt = faults_made.attended(own), faults_made.attended(prompt)
        bases = {base_arm(a) for a in arms}
        if bases & baselines.CACHED:
            cache = prefill(reader.decoder, reader.params, *own, first)
        from_wire = {"latent", "cramming", "scrambled", "zero", baselines.REBUILT}
        if bases & from_wire and latents is not None:
            wire = baselines.encode(latents, *sources(at))
        if baselines.REBUILT in bases:
            again = rebuild(behind, latents, wire, segment, rebuild_task)

        def ask(arm, own, prompt, wire, at=at, wide=wide, cache=cache, again=again):
            """The reader of an arm, and what it reads before it writes."""
            base = base_arm(arm)
            llm = behind if base in baselines.LATENT_ARMS else reader
            shown, sent = own, wire if base in baselines.LATENT_ARMS else None
            if base == "shuffled":
                shown, sent = texts(partner[at]), None
                if source is not None:
                    sent = baselines.encode(latents, *sources(partner[at]))
            elif base == "cramming":
                sent = cram(llm.decoder, llm.params, latents, wire, *own, cramming_steps)
            elif base == baselines.REBUILT:
                shown = again
            given = baselines.build(
                base, llm.decoder, llm.params, *shown, *prompt, at.astype(np.int32),
                ratio=ratio, context=cache if base in baselines.CACHED else None,
                latents=asked_of if base in baselines.LATENT_ARMS else None, wire=sent,
                anchor_ids=anchor, key=jax.random.key(seed), sink=first,
            )  # fmt: skip
            if given.embeds is None:
                held = 0 if given.kv is None else given.kv.mask.shape[1]
                places = max(wide + (sink is not None), held)
                given = widen(llm.decoder, llm.params, given, places)
            lead = leads.get(arm)
            lead = None if lead is None else jnp.broadcast_to(lead, (len(at), *lead.shape))
            return llm, Asked(given, *prompt, *common_lead(lead, lead_width, len(at), size))

        for arm in arms:
            llm, asked = ask(arm, own, prompt, wire)
            if arm == "latent":
                tokens += int(own[1][:real].sum())
                slots += int(np.asarray(baselines.received(latents, wire))[:real].sum())
            ids, lengths = decode(llm, asked, max_new_tokens, builder.stop_ids)
            if faults_made.CUT in faults:
                ids, lengths = faults_made.cut_off(ids, lengths, widths[0])
            if listener is not None:
                states = span_head.said_states(
                    llm.decoder, llm.params, asked, jnp.asarray(ids), jnp.asarray(lengths)
                )
                said = [row[:n] for row, n in zip(ids, lengths, strict=True)][:real]
                questions = [rows[i].example for i in at[:real]]
                listener(arm, at[:real], questions, said, np.asarray(states)[:real])
            forced = {}
            if score:
                forced = score_answers(llm.decoder, llm.params, asked, *gold)
                forced = {k: np.asarray(v) for k, v in forced.items()}
            if score and arm in ("latent", "full_text") and arm not in padding:
                # Other ids in the padding: nobody may notice.
                filled = tuple(map(faults_made.refilled, (own, prompt), real_ids))
                read = None
                if arm in baselines.CACHED:
                    read = prefill(reader.decoder, reader.params, *filled[0], first)
                asked = ask(arm, *filled, wire, cache=read)[1]
                other = score_answers(llm.decoder, llm.params, asked, *gold)
                change = np.abs(np.asarray(other["nll"]) - forced["nll"]) / forced["count"]
                padding[arm] = float(change.max())
            if nudges.on:
                other = nudged(
                    llm, asked, max_new_tokens, nudges, builder, sink=sink is not None, rows=at,
                    seed=seed,
                )  # fmt: skip
                for i, new, length in zip(at[:real], *other, strict=False):
                    said = builder.text(new[:length])
                    beside[arm].add(i, said, rows[i].example.answers, {}, 0)
            for j, i in enumerate(at[:real]):
                said = builder.text(ids[j, : lengths[j]])
                table[arm].add(i, said, rows[i].example.answers, forced, j)
            done += 1
            if progress is not None:
                progress(f"{name}: {arm}", done, len(plan) * len(arms))
    out: dict[str, Any] = {f"{name}.questions": len(rows), f"{name}.left_out": dropped}
    out |= {f"{name}.padding.{arm}": change for arm, change in padding.items()}
    if slots:
        out[f"{name}.ratio"] = tokens / slots
    for arm, scores in table.items():
        scores.report(out, name, arm, seed)
    compare(out, name, table, seed)
    for arm, scores in beside.items():
        scores.report(out, f"{name}.nudged", arm, seed)
    kept = getattr(listener, "said", {})
    extraction.report(out, name, table, extract, [row.example for row in rows], seed, kept)
    return out, [_sample(r, i, table) for i, r in enumerate(rows)]


def _sample(row: Row, i: int, table: Mapping[str, ArmScores]) -> dict[str, Any]:
    e = row.example
    return {
        "kind": "answer", "id": e.id, "title": e.title, "context": e.context,
        "question": e.question, "answers": list(e.answers),
        "predictions": {arm: s.said[i] for arm, s in table.items()},
        "f1": {arm: round(float(s.values["f1"][i]), 4) for arm, s in table.items()},
    }  # fmt: skip
