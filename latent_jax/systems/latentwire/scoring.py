"""What both evaluations share: batches of static shape, teacher-forced scores, greedy decoding."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from latent_jax.backbones.backbone import Backbone
from latent_jax.backbones.decoder import Decoder
from latent_jax.backbones.generate import generate_ids
from latent_jax.backbones.padding import bucket
from latent_jax.systems.latentwire import baselines, metrics
from latent_jax.systems.latentwire.compressed import Compressed
from latent_jax.systems.latentwire.given import Asked, answer_hidden, join

#: Called as ``progress(what, done, total)``.
Progress = Callable[[str, int, int], None]


def common_lead(lead: Any, width: int, rows: int, size: int) -> tuple[Any, Any]:
    """Learned embeddings in ``width`` places with their mask, so that arms share one shape.

    Args:
      lead: ``[b, n, d]`` or None for an arm without any.
      width: places of the arm with most; 0 gives (None, None).
      rows: batch size.
      size: the reader's width.
    """
    if not width:
        return None, None
    lead = jnp.zeros((rows, 0, size)) if lead is None else jnp.asarray(lead, jnp.float32)
    room = width - lead.shape[1]
    mask = np.arange(width)[None] >= np.full((rows, 1), room)
    return jnp.pad(lead, [(0, 0), (room, 0), (0, 0)]), jnp.asarray(mask)


def batch_widths(longest: Sequence[int], segment: int, least: int = 4) -> list[int]:
    """Static context width of each batch: its own bucket, but no width for fewer than ``least``.

    Every width is compiled for once per arm, which costs more than padding a few batches.

    Args:
      longest: longest context of each batch, ascending.
      segment: widths are multiples of it.
      least: batches a width needs to be worth compiling.
    """
    widths = [context_width(n, segment) for n in longest]
    for width in sorted(set(widths))[:-1]:
        if widths.count(width) < least:
            wider = min(w for w in widths if w > width)
            widths = [wider if w == width else w for w in widths]
    return widths


def context_width(longest: int, segment: int) -> int:
    """Static width of a batch of contexts: 1, 2, 3, 4, 6, 8, 12, 16, … segments."""
    return segment * bucket(-(-max(longest, 1) // segment), 1)


def batches(lengths: Sequence[int], size: int) -> Iterator[np.ndarray]:
    """Row numbers in batches of similar length; the last one repeats its first row to stay full."""
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        yield np.concatenate([rows, np.full(size - len(rows), rows[0])])


@functools.partial(jax.jit, static_argnames=("decoder",))
def score_answers(
    decoder: Decoder,
    params: Any,
    asked: Asked,
    answer_ids: Int[Array, "b a"],
    answer_mask: Bool[Array, "b a"],
) -> dict[str, Float[Array, " b"]]:
    """Teacher-forced scores per row: summed NLL, tokens, greedy hits; of the first token its rank,
    by how many nats the best guess leads the second, and the entropy of the prediction (nats).
    """
    hidden = answer_hidden(decoder, params, asked, answer_ids, answer_mask)
    logits = decoder.apply({"params": params}, hidden, method="unembed")
    nll = metrics.token_nll(logits, answer_ids)
    hit = (jnp.argmax(logits, -1) == answer_ids) & answer_mask
    log = jax.nn.log_softmax(logits[:, 0].astype(jnp.float32))
    best, second = jnp.unstack(jax.lax.top_k(log, 2)[0], axis=-1)
    return {
        "nll": jnp.where(answer_mask, nll, 0.0).sum(-1), "count": answer_mask.sum(-1),
        "hit": hit.sum(-1),
        "top1": metrics.in_top_k(logits[:, 0], answer_ids[:, 0], 1),
        "top5": metrics.in_top_k(logits[:, 0], answer_ids[:, 0], 5),
        "margin": best - second, "entropy": -jnp.sum(jnp.exp(log) * log, axis=-1),
    }  # fmt: skip


_join = jax.jit(join, static_argnums=0)


def decode(
    reader: Backbone, asked: Asked, max_new_tokens: int, stop_ids: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Greedy tokens of each row and how many they are."""
    embeds, mask = _join(reader.decoder, reader.params, asked)
    out = generate_ids(
        reader.decoder,
        reader.params,
        embeds,
        mask,
        start=asked.given.start,
        prefix=asked.given.kv,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
    )
    return np.asarray(out.tokens), np.asarray(out.lengths)


def task_embedding(latents: Compressed | None, arm: str, task: str | None, rows: int) -> Any:
    """The learned embeddings that stand between latents and prompt; None for every other arm."""
    if latents is None or task is None or arm not in baselines.LATENT_ARMS:
        return None
    return latents.task(task, rows)
