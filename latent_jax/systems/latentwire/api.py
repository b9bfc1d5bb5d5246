"""LatentWire for people: compress a text once, then rebuild it or ask about it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from latent_jax import backbones
from latent_jax.backbones.decoder import Decoder
from latent_jax.backbones.padding import bucket
from latent_jax.backbones.sink import sink_token
from latent_jax.core.errors import CheckpointError, DataError, WireError
from latent_jax.systems.latentwire import baselines, reader_lora
from latent_jax.systems.latentwire.assets import load_compressor, read_compressor
from latent_jax.systems.latentwire.bits import mean_latent
from latent_jax.systems.latentwire.compressed import Compressed, Latents, for_task
from latent_jax.systems.latentwire.config import MAIN, TASKS, ModelConfig
from latent_jax.systems.latentwire.coprocessor import carrier
from latent_jax.systems.latentwire.first_shape import identity
from latent_jax.systems.latentwire.given import Asked, Given, prefix_to_given
from latent_jax.systems.latentwire.message import Message
from latent_jax.systems.latentwire.model import Compressor, Wire, num_latents, split_segments
from latent_jax.systems.latentwire.prompts import PromptBuilder, PromptConfig, pad_rows
from latent_jax.systems.latentwire.readers import Reader, latent_width, open_reader
from latent_jax.systems.latentwire.scoring import context_width, decode
from latent_jax.systems.latentwire.training_free import Selected, measured, model_config
from latent_jax.systems.latentwire.transcribe import room
from latent_jax.systems.latentwire.wire import (
    Origin,
    check_origin,
    is_wire,
    read_bytes,
    read_header,
    unpack,
)

#: What asks for a text of a compressor that was never trained to rebuild one.
AGAIN = "\nThe same text again:\n"


@dataclasses.dataclass(frozen=True)
class LatentWire:
    """A trained compressor with the frozen LLM that reads what it sends.

    Attributes:
      backbone: the frozen LLM.
      config: shape of the compressor.
      params: its trained parameters.
      builder: how questions are put.
      tasks: what its task embeddings were trained for; another task goes without one.
      name: what it was loaded as.
      centre: mean latent of its training texts, if known.
      method: of a compressor without training, else None.
      readers: of each further reader, the sha256 of the LLM that its adapter was trained for.
      by: the further reader that reads; None for the frozen LLM itself.

    Example:
      >>> wire = LatentWire.load("smollm2-4x")  # doctest: +SKIP
      >>> z = wire.compress("The mill at Dunmore burned down in 1911.")  # doctest: +SKIP
      >>> wire.reconstruct(z), wire.answer(z, "When did the mill burn down?")  # doctest: +SKIP
      >>> z.save("mill.wire", bits="int8")  # doctest: +SKIP
      >>> wire.answer(wire.open("mill.wire"), "What burned down?")  # doctest: +SKIP
    """

    backbone: backbones.Backbone
    config: ModelConfig
    params: Any = dataclasses.field(repr=False)
    builder: PromptBuilder = dataclasses.field(repr=False)
    tasks: tuple[str, ...] = TASKS
    name: str = ""
    centre: np.ndarray | None = dataclasses.field(default=None, repr=False)
    method: str | None = None
    readers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    by: Reader | None = dataclasses.field(default=None, repr=False)

    @classmethod
    def load(cls, name: str | Path, backbone: backbones.Backbone | None = None) -> LatentWire:
        """Loads a packaged compressor, an exported directory or a run.

        Raises:
          CheckpointError: no such compressor, or trained on another LLM.
          BackboneError: its LLM cannot be loaded.
        """
        if is_wire(name):
            raise CheckpointError(
                f"{name} is a stored wire, not a compressor: load its compressor and use "
                "LatentWire.open"
            )
        stored = read_compressor(name)
        backbone = backbone or backbones.load(stored.backbone["name"])
        stored = load_compressor(name, backbone)
        params = jax.tree.map(jnp.asarray, stored.params)
        builder = PromptBuilder(backbone.tokenizer, stored.prompt)
        return cls(
            backbone, stored.config, params, builder, stored.tasks, str(name), stored.centre,
            readers=stored.readers,
        )  # fmt: skip

    @classmethod
    def training_free(
        cls,
        reader: str | Path | backbones.Backbone = "smollm2",
        method: str = "kv_stride",
        ratio: float = 4.0,
        segment: int = 512,
    ) -> LatentWire:
        """A compressor that needs no training, behind the same methods.

        Args:
          reader: the LLM, or what `backbones.load` takes.
          method: ``kv_stride`` (every n-th entry of a frozen prefill), ``kv_topk`` (those with most
            attention from the text's end, per head), ``kv_heads`` (as many as each head needs, see
            `latent_jax.backbones.head_budgets`: by far the best), ``mean_pool`` (mean embeddings
            as soft tokens) or ``pca``.
          ratio: tokens per latent.
          segment: longest text compressed at once, tokens.

        Raises:
          ConfigError: an unknown method, or a ratio out of range.
          BackboneError: the LLM cannot be loaded.
        """
        config = model_config(method, ratio, segment)
        if not isinstance(reader, backbones.Backbone):
            reader = backbones.load(reader)
        builder = PromptBuilder(reader.tokenizer, PromptConfig())
        params = measured(method, reader, sink_token(reader.tokenizer))
        return cls(reader, config, params, builder, (), f"{reader.name}:{method}", method=method)

    def read_by(self, reader: str, backbone: backbones.Backbone | None = None) -> LatentWire:
        """The same compressor, whose latents another of its readers answers from.

        Args:
          reader: of ``config.readers``, or ``main``.
          backbone: its LLM, if it is loaded already.

        Raises:
          WireError: it has no adapter for that reader.
          BackboneError: the LLM cannot be loaded.
          CheckpointError: the LLM is another than the adapter was trained for.
        """
        if reader == MAIN:
            return dataclasses.replace(self, by=None)
        if reader not in self.config.readers:
            known = ", ".join([f"{MAIN} ({self.backbone.name})", *self.config.readers])
            raise WireError(
                f"{self.name or 'this compressor'} has no adapter for the reader {reader!r}; it "
                f"has {known}: train one with model.start and model.readers.{reader}"
            )
        found = open_reader(
            reader, self.config, self.backbone, self.builder.config, backbone,
            self.readers.get(reader, ""),
        )  # fmt: skip
        return dataclasses.replace(self, by=found)

    @property
    def width(self) -> int:
        """Numbers per latent."""
        return latent_width(self.config, self.backbone.config)

    @property
    def sink(self) -> int | None:
        """Token before everything the LLM is shown."""
        return sink_token(self.backbone.tokenizer) if self.config.sink else None

    @property
    def latents(self) -> Latents:
        """The compressor bound to its weights, as the evaluation takes it."""
        words = carrier(self.config.adapter, self.backbone.tokenizer)
        shape = self.config, self.backbone.config, self.sink, words
        model = Compressor(*shape) if self.method is None else Selected(*shape, method=self.method)
        return Latents(module=model, params=self.params, frozen=self.backbone.params)

    @functools.cached_property
    def reading(self) -> backbones.Backbone:
        """The LLM as it reads behind latents; other than ``backbone`` where it is not frozen."""
        return reader_lora.reading(self.latents, self.backbone)

    @property
    def not_frozen(self) -> str | None:
        """What of the LLM was trained, in words; None: nothing, it is frozen."""
        return reader_lora.note(self.config, self.params)

    @functools.cached_property
    def origin(self) -> Origin:
        """Who writes its wires: they are read by the same configuration and weights only."""
        params = self.params
        if self.centre is not None:
            params = {**params, "centre": self.centre}
        digest = identity(self.config, params, self.backbone.sha256, self.method)
        reader = self.backbone
        return Origin(self.name, digest, reader.name, reader.config.family)

    def compress(self, texts: str | Sequence[str], ratio: float | None = None) -> Message:
        """Texts → latents; a text longer than ``config.segment`` tokens is compressed in segments.

        Args:
          texts: one text, or several as one batch.
          ratio: tokens per latent, ``M = ceil(T / ratio)`` exactly; None takes the compressor's.
            Only memory slots, heads and methods without training can be put at another.

        Raises:
          DataError: an empty text, one longer than the LLM's context, or a ratio that this
            compressor does not have.
        """
        c = self.config
        if ratio is not None and ratio != c.ratio:
            self._check_ratio(ratio)
            c = dataclasses.replace(c, ratio=ratio)
        latents = dataclasses.replace(self, config=c).latents
        wire = self._compress(latents, texts, c.segment)
        private = sum(c.private_slots.values())
        made = Message(
            wire, self.origin, c.ratio, c.segment, self.centre, private=private,
            codes=c.wire.codes or c.wire.levels,
        )  # fmt: skip
        if ratio is not None:
            for tokens, m in zip(np.asarray(made.length).tolist(), made.latents, strict=True):
                m -= private * math.ceil(tokens / c.segment)
                if m != (exact := num_latents(tokens, ratio)):
                    raise DataError(
                        f"ratio {ratio:g} does not divide segments of {c.segment} tokens: {tokens} "
                        f"tokens become {m} latents ({tokens / m:.3f} tokens each) and not "
                        f"{exact}; leave ratio out to take that, or split the text"
                    )
        return made

    def encode(self, texts: str | Sequence[str]) -> Wire:
        """The bare latents of `compress`, at the compressor's own ratio."""
        return self._compress(self.latents, texts, self.config.segment)

    def _check_ratio(self, ratio: float) -> None:
        c = self.config
        if not ratio >= 1:
            raise DataError(f"ratio {ratio:g}: a latent stands for at least 1 token")
        if c.encoder.slots not in ("memory", "heads") and self.method is None:
            raise DataError(
                f"ratio {ratio:g}: {self.name or 'this compressor'} was trained at {c.ratio:g} "
                f"tokens per latent (M = ceil(T / {c.ratio:g})) and its slots have no other; "
                "leave ratio out, or train one with model.ratio"
            )

    def _compress(self, latents: Compressed, texts: str | Sequence[str], segment: int) -> Wire:
        ids, mask = self._padded([texts] if isinstance(texts, str) else list(texts), segment)
        return compress_ids(latents, jnp.asarray(ids), jnp.asarray(mask))

    def _padded(self, texts: Sequence[str], segment: int | None = None) -> Any:
        """Token ids and mask of texts, checked, in a static width."""
        if not texts:
            raise DataError("no text was given: there is nothing to compress")
        rows = [self.builder.context_ids(t) for t in texts]
        limit = self.backbone.config.max_position
        for number, row in enumerate(rows):
            if not row:
                raise DataError(f"text {number} is empty: there is nothing to compress")
            if len(row) > limit:
                raise DataError(
                    f"text {number} has {len(row)} tokens, {self.backbone.name} reads {limit}: "
                    "split it"
                )
        longest, segment = max(map(len, rows)), segment or self.config.segment
        width = min(segment, bucket(longest, 64))
        if longest > segment:
            width = context_width(longest, segment)
        return pad_rows(rows, width, self.builder.pad_id)

    def fit_centre(self, texts: Sequence[str], batch_size: int = 8) -> LatentWire:
        """The same with the mean latent of some texts as its centre, which integer wires take off.

        Most of a key is the same in every text; without that part, few bits go much further.
        """
        texts = list(texts)
        batches = [texts[i : i + batch_size] for i in range(0, len(texts), batch_size)]
        centre = mean_latent(self.latents, map(self._padded, batches))
        if centre is None:
            raise DataError("no text was given to fit a centre to")
        return dataclasses.replace(self, centre=centre)

    def unpack(self, data: bytes, name: str = "wire") -> Message:
        """Reads `Message.pack`'s bytes.

        Args:
          data: from another process, say.
          name: of the file, for messages.

        Raises:
          WireError: damaged or foreign bytes, or another encoder's.
        """
        header, _ = read_header(data, name)
        check_origin(header.origin, self.origin, name)
        codes = self.config.wire.codes or self.config.wire.levels
        decode = self.latents.from_digits if codes else None
        wire, header, _ = unpack(data, self.centre, name, decode)
        return Message(
            wire, self.origin, header.ratio, header.segment, self.centre, header.form,
            header.private, codes,
        )  # fmt: skip

    def open(self, path: str | Path) -> Message:
        """Reads a file of `Message.save`.

        Raises:
          WireError: as `unpack`, or no such file.
        """
        return self.unpack(read_bytes(path), str(path))

    def answer(
        self, wire: Message | Wire, questions: str | Sequence[str], max_new_tokens: int = 24
    ) -> list[str]:
        """Greedy answers about compressed texts.

        Args:
          wire: of `compress`, `encode`, `open` or `unpack`.
          questions: one for all texts, one per text, or several about a single text.
          max_new_tokens: longest answer.

        Raises:
          WireError: another encoder's latents.
          DataError: questions and texts that cannot be paired.
        """
        wire, latents = self._opened(wire)
        b = wire.z.shape[0]
        questions = [questions] * b if isinstance(questions, str) else list(questions)
        if b == 1 and len(questions) > 1:
            b = len(questions)
            wire = jax.tree.map(lambda x: jnp.repeat(x, b, axis=0), wire)
        if len(questions) != b:
            raise DataError(
                f"{len(questions)} questions about {b} texts: give one question per text, one for "
                "all, or several about a single text"
            )
        builder = self._builder
        rows = [builder.prompt_ids(q) for q in questions]
        prompt = pad_rows(rows, max(map(len, rows)), builder.pad_id, left=True)
        ids, lengths = self._decode(latents, wire, "answer", prompt, max_new_tokens)
        return [builder.text(row[:n]) for row, n in zip(ids, lengths, strict=True)]

    def rebuild_ids(self, wire: Message | Wire) -> list[list[int]]:
        """Greedy reconstructions as token ids: as many as each text had, or as many as another
        reader takes to say it.
        """
        wire, latents = self._opened(wire)
        c, builder = latents.module.config, self._builder
        parts = split_segments(wire, c.segment, c.ratio, sum(c.private_slots.values()))
        b, n = len(wire.z), len(parts.z) // len(wire.z)
        # Where no embedding was trained to ask for the text, words do.
        asking = [] if "reconstruct" in self.tasks else builder.tokenizer.encode(AGAIN)
        prompt = pad_rows([asking] * (b * n), len(asking), builder.pad_id)
        lengths, stops = np.asarray(parts.length), ()
        if self.by is not None:
            lengths = np.array([room(self.by.config, k) if k else 0 for k in lengths.tolist()])
            stops = builder.tokenizer.stop_ids
        ids, said = self._decode(latents, parts, "reconstruct", prompt, int(lengths.max()), stops)
        rows = [row[: min(k, m)].tolist() for row, k, m in zip(ids, lengths, said, strict=True)]
        return [sum(rows[i * n : (i + 1) * n], []) for i in range(b)]

    def reconstruct(self, wire: Message | Wire) -> list[str]:
        """Greedy reconstructions as text."""
        return [self._builder.tokenizer.decode(ids) for ids in self.rebuild_ids(wire)]

    @property
    def _builder(self) -> PromptBuilder:
        return self.builder if self.by is None else self.by.builder

    def _opened(self, wire: Message | Wire) -> tuple[Wire, Any]:
        """Bare latents, and the compressor at the ratio and segment that they were made with."""
        if isinstance(wire, Wire):
            return wire, self.latents
        check_origin(wire.origin, self.origin, "these latents")
        c = dataclasses.replace(self.config, ratio=wire.ratio, segment=wire.segment)
        return wire.wire, dataclasses.replace(self, config=c).latents

    def _decode(self, latents, wire, task, prompt, max_new_tokens, stop_ids=None):
        reader, stop_ids = self.reading, self._builder.stop_ids if stop_ids is None else stop_ids
        if self.by is not None:
            reader, latents = self.by.backbone, self.by.latents(latents)
        known = for_task(latents, task if task in self.tasks else None)
        given = _given(reader.decoder, reader.params, known, wire)
        lead = latents.task(task, wire.z.shape[0]) if task in self.tasks else None
        given = baselines.instructed(latents, given, task if task in self.tasks else None)
        return decode(reader, Asked(given, *prompt, lead), max_new_tokens, stop_ids)


@jax.jit
def compress_ids(
    latents: Compressed, ids: Int[Array, "b t"], mask: Bool[Array, "b t"]
) -> Wire:
    """Right-padded token ids → wire; ``t`` up to a segment, or a multiple of it."""
    return latents.compress(ids, mask)


@functools.partial(jax.jit, static_argnums=0)
def _given(decoder: Decoder, params: Any, latents: Any, wire: Wire) -> Given:
    return prefix_to_given(decoder, params, latents.prefix(wire))
