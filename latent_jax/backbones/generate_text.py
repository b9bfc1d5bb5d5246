"""Texts in, texts out: prompts to ids, batches of similar length, stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax import Array
from jaxtyping import Int

from latent_jax.backbones.decoder import KV
from latent_jax.backbones.generate import generate_ids
from latent_jax.backbones.padding import bucket_batch, left_pad, take_rows
from latent_jax.backbones.sampling import Sampling
from latent_jax.core.errors import BackboneError

if TYPE_CHECKING:
    from latent_jax.backbones.backbone import Backbone


def generate_text(
    backbone: Backbone,
    prompts: str | Sequence[str | Sequence[int]],
    max_new_tokens: int = 64,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: str | Sequence[str | int] | None = None,
    seed: int = 0,
    chat: bool = False,
    batch_size: int = 8,
    prefix: KV | None = None,
    start: Int[Array, " b"] | int = 0,
    lora: Any = None,
    return_ids: bool = False,
) -> list[str] | list[list[int]]:
    """Continue prompts with a frozen language model.

    Args:
        backbone: loaded model.
        prompts: texts or token ids.
        max_new_tokens: how many tokens at most per prompt.
        temperature: 0 is greedy.
        top_k: keep the k most likely tokens.
        top_p: keep the nucleus of this probability.
        stop: extra stops. An id ends the row; a string cuts the text where it first occurs (and
            ends the row at once if it is one vocabulary entry). End-of-text markers always stop.
        seed: of the draws; prompt i's draws depend on `seed` and i only.
        chat: wrap every text prompt as one user turn of the model's chat template.
        batch_size: prompts per compiled call; they are grouped by length.
        prefix: keys and values that each prompt sees (batch axis = prompts).
        start: rotary position of each prompt's first token.
        lora: low-rank deltas for the decoder's projections.
        return_ids: return new token ids (stop token dropped) instead of texts.

    Returns:
        One continuation per prompt, in order, without special tokens.

    Raises:
        BackboneError: an empty prompt, an id outside the vocabulary, or a prompt beyond the
            context window.
    """
    tokenizer, config = backbone.tokenizer, backbone.config
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    stop = [] if stop is None else [stop] if isinstance(stop, str | int) else list(stop)
    extra_ids, cuts = _split_stops(tokenizer, stop)
    stop_ids = sorted({*tokenizer.stop_ids, *extra_ids})
    sampling = Sampling(temperature, top_k, top_p)
    rows = [_prompt_ids(backbone, p, i, chat) for i, p in enumerate(prompts)]
    starts = np.broadcast_to(np.asarray(start, np.int32), (len(rows),))
    for i, ids in enumerate(rows):
        if int(starts[i]) + len(ids) + max_new_tokens > config.max_position:
            raise BackboneError(
                f"prompt {i}: {len(ids)} tokens from position {int(starts[i])} and "
                f"{max_new_tokens} new ones exceed the context window of {config.max_position}: "
                "shorten the prompt or max_new_tokens"
            )

    results: list[list[int]] = [[] for _ in rows]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for at in range(0, len(order), max(batch_size, 1)):
        chunk = order[at : at + max(batch_size, 1)]
        # The last chunk is filled up to a power of two by repeating a row: few batch sizes, few
        # programs.
        filled = np.asarray(
            chunk + [chunk[-1]] * (bucket_batch(len(chunk), batch_size) - len(chunk))
        )
        ids, mask = left_pad([rows[i] for i in filled])
        embeds = backbone.embed(ids)
        out = generate_ids(
            backbone.decoder,
            backbone.params,
            embeds,
            mask,
            max_new_tokens=max_new_tokens,
            start=starts[filled],
            prefix=None if prefix is None else take_rows(prefix, filled),
            sampling=sampling,
            stop_ids=stop_ids,
            rng=seed,
            rows=filled,
            lora=lora,
        )
        tokens, lengths, stopped = jax.device_get(out)
        for j, i in enumerate(chunk):
            results[i] = tokens[j, : lengths[j] - int(stopped[j])].tolist()
    if return_ids:
        return results
    return [_cut(tokenizer.decode(ids), cuts) for ids in results]


def _prompt_ids(
    backbone: Backbone, prompt: str | Sequence[int], index: int, chat: bool
) -> list[int]:
    tokenizer = backbone.tokenizer
    if isinstance(prompt, str):
        text = tokenizer.apply_chat([{"role": "user", "content": prompt}]) if chat else prompt
        ids = list(tokenizer.encode(text))
        if not chat and tokenizer.bos_id is not None and (tokenizer.add_bos or not ids):
            ids.insert(0, tokenizer.bos_id)
    else:
        ids = [int(i) for i in prompt]
    if not ids:
        raise BackboneError(f"prompt {index} is empty: give at least one token")
    bad = next((i for i in ids if not 0 <= i < backbone.config.vocab_size), None)
    if bad is not None:
        raise BackboneError(
            f"prompt {index}: token id {bad} is outside the vocabulary of "
            f"{backbone.config.vocab_size}"
        )
    return ids


def _split_stops(tokenizer: Any, stop: Sequence[str | int]) -> tuple[list[int], list[str]]:
    """Stops as ids (ids and single vocabulary entries) and all strings, to cut the text at."""
    ids = [s for s in stop if isinstance(s, int)]
    texts = [s for s in stop if isinstance(s, str) and s]
    ids += [i for i in (tokenizer.token_to_id(s) for s in texts) if i is not None]
    return ids, texts


def _cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    ends = [at for at in (text.find(s) for s in stops) if at >= 0]
    return text[: min(ends)] if ends else text
