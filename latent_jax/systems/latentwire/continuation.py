"""How well the reader goes on from what stands for a held-out text, beside the text itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from latent_jax.backbones.backbone import Backbone
from latent_jax.core.errors import ConfigError, DataError
from latent_jax.ops.bootstrap import mean_interval
from latent_jax.systems.latentwire import baselines
from latent_jax.systems.latentwire.compressed import Compressed, for_task
from latent_jax.systems.latentwire.given import Asked
from latent_jax.systems.latentwire.prompts import pad_rows
from latent_jax.systems.latentwire.reader_lora import reading
from latent_jax.systems.latentwire.reconstruct import neighbours
from latent_jax.systems.latentwire.scoring import Progress, batches, score_answers, task_embedding
from latent_jax.systems.latentwire.tally import base_arm


def continuable(arms: Sequence[str]) -> list[str]:
    """What stands for the text in each of some arms, but for those that decode, optimise or look at
    a question first.
    """
    none = {"cramming", "kv_question", baselines.REBUILT}
    return [base for base in dict.fromkeys(map(base_arm, arms)) if base not in none]


def evaluate_continuation(
    reader: Backbone,
    latents: Compressed | None,
    windows: Int[np.ndarray, "n t"],
    length: int,
    arms: Sequence[str],
    *,
    ratio: float,
    batch_size: int = 16,
    segment: int = 64,
    seed: int = 0,
    task: str | None = None,
    name: str = "continuation",
    sink: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Teacher-forced loss of what follows a text, from every arm.

    Arms do not end in a token that could predict the next one (a selection of keys and values has
    no query). So all arms are given the first token that follows, and those behind it are scored.

    Args:
      reader: the frozen LLM.
      latents: the compressor (None if no latent arm is asked for).
      windows: held-out (encoder's = reader's) tokens, each a text and what follows it.
      length: how many of them are the text.
      arms: of `continuable`.
      ratio: text tokens per latent, and per slot of the budgeted arms.
      batch_size: rows at once.
      segment: the compressor's segment; longer texts are padded to a multiple of it.
      seed: of the random arms and the intervals.
      task: the learned embedding after the latents; None for none: latents then stand for text.
      name: prefix of the metrics.
      sink: token that every arm gets first.
      progress: called after every arm of every batch.

    Returns:
      ``<name>.nll.<arm>`` (nats per token) and, beside ``full_text``, ``<name>.nll_gap.<arm>`` (how
      much more, paired), with intervals over texts; ``<name>.segments``, ``.length``, ``.tokens``.

    Raises:
      DataError: fewer than two texts, or less than two tokens to continue with.
      ConfigError: an arm that has no continuation.
    """
    windows = np.asarray(windows, np.int32)
    n, follow = len(windows), windows.shape[1] - length
    if n < 2 or follow < 2:
        raise DataError(f"continuation needs 2 texts and 2 tokens after them, got {n} and {follow}")
    if unknown := [arm for arm in arms if continuable([arm]) != [arm]]:
        raise ConfigError(f"continuation has no arm {', '.join(unknown)}")
    width = length if length <= segment else -(-length // segment) * segment
    first = None if sink is None else jnp.int32(sink)
    losses = {arm: np.zeros(n) for arm in arms}
    plan, done = list(batches([length] * n, batch_size)), 0
    behind, going_on = reading(latents, reader), for_task(latents, task)
    for at in plan:
        real = len(dict.fromkeys(at.tolist()))
        shown = pad_rows(windows[at, :length], width)
        begin = windows[at, length : length + 1], np.ones((len(at), 1), bool)
        gold = pad_rows(windows[at, length + 1 :], follow - 1)
        wire = None
        if latents is not None and set(arms) & set(baselines.LATENT_ARMS):
            wire = baselines.encode(latents, *shown)
        for arm in arms:
            sent = wire if arm in baselines.LATENT_ARMS else None
            llm = reader if sent is None else behind
            if arm == "shuffled":
                sent = neighbours(latents, wire, windows[:, :length], at, real, width)
            given = baselines.build(
                arm, llm.decoder, llm.params, *shown, *begin, at.astype(np.int32),
                ratio=ratio, latents=going_on if sent is not None else None, wire=sent,
                key=jax.random.key(seed), sink=first,
            )  # fmt: skip
            lead = task_embedding(latents, arm, task, len(at))
            forced = score_answers(
                llm.decoder, llm.params, Asked(given, *begin, lead), *gold
            )
            losses[arm][at[:real]] = np.asarray(forced["nll"])[:real]
            done += 1
            if progress is not None:
                progress(f"{name}: {arm}", done, len(plan) * len(arms))
    out: dict[str, Any] = {
        f"{name}.segments": n, f"{name}.length": length, f"{name}.tokens": follow - 1,
    }  # fmt: skip
    each = np.full(n, follow - 1.0)
    for arm, nll in losses.items():
        columns = {"nll": nll}
        if "full_text" in losses and arm != "full_text":
            columns["nll_gap"] = nll - losses["full_text"]
        for key, total in columns.items():
            out[f"{name}.{key}.{arm}"] = float(total.sum() / each.sum())
            out[f"{name}.{key}.{arm}.ci95"] = list(mean_interval(total, each, seed=seed))
    return out
