"""What one looks at in a compressor: nats token by token, likeness of texts, nearest tokens."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from latent_jax.backbones.decoder import Decoder
from latent_jax.backbones.first_layers import first_config, first_params
from latent_jax.core.errors import DataError
from latent_jax.ops.attention import MASKED
from latent_jax.systems.latentwire import baselines, metrics
from latent_jax.systems.latentwire.api import AGAIN, LatentWire
from latent_jax.systems.latentwire.compressed import for_task
from latent_jax.systems.latentwire.diagnose import nearest_tokens
from latent_jax.systems.latentwire.given import Asked, answer_hidden, embed
from latent_jax.systems.latentwire.pool import num_latents, span_edges
from latent_jax.systems.latentwire.prompts import pad_rows


class Rebuilt(NamedTuple):
    """One text under teacher forcing: its tokens, the nats that each costs given those before it,
    and the token that was thought likeliest there.
    """

    tokens: list[str]
    nats: Float[np.ndarray, " t"]
    likeliest: list[str]


def rebuilt(
    wire: LatentWire,
    texts: Sequence[str],
    arm: Literal["latent", "shuffled", "zero"] = "latent",
) -> list[Rebuilt]:
    """What each token of some texts costs the reader that has only their latents.

    Args:
      wire: the compressor and its reader.
      texts: of at most ``model.segment`` tokens each.
      arm: their own latents, the next text's, or zeros.

    Raises:
      DataError: an empty or too long text, or a single one to be read with another's latents.
    """
    ids, mask = _rows(wire, texts)
    if arm == "shuffled" and len(texts) < 2:
        raise DataError("one text has no other to be read with: give at least two")
    latents, reader = wire.latents, wire.reading
    made = baselines.encode(latents, ids, mask)
    if arm == "shuffled":
        made = jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), made)
    trained = "reconstruct" in wire.tasks
    latents = for_task(latents, "reconstruct" if trained else None)
    given = baselines.latent_given(
        arm, reader.decoder, reader.params, latents, made, np.arange(len(ids), dtype=np.int32),
        jax.random.key(0),
    )  # fmt: skip
    # Where no embedding was trained to ask for the text, words do.
    asking = [] if trained else reader.tokenizer.encode(AGAIN)
    prompt = pad_rows([asking] * len(ids), len(asking), wire.builder.pad_id)
    lead = latents.task("reconstruct", len(ids)) if trained else None
    given = baselines.instructed(latents, given, "reconstruct" if trained else None)
    nats, best = _forced(reader.decoder, reader.params, Asked(given, *prompt, lead), ids, mask)
    return [
        Rebuilt(_pieces(wire, row[:n]), np.asarray(cost[:n]), _pieces(wire, guess[:n]))
        for row, cost, guess, n in zip(ids, nats, np.asarray(best), mask.sum(1), strict=True)
    ]


@functools.partial(jax.jit, static_argnames=("decoder",))
def _forced(
    decoder: Decoder, params: Any, asked: Asked, ids: Int[Array, "b t"], mask: Bool[Array, "b t"]
) -> tuple[Float[Array, "b t"], Int[Array, "b t"]]:
    hidden = answer_hidden(decoder, params, asked, ids, mask)
    logits = decoder.apply({"params": params}, hidden, method="unembed")
    return metrics.token_nll(logits, ids), jnp.argmax(logits, -1)


def similarity(wire: LatentWire, texts: Sequence[str]) -> Float[np.ndarray, "n n"]:
    """Cosine between the mean latents of texts; near 1 everywhere is a collapse."""
    made = baselines.encode(wire.latents, *_rows(wire, texts))
    # Where latents are gated into something common to all texts, only what tells texts apart.
    z = np.asarray(wire.latents.module.informative(made), np.float32)
    weight = np.asarray(made.mask, np.float32)[..., None]
    mean = (z * weight).sum(1) / weight.sum(1)
    unit = mean / np.maximum(np.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)
    return unit @ unit.T


class Read(NamedTuple):
    """What a reader gets of a latent: the tokens that it stands for (none, if it is private), and
    those of the vocabulary that it is nearest.
    """

    span: str
    nearest: list[tuple[str, float]]


def nearest(wire: LatentWire, text: str, k: int = 5) -> list[Read]:
    """The ``k`` vocabulary entries nearest each latent of a text, with their cosine.

    A soft token is compared with the embeddings; a deep prefix by its values in the first layer,
    which in the reader depend on a token alone and not on its place. Of a latent that becomes
    several soft tokens there are as many, each with its part of the span; of the text's own
    entries (``encoder.slots: heads``) there are the tokens that any head of that layer keeps.

    Raises:
      DataError: an empty or too long text, or latents that only blocks read.
    """
    if wire.config.adapter.kind == "cross":
        raise DataError(
            "latents that blocks read are near no token: with adapter.kind=cross there are neither "
            "soft tokens nor values in the first layer"
        )
    ids, mask = _rows(wire, [text])
    latents, reader = wire.latents, wire.backbone
    made = baselines.encode(latents, ids, mask)
    prefix = latents.prefix(made)
    if prefix.kv is None:
        vectors, table = prefix.embeds[0], reader.params["embed"]
    else:
        vectors = prefix.kv.v[0, 0].reshape(prefix.kv.v.shape[2], -1)
        table = _first_values(reader.decoder, reader.params)
    c, tokens = wire.config, _pieces(wire, ids[0][: int(mask.sum())])
    real, entries = np.asarray(prefix.mask[0]), c.adapter.entries
    edges = span_edges(num_latents(c.segment, c.ratio) * entries, c.ratio / entries)
    if c.encoder.slots == "heads":
        kept = np.asarray(prefix.kv.bias[0, 0]) > MASKED  # [places, heads]
        vectors = np.where(np.repeat(kept, reader.config.head_dim, axis=1), vectors, 0)
        real, edges = kept.any(-1), np.arange(len(kept) + 1)
    spans = ["".join(tokens[a:b]) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    spans += [""] * (len(real) - len(spans))  # private latents come last
    found = nearest_tokens(np.asarray(vectors)[real], np.asarray(table), reader.tokenizer, k)
    return [Read(spans[i], near) for i, near in zip(np.flatnonzero(real), found, strict=True)]


def _first_values(decoder: Decoder, params: Any) -> Float[Array, "v d"]:
    """Values of every vocabulary entry in the first layer: the reader cut off after it."""
    first = decoder.clone(config=first_config(decoder.config, 1))
    cut = first_params(params, 1)

    def values(chunk: Int[Array, " n"]) -> Float[Array, "n d"]:
        x = embed(first, cut, chunk[:, None])
        return first.apply({"params": cut}, x).kv.v[0, :, 0].reshape(len(chunk), -1)

    size, step = decoder.config.vocab_size, 4096
    ids = np.pad(np.arange(size), (0, -size % step), mode="edge").reshape(-1, step)
    return jax.jit(lambda rows: jax.lax.map(values, rows))(jnp.asarray(ids)).reshape(
        ids.size, -1
    )[:size]


def held_out(system: Any, wire: LatentWire, count: int) -> list[str]:
    """The first held-out texts of a `LatentWireSystem` that are compressed in one piece.

    A few tokens cut out of a text may be more tokens when they are read again.
    """
    tokenizer, limit = wire.backbone.tokenizer, wire.config.segment
    texts = (tokenizer.decode(row.tolist()) for row in system.eval_data()[:, :limit])
    fitting = (text for text in texts if 0 < len(wire.builder.context_ids(text)) <= limit)
    return list(itertools.islice(fitting, count))


def _rows(wire: LatentWire, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded ids of texts that are compressed in one piece each."""
    rows, limit = [wire.builder.context_ids(text) for text in texts], wire.config.segment
    for number, row in enumerate(rows):
        if not 0 < len(row) <= limit:
            raise DataError(
                f"text {number} has {len(row)} tokens: look at texts of 1 to {limit}, which is "
                "what is compressed at once (model.segment)"
            )
    return pad_rows(rows, limit, wire.builder.pad_id)


def _pieces(wire: LatentWire, ids: Sequence[int]) -> list[str]:
    return [wire.backbone.tokenizer.decode([int(i)], skip_special=False) for i in ids]
