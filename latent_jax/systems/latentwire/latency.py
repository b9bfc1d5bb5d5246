"""How long a reader takes to its first token: from a stored wire, and from the text itself.

Both read the same questions behind the same learned prompt, and both have everything in memory: the
text as token ids, the wire as the bytes of its file.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from latent_jax.backbones.decoder import Decoder
from latent_jax.backbones.generate import prefill
from latent_jax.backbones.padding import left_align
from latent_jax.systems.latentwire.api import LatentWire, compress_ids
from latent_jax.systems.latentwire.compressed import Compressed
from latent_jax.systems.latentwire.cost import reading
from latent_jax.systems.latentwire.given import Asked, Given, embed, join, prefix_to_given
from latent_jax.systems.latentwire.message import Message
from latent_jax.systems.latentwire.model import Wire
from latent_jax.systems.latentwire.prompts import pad_rows
from latent_jax.systems.latentwire.scoring import Progress
from latent_jax.systems.latentwire.wire import places


@functools.partial(jax.jit, static_argnames=("decoder",))
def first_from_text(
    decoder: Decoder, params: Any, ids: Int[Array, "b t"], asked: Asked
) -> Int[Array, " b"]:
    """The first token behind texts (of full length) and questions."""
    text = embed(decoder, params, ids)
    given = Given(None, text, jnp.ones(ids.shape, bool), jnp.zeros(len(ids), jnp.int32))
    return _first(decoder, params, asked._replace(given=given))


@functools.partial(jax.jit, static_argnames=("decoder",))
def first_from_wire(
    decoder: Decoder, params: Any, latents: Compressed, wire: Wire, asked: Asked
) -> Int[Array, " b"]:
    """The first token behind wires and questions."""
    given = prefix_to_given(decoder, params, latents.prefix(wire))
    return _first(decoder, params, asked._replace(given=given))


def _first(decoder: Decoder, params: Any, asked: Asked) -> Int[Array, " b"]:
    embeds, mask = left_align(*join(decoder, params, asked))
    given = asked.given
    hidden, _, _ = prefill(decoder, params, embeds, mask, given.start, given.kv, room=0)
    logits = decoder.apply({"params": params}, hidden[:, None], method="unembed")
    return jnp.argmax(logits[:, 0], axis=-1)


def first_token(
    wire: LatentWire, questions: list[str], tokens: int, pairs: int = 3, seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, float]:  # fmt: skip
    """Times of the first tokens of some questions, each on a text of its own.

    Nothing but time is looked at: texts are random tokens. Every program runs once before, so that
    it is compiled; then text and wire take turns.

    Args:
      wire: the compressor.
      questions: a row each.
      tokens: of each text.
      pairs: timed runs of each.
      seed: of the texts.
      progress: called as progress(what, done, total).

    Returns:
      ``cost.seconds_to_first_token.latent`` (from the wire's bytes; ``cost.unpack_seconds`` of them
      are reading these) and ``.full_text``, medians for all rows together; ``cost.speedup``, the
      median of the paired ratios, with the smallest and largest as ``_min`` and ``_max``;
      ``cost.encode_seconds``; and what `sizes` gives, of all rows.
    """
    reader, rows = wire.reading, len(questions)
    rng = np.random.default_rng(seed)
    ids = jnp.asarray(rng.integers(0, reader.config.vocab_size, (rows, tokens)), jnp.int32)
    prompts = [wire.builder.prompt_ids(q) for q in questions]
    prompt = pad_rows(prompts, max(map(len, prompts)), wire.builder.pad_id, left=True)
    lead = wire.latents.task("answer", rows) if "answer" in wire.tasks else None
    asked = Asked(Given(None, None, None, jnp.zeros(rows)), *map(jnp.asarray, prompt), lead)
    latents, mask = wire.latents, jnp.ones(ids.shape, bool)

    def encode() -> Any:
        return compress_ids(latents, ids, mask)

    stored = _message(wire, encode()).pack("codes" if _discrete(wire) else "fp32")

    def unpack() -> Any:
        return wire.unpack(stored).wire

    def from_wire() -> Any:
        found = jax.tree.map(jnp.asarray, unpack())
        return first_from_wire(reader.decoder, reader.params, latents, found, asked)

    def from_text() -> Any:
        return first_from_text(wire.backbone.decoder, wire.backbone.params, ids, asked)

    programs = {"wire": from_wire, "text": from_text, "unpack": unpack, "encode": encode}
    times: dict[str, list[float]] = {name: [] for name in programs}
    for run in programs.values():
        _seconds(run)
    for i in range(pairs):
        order = list(programs)
        for name in order if i % 2 == 0 else order[::-1]:
            times[name].append(_seconds(programs[name]))
        if progress is not None:
            progress("time to first token", i + 1, pairs)
    ratios = [text / own for own, text in zip(times["wire"], times["text"], strict=True)]
    middle = {name: statistics.median(found) for name, found in times.items()}
    return {
        "cost.seconds_to_first_token.latent": middle["wire"],
        "cost.seconds_to_first_token.full_text": middle["text"],
        "cost.speedup": statistics.median(ratios),
        "cost.speedup_min": min(ratios), "cost.speedup_max": max(ratios),
        "cost.unpack_seconds": middle["unpack"], "cost.encode_seconds": middle["encode"],
        "cost.wire_bytes": len(stored),
        **sizes(wire, tokens, rows),
    }  # fmt: skip


def sizes(wire: LatentWire, tokens: int, rows: int = 1) -> dict[str, float]:
    """What is held and computed for texts of some length: nothing runs.

    Args:
      wire: the compressor.
      tokens: of each text.
      rows: texts.

    Returns:
      ``cost.texts``, ``cost.text_tokens``, ``cost.kv_bytes.latent`` and ``.full_text`` (where the
      reader reads), ``cost.prefill_flops.latent`` and ``.full_text``, and ``cost.encode_flops``.
    """
    c = wire.config
    width = tokens if tokens <= c.segment else c.segment * -(-tokens // c.segment)
    made, _ = places([tokens], width, c.ratio, c.segment, sum(c.private_slots.values()))
    found = reading(wire, [tokens] * rows, [int(made.sum())] * rows)
    return {
        "cost.texts": rows, "cost.text_tokens": tokens,
        "cost.kv_bytes.latent": found.latent_kv_bytes,
        "cost.kv_bytes.full_text": found.text_kv_bytes,
        "cost.prefill_flops.latent": found.latent_flops,
        "cost.prefill_flops.full_text": found.text_flops,
        "cost.encode_flops": found.encode_flops,
    }  # fmt: skip


def _message(wire: LatentWire, z: Wire) -> Message:
    c = wire.config
    return Message(
        z, wire.origin, c.ratio, c.segment, wire.centre, private=sum(c.private_slots.values()),
        codes=c.wire.codes or c.wire.levels,
    )  # fmt: skip


def _discrete(wire: LatentWire) -> bool:
    return bool(wire.config.wire.codes or wire.config.wire.levels)


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start
