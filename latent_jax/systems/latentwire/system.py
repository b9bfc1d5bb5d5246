"""LatentWire as the shared trainer sees it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latent_jax import backbones
from latent_jax.backbones.cross_entropy import token_cross_entropy
from latent_jax.backbones.sharding import DECODER_RULES
from latent_jax.backbones.sink import sink_token
from latent_jax.core import trees
from latent_jax.data.squad import QAExample
from latent_jax.systems.latentwire import bottleneck, recipe, suite
from latent_jax.systems.latentwire.api import LatentWire
from latent_jax.systems.latentwire.assets import (
    check_parts,
    load_compressor,
    save_centre,
    save_compressor,
    trained_tasks,
    training_record,
    with_every_task,
)
from latent_jax.systems.latentwire.baselines import Compressed
from latent_jax.systems.latentwire.bits import mean_latent
from latent_jax.systems.latentwire.config import LatentWireRun
from latent_jax.systems.latentwire.evaluate import check_arms, check_examples
from latent_jax.systems.latentwire.losses import batch_terms, cosine_between, forced
from latent_jax.systems.latentwire.model import Compressor
from latent_jax.systems.latentwire.prompts import PromptBuilder
from latent_jax.systems.latentwire.tuned import init_prompt, train_controls

_LABELS = (
    (r"^lora/.*_a$", "lora_a"),
    (r"^lora/.*_b$", "lora_b"),
    (r"^pool/[kv]$", "pool"),
    (r"^gate$", "gate"),
    (r"^(memory|tasks)$", "memory"),
    (r"^prompt$", "prompt"),
    (r"^(in_mean|in_scale)$", "frozen"),
    (r"^(down|up|out_mean|out_scale)$", "bottleneck"),
)


class LatentWireSystem:
    """Implements `latent_jax.train.protocol.System`.

    Args:
      config: the resolved run.
      backbone: an already loaded reader; by default ``config.backbone`` is loaded.
    """

    config_class = LatentWireRun
    rng_names = ("corrupt",)
    jit_init = False  # may read weights and fits the bottleneck on data
    logical_rules = (
        *DECODER_RULES,
        (r"lora/(o|down)_a$", ("layers", "heads", "rank")),
        (r"lora/(q|k|v|gate|up)_a$", ("layers", "embed", "rank")),
        (r"lora/(q|k|v|gate|up)_b$", ("layers", "rank", "heads")),
        (r"lora/(o|down)_b$", ("layers", "rank", "embed")),
        (r"pool/[kv]$", ("layers", None, "embed", "heads")),
    )

    def __init__(self, config: LatentWireRun, backbone: backbones.Backbone | None = None):
        check_arms(config.eval.arms, config.eval.tuned, config.model.prompt_tokens)
        self.config = config
        self.backbone = backbone or backbones.load(
            config.backbone.name, dtype=jnp.dtype(config.backbone.dtype)
        )
        self.body = self.backbone.decoder
        self.sink = sink_token(self.backbone.tokenizer) if config.model.sink else None
        self.model = Compressor(config.model, self.backbone.config, self.sink)
        self.builder = PromptBuilder(self.backbone.tokenizer, config.prompt)
        self.frozen = {"reader": self.backbone.params}
        losses = config.losses
        self.weights = {
            "reconstruct": losses.reconstruct,
            "continue": losses.proceed,
            "answer": losses.answer,
            "recall": losses.recall,
            "first_token": losses.first_token,
            "distil_logits": losses.distil_logits,
            "distil_states": losses.distil_states,
        }
        self._held_out: np.ndarray | None = None
        self._questions: list[QAExample] | None = None
        self._tuned: dict[str, jax.Array] = {}
        self._quick = jax.jit(self._quick_terms)

    def init(self, rngs: Mapping[str, jax.Array], batch: Mapping[str, Any]) -> dict[str, Any]:
        """Fresh parameters, or those of ``model.start``; a fresh bottleneck is fitted to data."""
        reader = self.frozen["reader"]
        make = jax.jit(lambda r, i, m: self.model.init(rngs["params"], r, i, m)["params"])
        ids = jnp.zeros(batch["context"].shape, jnp.int32)
        params = make(reader, ids, jnp.ones(ids.shape, bool))
        model = self.config.model
        if model.prompt_tokens:
            tokenizer = self.backbone.tokenizer
            params |= init_prompt(reader["embed"], tokenizer, model.prompt_tokens)
        start = {}
        if model.start is not None:
            start = load_compressor(model.start, self.backbone).params
            params = bottleneck.adopt(params, start, model.start)
        if model.wire.d_z is not None and "down" not in start:
            params = bottleneck.fit(self.model, params, reader, self.train_data("main", None))
        return {"params": params}

    def init_shapes(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Shapes of what `init` returns: neither a start's weights nor the data are read."""
        ids = batch["context"]
        found = jax.eval_shape(
            lambda r, i: self.model.init(jax.random.key(0), r, i, jnp.ones(i.shape, bool)),
            self.frozen["reader"], jax.ShapeDtypeStruct(ids.shape, jnp.int32),
        )  # fmt: skip
        return {"params": found["params"]}

    def batch_specs(self, phase: str):
        """See `recipe.batch_specs`."""
        return recipe.batch_specs(self.config, phase)

    def param_labels(self, params):
        """Groups ``lora_a``, ``lora_b``, ``pool``, ``gate``, ``memory``, ``prompt`` and
        ``bottleneck``; a bottleneck's input statistics are frozen.
        """
        return trees.match_tree(_LABELS, params)

    def unit_counts(self, batch: Mapping[str, Any]) -> dict[str, int]:
        """Compressed tokens in a batch."""
        return {"tokens": int(np.sum(batch["context_mask"]))}

    def loss_terms(self, variables, frozen, batch, rngs, train):
        """See `batch_terms`."""
        return batch_terms(
            self.model, self.config, variables["params"], frozen["reader"], batch,
            rngs["corrupt"] if train else None,
        )  # fmt: skip

    def train_data(self, phase: str, start_state: Any):
        """The mixture of tasks, or of the phase ``prompt`` questions on raw texts.

        Raises:
          DataError: training or evaluation data that is missing or cannot serve: better said now
            than when training is over.
        """
        if self.config.eval.questions:
            check_examples(
                self.builder, self.held_out_questions(), self.config.data.max_context,
                self.config.eval.arms,
            )  # fmt: skip
        if self.config.eval.segments:
            self.eval_data()
        stream = recipe.train_stream(self.config, self.backbone.tokenizer, self.builder, phase)
        if start_state is not None:
            stream.set_state(start_state)
        return stream

    def held_out_questions(self) -> list[QAExample]:
        """``eval.questions`` examples of the validation split whose passage fits."""
        if self._questions is None:
            n = self.config.eval.questions
            self._questions, _ = recipe.questions(self.config, self.builder, "validation", n)
        return self._questions

    def eval_data(self) -> np.ndarray:
        """Held-out token segments, ``[n, length]``."""
        if self._held_out is None:
            e = self.config.eval
            limit = max(e.segments, e.quick_segments, 2)
            self._held_out = recipe.text_segments(
                self.config, self.backbone.tokenizer, "validation", limit
            )
        return self._held_out

    def _quick_terms(self, params, reader, ids):
        batch = {
            "context": ids,
            "context_mask": jnp.ones(ids.shape, bool),
            "inputs": ids,
            "inputs_mask": jnp.ones(ids.shape, bool),
            "supervised": jnp.ones(ids.shape, bool),
            "task": jnp.zeros(ids.shape[:1], jnp.int32),
        }
        apply = functools.partial(self.model.apply, {"params": params})
        shown = apply(reader, ids, batch["context_mask"], method="compress")
        lead = apply(batch["task"], method="lead")

        def score(wire):
            prefix = apply(wire, reader["embed"].dtype, method="prefix")
            hidden = forced(self.body, reader, prefix, lead, ids, batch["inputs_mask"]).hidden
            nll, hit = token_cross_entropy(self.body, reader, hidden, ids, self.config.losses.chunk)
            return nll.mean(), hit.mean()

        other = jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), shown)
        return score(shown), score(other), cosine_between(self.model, shown)

    def quick_eval(self, variables, frozen) -> dict[str, float]:
        """Teacher-forced reconstruction of held-out segments, with own and with a neighbour's
        latents.
        """
        n = self.config.eval.quick_segments
        if not n or not self.config.data.mix.get("reconstruct"):
            return {}
        own, other, cosine = self._quick(
            variables["params"], frozen["reader"], jnp.asarray(self.eval_data()[:n])
        )
        return {
            "reconstruct": float(own[0]),
            "reconstruct_accuracy": float(own[1]),
            "reconstruct_accuracy.shuffled": float(other[1]),
            "latent_cosine": float(cosine),
        }

    def wire(self, variables, frozen) -> LatentWire:
        """The compressor with these weights, as users hold it.

        Raises:
          ConfigError: the weights are not those of this configuration's parts.
        """
        context = jax.ShapeDtypeStruct((1, self.config.model.segment), jnp.int32)
        check_parts(variables["params"], self.init_shapes({"context": context})["params"])
        backbone = dataclasses.replace(self.backbone, params=frozen["reader"])
        params, tasks = with_every_task(variables["params"]), trained_tasks(self.config)
        return LatentWire(backbone, self.config.model, params, self.builder, tasks)

    def centre(self, latents: Compressed, batches: int = 24) -> np.ndarray | None:
        """Mean latent of the first training texts, which integer wires take off."""
        stream = itertools.islice(self.train_data("main", None), batches)
        return mean_latent(latents, ((row["context"], row["context_mask"]) for row in stream))

    def train_controls(self, fit, out, mesh=None) -> None:
        """Trains the soft prompts of ``eval.tuned``, each a small (resumable) run below ``out``."""
        arms = self.config.eval.tuned if self.config.eval.questions else ()
        self._tuned = train_controls(self.config, self.backbone, self.builder, arms, fit, out, mesh)

    def evaluate(self, variables, frozen, progress=None):
        """See `suite.final_evaluation`."""
        wire = self.wire(variables, frozen)
        return suite.final_evaluation(self, wire, progress, self._tuned)

    def ask(self, variables, frozen, text: str, question: str) -> dict[str, Any]:
        """Compresses a text, rebuilds it, and answers from the latents alone."""
        return suite.demonstrate(self.wire(variables, frozen), text, question)

    def generate(self, variables, frozen, prompt: str) -> dict[str, Any]:
        """Compresses a text and rebuilds it."""
        return suite.demonstrate(self.wire(variables, frozen), prompt, None)

    def diagnose(self, variables, frozen, run: str | None = None) -> dict[str, Any]:
        """Statistics of the latents of held-out texts, and what is known to be wrong with them."""
        return suite.diagnosis(self, self.wire(variables, frozen), run)

    def export(self, variables, frozen, to: str, run: str | None = None) -> dict[str, Any]:
        """Writes the compressor, large matrices as int8, with the record of how it was trained."""
        record = training_record(run) if run is not None else {}
        params, tasks = variables["params"], trained_tasks(self.config)
        config = self.config
        out = save_compressor(
            to, params, config.model, self.backbone, tasks, record, config.prompt
        )
        # Of the weights as they are stored, which are what will be loaded.
        stored = jax.tree.map(jnp.asarray, load_compressor(out, self.backbone).params)
        centre = self.centre(self.wire({"params": stored}, frozen).latents)
        if centre is not None:
            save_centre(out, centre, f"the first training texts of {config.name}")
        size = sum(f.stat().st_size for f in out.iterdir())
        return {"written": out, "megabytes": f"{size / 1e6:.1f}"}

    def show(self, results):
        """What a run ends with: its numbers, and one passage compressed, rebuilt and asked."""
        return {**results, **(results.artefacts.get("demonstration") or {})}
