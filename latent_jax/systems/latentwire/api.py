"""LatentWire for people: compress a text once, then rebuild it or ask about it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latent_jax import backbones
from latent_jax.backbones.sink import sink_token
from latent_jax.core.errors import CheckpointError, DataError, WireError
from latent_jax.systems.latentwire import reader_lora, telling, texts_in
from latent_jax.systems.latentwire.assets import load_compressor, read_compressor
from latent_jax.systems.latentwire.bits import mean_latent
from latent_jax.systems.latentwire.compressed import Compressed, Latents
from latent_jax.systems.latentwire.config import MAIN, TASKS, ModelConfig
from latent_jax.systems.latentwire.coprocessor import carrier
from latent_jax.systems.latentwire.first_shape import identity
from latent_jax.systems.latentwire.message import Message
from latent_jax.systems.latentwire.model import Compressor, Wire
from latent_jax.systems.latentwire.prompts import PromptBuilder, PromptConfig
from latent_jax.systems.latentwire.readers import Reader, latent_width, open_reader
from latent_jax.systems.latentwire.separate_encoder import Separate, beside, open_encoder
from latent_jax.systems.latentwire.telling import AGAIN
from latent_jax.systems.latentwire.texts_in import compress_ids
from latent_jax.systems.latentwire.training_free import Selected, measured, model_config
from latent_jax.systems.latentwire.wire import (
    Origin,
    check_origin,
    is_wire,
    read_bytes,
    read_header,
    unpack,
)

__all__ = ["AGAIN", "LatentWire", "compress_ids"]


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
      separate: what encodes in place of the LLM (``encoder.backbone``); None for the LLM itself.

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
    separate: Separate | None = dataclasses.field(default=None, repr=False)

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
        separate = open_encoder(stored.config, backbone, sha256=stored.encoder)
        params = jax.tree.map(jnp.asarray, stored.params)
        builder = PromptBuilder(backbone.tokenizer, stored.prompt)
        return cls(
            backbone, stored.config, params, builder, stored.tasks, str(name), stored.centre,
            readers=stored.readers, separate=separate,
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
        other = None if self.separate is None else self.separate.body
        shape = self.config, self.backbone.config, self.sink, words, other
        model = Compressor(*shape) if self.method is None else Selected(*shape, method=self.method)
        frozen = beside(self.backbone.params, self.separate)
        return Latents(module=model, params=self.params, frozen=frozen)

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
        encoder = "" if self.separate is None else self.separate.backbone.sha256
        reader = self.backbone
        digest = identity(self.config, params, reader.sha256, self.method, encoder)
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
            texts_in.check_ratio(c, ratio, self.name, self.method is not None)
            c = dataclasses.replace(c, ratio=ratio)
        latents = dataclasses.replace(self, config=c).latents
        wire = self._compress(latents, texts, c.segment)
        private = sum(c.private_slots.values())
        made = Message(
            wire, self.origin, c.ratio, c.segment, self.centre, private=private,
            codes=c.wire.codes or c.wire.levels,
        )  # fmt: skip
        if ratio is not None:
            texts_in.check_count(made, c)
        return made

    def encode(self, texts: str | Sequence[str]) -> Wire:
        """The bare latents of `compress`, at the compressor's own ratio."""
        return self._compress(self.latents, texts, self.config.segment)

    def _compress(self, latents: Compressed, texts: str | Sequence[str], segment: int) -> Wire:
        ids, mask = self._padded([texts] if isinstance(texts, str) else list(texts), segment)
        return compress_ids(latents, jnp.asarray(ids), jnp.asarray(mask))

    def _padded(self, texts: Sequence[str], segment: int | None = None) -> Any:
        """Token ids and mask of texts, checked, in a static width."""
        return texts_in.padded(texts, self.builder, self.backbone, segment or self.config.segment)

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
        return telling.answers(self, *self._opened(wire), questions, max_new_tokens)

    def rebuild_ids(self, wire: Message | Wire) -> list[list[int]]:
        """Greedy reconstructions as token ids: as many as each text had, or as many as another
        reader takes to say it.
        """
        return telling.rebuilt(self, *self._opened(wire))

    def reconstruct(self, wire: Message | Wire) -> list[str]:
        """Greedy reconstructions as text."""
        decode = telling.builder_of(self).tokenizer.decode
        return [decode(ids) for ids in self.rebuild_ids(wire)]

    def _opened(self, wire: Message | Wire) -> tuple[Wire, Any]:
        """Bare latents, and the compressor at the ratio and segment that they were made with."""
        if isinstance(wire, Wire):
            return wire, self.latents
        check_origin(wire.origin, self.origin, "these latents")
        c = dataclasses.replace(self.config, ratio=wire.ratio, segment=wire.segment)
        return wire.wire, dataclasses.replace(self, config=c).latents
