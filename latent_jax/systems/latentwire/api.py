"""LatentWire for people: compress a text once, then rebuild it or ask about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from latent_jax import backbones
from latent_jax.backbones.sink import sink_token
from latent_jax.core.errors import DataError
from latent_jax.systems.latentwire import baselines
from latent_jax.systems.latentwire.assets import load_compressor, read_compressor
from latent_jax.systems.latentwire.config import TASKS, ModelConfig, PromptConfig
from latent_jax.systems.latentwire.given import Asked
from latent_jax.systems.latentwire.model import Compressor, Wire, num_latents
from latent_jax.systems.latentwire.prompts import PromptBuilder, pad_rows
from latent_jax.systems.latentwire.scoring import context_width, decode


@dataclasses.dataclass(frozen=True)
class LatentWire:
    """A trained compressor with the frozen LLM that reads what it sends.

    Attributes:
      backbone: the frozen LLM.
      config: shape of the compressor.
      params: its trained parameters.
      builder: how questions are put.
      tasks: what its task embeddings were trained for; another task goes without one.

    Example:
      >>> wire = LatentWire.load("smollm2-4x")  # doctest: +SKIP
      >>> z = wire.compress("The mill at Dunmore burned down in 1911.")  # doctest: +SKIP
      >>> wire.reconstruct(z), wire.answer(z, "When did the mill burn down?")  # doctest: +SKIP
    """

    backbone: backbones.Backbone
    config: ModelConfig
    params: Any = dataclasses.field(repr=False)
    builder: PromptBuilder = dataclasses.field(repr=False)
    tasks: tuple[str, ...] = TASKS

    @classmethod
    def load(cls, name: str | Path, backbone: backbones.Backbone | None = None) -> LatentWire:
        """Loads a packaged compressor, an exported directory or a run.

        Raises:
          CheckpointError: no such compressor, or trained on another LLM.
          BackboneError: its LLM cannot be loaded.
        """
        stored = read_compressor(name)
        backbone = backbone or backbones.load(stored.backbone["name"])
        stored = load_compressor(name, backbone)
        params = jax.tree.map(jnp.asarray, stored.params)
        builder = PromptBuilder(backbone.tokenizer, PromptConfig())
        return cls(backbone, stored.config, params, builder, stored.tasks)

    @property
    def width(self) -> int:
        """Numbers per latent."""
        reader, c = self.backbone.config, self.config
        full = reader.kv_floats_per_token if c.encoder.output == "kv" else reader.hidden_size
        return c.wire.d_z or full

    @property
    def sink(self) -> int | None:
        """Token before everything the LLM is shown."""
        return sink_token(self.backbone.tokenizer) if self.config.sink else None

    @property
    def latents(self) -> baselines.Latents:
        """The compressor bound to its weights, as the evaluation takes it."""
        model = Compressor(self.config, self.backbone.config, self.sink)
        return baselines.Latents(module=model, params=self.params, frozen=self.backbone.params)

    def compress(self, texts: str | Sequence[str]) -> Wire:
        """Texts → latents; a text longer than ``config.segment`` tokens is compressed in segments.

        Raises:
          DataError: an empty text, or one longer than the LLM's context.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
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
        width = context_width(max(map(len, rows)), self.config.segment)
        ids, mask = pad_rows(rows, width, self.builder.pad_id)
        return compress_ids(self.latents, jnp.asarray(ids), jnp.asarray(mask))

    def answer(
        self, wire: Wire, questions: str | Sequence[str], max_new_tokens: int = 24
    ) -> list[str]:
        """Greedy answers about compressed texts, one question per text (or one for all)."""
        b = wire.z.shape[0]
        questions = [questions] * b if isinstance(questions, str) else list(questions)
        rows = [self.builder.prompt_ids(q) for q in questions]
        prompt = pad_rows(rows, max(map(len, rows)), self.builder.pad_id, left=True)
        ids, lengths = self._decode(wire, "answer", prompt, max_new_tokens, self.builder.stop_ids)
        return [self.builder.text(row[:n]) for row, n in zip(ids, lengths, strict=True)]

    def rebuild_ids(self, wire: Wire) -> list[list[int]]:
        """Greedy reconstructions as token ids: as many as each text had."""
        c = self.config
        m = num_latents(c.segment, c.ratio)
        b, total, _ = wire.z.shape
        n = max(1, total // m)
        start = np.arange(n) * c.segment
        # Each segment was compressed alone, so each is rebuilt alone, at the positions it was
        # compressed at.
        parts = Wire(
            wire.z.reshape(b * n, total // n, -1),
            wire.mask.reshape(b * n, -1),
            (wire.positions.reshape(b, n, -1) - start[:, None]).reshape(b * n, -1),
            jnp.clip(wire.length[:, None] - start, 0, c.segment).reshape(-1),
        )
        empty = np.zeros((b * n, 0), np.int32), np.zeros((b * n, 0), bool)
        lengths = np.asarray(parts.length)
        ids, _ = self._decode(parts, "reconstruct", empty, int(lengths.max()), ())
        rows = [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]
        return [sum(rows[i * n : (i + 1) * n], []) for i in range(b)]

    def reconstruct(self, wire: Wire) -> list[str]:
        """Greedy reconstructions as text."""
        return [self.backbone.tokenizer.decode(ids) for ids in self.rebuild_ids(wire)]

    def _decode(self, wire, task, prompt, max_new_tokens, stop_ids):
        latents, reader = self.latents, self.backbone
        given = _given(reader.decoder, latents, wire)
        lead = latents.task(task, wire.z.shape[0]) if task in self.tasks else None
        return decode(reader, Asked(given, *prompt, lead), max_new_tokens, stop_ids)


@jax.jit
def compress_ids(
    latents: baselines.Latents, ids: Int[Array, "b t"], mask: Bool[Array, "b t"]
) -> Wire:
    """Right-padded token ids → wire; ``t`` up to a segment, or a multiple of it."""
    return latents.compress(ids, mask)


def _given(decoder: Any, latents: baselines.Latents, wire: Wire) -> baselines.Given:
    @jax.jit
    def make(latents, wire):
        return baselines.prefix_to_given(decoder, latents.frozen, latents.prefix(wire))

    return make(latents, wire)
