"""Greedy reconstruction of held-out texts from their latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from latent_jax.backbones.backbone import Backbone
from latent_jax.core.errors import ConfigError, DataError
from latent_jax.ops.bootstrap import mean_interval
from latent_jax.systems.latentwire import baselines, metrics
from latent_jax.systems.latentwire.compressed import Compressed, for_task
from latent_jax.systems.latentwire.cramming import cram
from latent_jax.systems.latentwire.given import Asked
from latent_jax.systems.latentwire.model import Wire
from latent_jax.systems.latentwire.prompts import pad_rows
from latent_jax.systems.latentwire.reader_lora import reading
from latent_jax.systems.latentwire.scoring import (
    Progress,
    batches,
    decode,
    score_answers,
    task_embedding,
)
from latent_jax.systems.latentwire.tally import PROMPTED, base_arm


def evaluate_ae(
    reader: Backbone,
    latents: Compressed,
    segments: Int[np.ndarray, "n t"],
    *,
    arms: Sequence[str] = ("latent", "shuffled", "zero"),
    batch_size: int = 16,
    segment: int = 64,
    seed: int = 0,
    task: str | None = "reconstruct",
    samples: int = 16,
    name: str = "ae",
    cramming_steps: int = 200,
    said: Sequence[Sequence[int]] | None = None,
    ratio: float = 4.0,
    sink: int | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Rebuilds held-out texts from their latents, greedily, beside controls that cannot know them.

    Args:
      reader: the frozen LLM.
      latents: the trained compressor.
      segments: (the encoder's) tokens of the texts, all of one length.
      arms: of `baselines.LATENT_ARMS`, and with ``_prompted`` of those that stand for a text
        untrained: the same learned embedding asks the reader to repeat it, so that of
        ``full_text_prompted`` shows what the reader can repeat at all.
      batch_size: rows at once.
      segment: the compressor's segment; longer texts are padded to a multiple of it.
      seed: of the random arms and the intervals.
      task: the learned task embedding after the latents; None for none.
      samples: texts returned for the report.
      name: prefix of the metrics.
      cramming_steps: of the arm ``cramming``.
      said: the same texts in the reader's own tokens, if those are others than the encoder's.
      ratio: tokens per slot of the budgeted arms.
      sink: token that arms of text get first.
      progress: called after every arm of every batch.

    Returns:
      Flat metrics, ``<name>.<metric>`` for the latents and ``<name>.<metric>.<arm>`` for the
      controls, with metrics ``token_accuracy, exact_prefix`` (tokens before the first miss)``,
      exact_match, bleu, nll`` and ``forced_accuracy`` (teacher-forced, to show the gap to greedy);
      and samples.

    Raises:
      DataError: fewer than two texts.
      ConfigError: an arm that nothing can be rebuilt from.
    """
    segments = np.asarray(segments, np.int32)
    n, length = segments.shape
    if n < 2:
        raise DataError(f"reconstruction needs at least 2 held-out texts, got {n}")
    of_text = [a for a in rebuildable(arms) if said is None]
    if set(arms) - {*baselines.LATENT_ARMS, *of_text}:
        raise ConfigError(
            f"reconstruction arms are {', '.join(baselines.LATENT_ARMS)} and, of the encoder's own "
            f"LLM, those of text with {PROMPTED}; got {arms}"
        )
    first, behind = None if sink is None else jnp.int32(sink), reading(latents, reader)
    repeating = for_task(latents, task)
    width = length if length <= segment else -(-length // segment) * segment
    empty = np.zeros((batch_size, 0), np.int32), np.zeros((batch_size, 0), bool)
    scores: dict[str, dict[str, np.ndarray]] = {a: {} for a in arms}
    told = list(segments) if said is None else list(said)
    longest = max(map(len, told))
    rebuilt = {a: np.zeros((n, longest), np.int32) for a in arms}
    plan = list(batches([length] * n, batch_size))
    tokens = slots = done = 0
    for at in plan:
        real = len(dict.fromkeys(at.tolist()))
        gold = pad_rows([told[i] for i in at], longest)
        ids, mask = pad_rows(segments[at], width)
        shown = (ids, mask) if said is None else gold
        wire = baselines.encode(latents, ids, mask)
        for arm in arms:
            base = base_arm(arm)
            sent = None if arm in of_text else wire
            llm = reader if arm in of_text else behind
            if arm == "shuffled":
                sent = neighbours(latents, wire, segments, at, real, width)
            elif arm == "cramming":
                sent = cram(
                    llm.decoder, llm.params, latents, wire, *shown, cramming_steps
                )
            given = baselines.build(
                base, llm.decoder, llm.params, ids, mask, *empty, at.astype(np.int32),
                latents=repeating, wire=sent, key=jax.random.key(seed), ratio=ratio, sink=first,
            )  # fmt: skip
            asking = "latent" if arm in of_text else arm  # both have the compressor's embedding
            lead = task_embedding(latents, asking, task, len(at))
            given = baselines.instructed(latents, given, task)
            asked = Asked(given, *empty, lead)
            guess, _ = decode(llm, asked, longest, ())
            forced = score_answers(llm.decoder, llm.params, asked, *gold)
            row = metrics.agreement(guess, *gold)
            row |= {k: np.asarray(forced[k]) for k in ("nll", "hit")}
            row["bleu"] = np.array(
                [metrics.bleu(g[m], t[m]) for g, t, m in zip(guess, *gold, strict=True)]
            )
            for key, value in row.items():
                scores[arm].setdefault(key, np.zeros(n))[at[:real]] = value[:real]
            rebuilt[arm][at[:real]] = guess[:real]
            if arm == "latent":
                tokens += int(gold[1][:real].sum())
                slots += int(np.asarray(baselines.received(latents, wire))[:real].sum())
            done += 1
            if progress is not None:
                progress(f"{name}: {arm}", done, len(plan) * len(arms))
    out: dict[str, Any] = {f"{name}.segments": n, f"{name}.length": length}
    if slots:
        out["ratio" if said is None else f"{name}.ratio"] = tokens / slots
    for arm in arms:
        _report_ae(out, name, "" if arm == "latent" else f".{arm}", scores[arm], seed)
    return out, _ae_samples(reader.tokenizer, told, rebuilt, scores, min(samples, n))


def rebuildable(arms: Sequence[str]) -> list[str]:
    """Those of some arms in which the reader is shown text, or a part of it, and a learned prompt
    that can ask for that text.
    """
    none = {"kv_question", "embedding_replay", "embedding_replay_anchor"}
    text = {*baselines.TEXT_ARMS, *baselines.FROZEN_ARMS} - none
    return [a for a in arms if a.endswith(PROMPTED) and base_arm(a) in text]


def rebuild(
    reader: Backbone,
    latents: Compressed,
    wire: Wire,
    segment: int,
    task: str | None = "reconstruct",
) -> tuple[Int[np.ndarray, "b t"], Bool[np.ndarray, "b t"]]:
    """Greedy reconstructions of a wire, as many tokens as each text had, right-padded.

    Args:
      reader: the LLM as it reads behind latents (`reader_lora.reading`).
      segment: tokens compressed at once.
      task: the learned task embedding after the latents; None for none.
    """
    parts = latents.segments(wire)
    b, rows = len(wire.z), len(parts.z)
    n = rows // b
    empty = np.zeros((rows, 0), np.int32), np.zeros((rows, 0), bool)
    given = baselines.latent_given(
        "latent", reader.decoder, reader.params, for_task(latents, task), parts,
        np.arange(rows, dtype=np.int32), jax.random.key(0),
    )  # fmt: skip
    given = baselines.instructed(latents, given, task)
    lead = task_embedding(latents, "latent", task, rows)
    length = np.asarray(wire.length)
    # A text that fills no segment has fewer places than one.
    each = segment if n > 1 else min(segment, int(length.max()))
    ids, _ = decode(reader, Asked(given, *empty, lead), each, ())
    return ids.reshape(b, n * each), np.arange(n * each) < length[:, None]


def neighbours(
    latents: Compressed, wire: Any, segments: np.ndarray, at: np.ndarray, real: int, width: int
) -> Any:
    """Every real row's neighbour's wire, of the same batch where that has another text."""
    if real == 1:
        others = segments[(at + 1) % len(segments)]
        return baselines.encode(latents, *pad_rows(others, width))
    source = np.concatenate([np.roll(np.arange(real), 1), np.zeros(len(at) - real, int)])
    return jax.tree.map(lambda x: x[source], wire)


def _report_ae(
    out: dict[str, Any], name: str, suffix: str, v: Mapping[str, np.ndarray], seed: int
) -> None:
    """Means and intervals of one arm; those over tokens are ratios of sums."""
    one = np.ones(len(v["count"]))
    columns = {
        "token_accuracy": (v["correct"], v["count"]), "exact_prefix": (v["prefix"], one),
        "exact_match": (v["exact"], one), "bleu": (v["bleu"], one),
        "nll": (v["nll"], v["count"]), "forced_accuracy": (v["hit"], v["count"]),
    }  # fmt: skip
    for key, (total, count) in columns.items():
        out[f"{name}.{key}{suffix}"] = float(total.sum() / count.sum())
        out[f"{name}.{key}{suffix}.ci95"] = list(mean_interval(total, count, seed=seed))


def _ae_samples(
    tokenizer: Any,
    told: Sequence[Sequence[int]],
    rebuilt: Mapping[str, np.ndarray],
    scores: Mapping[str, Mapping[str, np.ndarray]],
    count: int,
) -> list[dict[str, Any]]:
    rows = []
    pieces = lambda ids: [tokenizer.decode([int(i)], skip_special=False) for i in ids]  # noqa: E731
    for i in range(count):
        gold = [int(t) for t in told[i]]
        row = {
            "kind": "reconstruction",
            "text": tokenizer.decode(gold),
            "tokens": pieces(gold),
        }
        for arm, ids in rebuilt.items():
            key = "reconstruction" if arm == "latent" else arm
            made = ids[i][: len(gold)].tolist()
            row[key] = tokenizer.decode(made)
            if arm == "latent":
                row["reconstruction_tokens"] = pieces(made)
                share = scores[arm]["correct"][i] / scores[arm]["count"][i]
                row["token_accuracy"] = round(float(share), 4)
        rows.append(row)
    return rows
