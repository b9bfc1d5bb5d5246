"""Where the adapter of a further reader starts: from what its LLM itself makes of the same text.

A latent stands for a span of text. The mean of the keys and values that the reader's own LLM has at
that span is what a pooled latent of its own would be; the linear map from the encoder's latents to
those means has a closed form (ridge regression), and so has the adapter's residual layer, whose
inner weights stay as they were drawn (random features, Rahimi and Recht 2007). Trained from there,
an adapter is far ahead of one that starts at random, and an encoder that is trained with it is not
pulled away from its own LLM.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from latent_jax.backbones.decoder import inverse_frequencies
from latent_jax.core.errors import ConfigError, DataError
from latent_jax.systems.latentwire.baselines import encode
from latent_jax.systems.latentwire.bottleneck import adopt
from latent_jax.systems.latentwire.compressed import Latents
from latent_jax.systems.latentwire.config import ModelConfig
from latent_jax.systems.latentwire.given import embed, prefill
from latent_jax.systems.latentwire.model import Wire, flatten_kv, num_latents
from latent_jax.systems.latentwire.pool import span_edges
from latent_jax.systems.latentwire.prompts import pad_rows
from latent_jax.systems.latentwire.readers import Reader
from latent_jax.systems.latentwire.ridge import regression
from latent_jax.systems.latentwire.tuned import init_prompt


def check_layout(name: str, theirs: ModelConfig, ours: ModelConfig) -> None:
    """Refuses a start whose wire is laid out otherwise, or whose readers are left out.

    Raises:
      ConfigError: saying which readers and private latents differ.
    """
    if missing := [label for label in theirs.readers if label not in ours.readers]:
        raise ConfigError(
            f"model.start={name} is also read by {', '.join(missing)}: put it into model.readers"
        )
    have, want = (
        {label: n for label, n in c.private_slots.items() if n} for c in (theirs, ours)
    )
    if have != want or list(have) != list(want):
        raise ConfigError(
            f"model.start={name} sends private latents {have or 'to nobody'}, this configuration "
            f"{want or 'to nobody'}: a reader that is added later has private: 0"
        )


def fresh(readers: Mapping[str, Reader], key: Array) -> dict[str, Any]:
    """Parameters of all adapters as initialised, before anything is fitted."""
    found = {}
    for label, reader in readers.items():
        slots = 1 + sum(reader.adapter.config.private_slots.values())
        z = jnp.zeros((1, slots, reader.adapter.width))
        where, real = jnp.zeros((1, slots), jnp.int32), jnp.ones((1, slots), bool)
        wire = Wire(z, real, where, jnp.ones(1, jnp.int32))
        found[label] = dict(reader.adapter.init(key, wire)["params"])
    return found


def start(
    readers: Mapping[str, Reader],
    encoder: Latents,
    tokenizer: Any,
    params: Mapping[str, Any],
    theirs: Mapping[str, Any],
    batches: Callable[[], Iterable[Mapping[str, Any]]],
) -> dict[str, Any]:
    """Parameters of all adapters where training begins: a start's own, else fitted to texts.

    Args:
      readers: by name.
      encoder: the compressor.
      tokenizer: its LLM's.
      params: of `fresh`.
      theirs: adapters of the compressor that the run starts from.
      batches: gives training batches, from the first one on.
    """
    found = {}
    for label, reader in readers.items():
        own = dict(params[label])
        if label in theirs:
            found[label] = adopt(own, theirs[label], f"reader {label}")
            continue
        if "prompt" in own:
            backbone = reader.backbone
            own |= init_prompt(backbone.params["embed"], backbone.tokenizer, len(own["prompt"]))
        found[label] = fit(reader, encoder, tokenizer, batches(), own)
    return found


def token_spans(
    encoder: Any, reader: Any, ids: list[int], ratio: float
) -> tuple[list[int], Bool[np.ndarray, "m t"]]:
    """A text in the reader's tokens, and which of them lie in the span of each latent.

    Args:
      encoder: tokenizer of ``ids``.
      reader: the other tokenizer.
      ids: the text in the encoder's tokens.
      ratio: encoder's tokens per latent.
    """
    m = num_latents(len(ids), ratio)
    edges = np.minimum(span_edges(m, ratio), len(ids)).tolist()
    places = np.array([len(encoder.decode(ids[:edge])) for edge in edges])
    text = encoder.decode(ids)
    offsets = np.array(reader.offsets(text)).reshape(-1, 2)
    start, end = offsets[:, 0], np.maximum(offsets[:, 1], offsets[:, 0] + 1)
    return reader.encode(text), (start < places[1:, None]) & (end > places[:-1, None])


def fit(
    reader: Reader,
    latents: Latents,
    tokenizer: Any,
    batches: Iterable[Mapping[str, Any]],
    params: Mapping[str, Any],
    rows: int | None = None,
) -> dict[str, Any]:
    """The adapter's parameters with statistics, map and stretch from some texts.

    Args:
      reader: whose adapter.
      latents: the encoder.
      tokenizer: the encoder's.
      batches: with ``context`` and ``context_mask``.
      params: the adapter's fresh parameters.
      rows: latents to look at; by default eight for each of the numbers that the regression
        explains an entry by.

    Raises:
      DataError: the batches hold too little text.
    """
    width, segment = reader.adapter.width, latents.module.config.segment
    ratio = latents.module.config.ratio
    wanted = rows or 8 * (width + reader.config.hidden)
    x, y, count, ours, theirs = [], [], 0, 0, 0
    for batch in batches:
        ids, mask = np.asarray(batch["context"]), np.asarray(batch["context_mask"])
        if ids.shape[1] > segment:
            ids, mask = ids.reshape(-1, segment), mask.reshape(-1, segment)
        wire = encode(latents, jnp.asarray(ids), jnp.asarray(mask))
        pairs = [
            token_spans(tokenizer, reader.backbone.tokenizer, row[real].tolist(), ratio)
            for row, real in zip(ids, mask, strict=True)
        ]
        # One width for all batches: every width is compiled for.
        room = math.ceil(ids.shape[1] * reader.config.tokens)
        own_ids = pad_rows([row[:room] for row, _ in pairs], room, reader.builder.pad_id)
        states = np.asarray(_states(reader, *map(jnp.asarray, own_ids)), np.float32)
        z = np.asarray(wire.z, np.float32)
        for i, (row, inside) in enumerate(pairs):
            inside = inside[:, :room]
            full = inside.any(1)
            weight = parts(inside[full], reader.config.entries)
            x.append(z[i, : len(inside)][full])
            made = weight @ states[i, : inside.shape[1]]
            y.append(made.reshape(len(made), made.shape[1] * made.shape[2]))
            count += len(x[-1])
            ours, theirs = ours + int(mask[i].sum()), theirs + len(row)
        if count >= wanted:
            break
    if count < 2:
        raise DataError("the training data hold fewer than 2 latents: no adapter can be fitted")
    inner = np.asarray(params["inner"], np.float32) if reader.config.hidden else None
    fitted = regression(np.concatenate(x), np.concatenate(y), inner)
    fitted["stretch"] = np.float32(theirs / max(ours, 1))
    return {**params, **{k: jnp.asarray(v, params[k].dtype) for k, v in fitted.items()}}


def parts(inside: Bool[np.ndarray, "m t"], entries: int) -> Float[np.ndarray, "m e t"]:
    """Weights of the tokens of each span in the means of its parts; a span of fewer tokens than
    parts has some of them twice.

    Args:
      inside: which tokens lie in which span, at least one in each.
      entries: consecutive parts that every span is cut into.

    Example:
      >>> parts(np.array([[True, True, True]]), 2)[0].tolist()
      [[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]
    """
    weight = np.zeros((len(inside), entries, inside.shape[1]))
    for row, span in zip(weight, inside, strict=True):
        at = np.flatnonzero(span)
        edges = np.ceil(np.arange(entries + 1) * len(at) / entries).astype(int)
        for part, (begin, end) in zip(row, zip(edges[:-1], edges[1:], strict=True), strict=True):
            begin = min(begin, len(at) - 1)
            chosen = at[begin : max(end, begin + 1)]
            part[chosen] = 1 / len(chosen)
    return weight


def _states(
    reader: Reader, ids: Int[Array, "b t"], mask: Bool[Array, "b t"]
) -> Float[Array, "b t f"]:
    """What the reader's LLM has at each token, in the shape that its adapter makes."""
    backbone = reader.backbone
    if reader.config.kind == "soft":
        return embed(backbone.decoder, backbone.params, ids)
    sink = None if reader.sink is None else jnp.int32(reader.sink)
    kv = prefill(backbone.decoder, backbone.params, ids, mask, sink)
    where = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    return jax.jit(flatten_kv)(kv, jnp.asarray(inverse_frequencies(backbone.config)), where)
