"""LatentWire as the shared trainer sees it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latent_jax import backbones
from latent_jax.backbones.sink import sink_token
from latent_jax.core import rng, trees
from latent_jax.data.squad import QAExample
from latent_jax.systems.latentwire import (
    beginning,
    faults,
    heads,
    reader_lora,
    reader_start,
    recipe,
    suite,
)
from latent_jax.systems.latentwire.annealing import verdict
from latent_jax.systems.latentwire.api import LatentWire
from latent_jax.systems.latentwire.assets import (
    check_parts,
    is_compressor,
    load_compressor,
    save_centre,
    save_compressor,
    stored_run,
    trained_tasks,
    training_record,
    with_every_task,
)
from latent_jax.systems.latentwire.bits import mean_latent
from latent_jax.systems.latentwire.codes import as_params, as_variables
from latent_jax.systems.latentwire.compressed import Compressed
from latent_jax.systems.latentwire.config import LatentWireRun
from latent_jax.systems.latentwire.coprocessor import carrier
from latent_jax.systems.latentwire.diagnose import read_log
from latent_jax.systems.latentwire.evaluate import check_arms, check_examples
from latent_jax.systems.latentwire.extraction import SPAN
from latent_jax.systems.latentwire.labels import LABELS, OF_MAIN, RULES
from latent_jax.systems.latentwire.losses import batch_terms
from latent_jax.systems.latentwire.model import Compressor
from latent_jax.systems.latentwire.prompts import PromptBuilder
from latent_jax.systems.latentwire.quick import make_quick, quick_eval
from latent_jax.systems.latentwire.readers import open_reader
from latent_jax.systems.latentwire.separate_encoder import (
    apart,
    beside,
    check_weights,
    open_encoder,
)
from latent_jax.systems.latentwire.several import train_reader_controls
from latent_jax.systems.latentwire.transcribe import check_window
from latent_jax.systems.latentwire.tuned import train_controls


class LatentWireSystem:
    """Implements `latent_jax.train.protocol.System`.

    Args:
      config: the resolved run.
      backbone: an already loaded reader; by default ``config.backbone`` is loaded.
    """

    config_class = LatentWireRun
    rng_names = ("corrupt",)
    jit_init = False  # may read weights and fits the bottleneck on data
    logical_rules = RULES

    def __init__(self, config: LatentWireRun, backbone: backbones.Backbone | None = None):
        check_arms(config.eval.arms, config.eval.tuned, config.model.prompt_tokens)
        self.config = config
        self.backbone = backbone or backbones.load(
            config.backbone.name, dtype=jnp.dtype(config.backbone.dtype)
        )
        self.body = self.backbone.decoder
        self.sink = sink_token(self.backbone.tokenizer) if config.model.sink else None
        words = carrier(config.model.adapter, self.backbone.tokenizer)
        self.separate = open_encoder(config.model, self.backbone)
        other = None if self.separate is None else self.separate.body
        self.model = Compressor(config.model, self.backbone.config, self.sink, words, other)
        self.builder = PromptBuilder(self.backbone.tokenizer, config.prompt)
        # A word that cannot be forbidden is told now.
        config.eval.nudges.banned(self.builder, self.backbone.config.vocab_size, 1)
        self.readers = {
            label: open_reader(label, config.model, self.backbone, config.prompt)
            for label in config.model.readers
        }
        for other in self.readers.values():
            check_window(other, config.data)
        self.frozen = {"reader": beside(self.backbone.params, self.separate)}
        if self.readers:
            own = {label: r.backbone.params for label, r in self.readers.items()}
            self.frozen["readers"] = own
        losses = config.losses
        common = {
            "reconstruct": losses.reconstruct,
            "continue": losses.proceed,
            "answer": losses.answer,
            "recall": losses.recall,
            "first_token": losses.first_token,
        }
        self.weights = {
            **common,
            **{name: getattr(losses, name) for name in OF_MAIN},
            **{f"{k}.{label}": w for label in self.readers for k, w in common.items()},
        }
        self.rates = losses.scheduled
        self._held_out: np.ndarray | None = None
        self._questions: dict[str, list[QAExample]] | None = None
        self._tuned: dict[str, jax.Array] = {}
        self.tuned_by: dict[str, dict[str, jax.Array]] = {}
        self.quick = {name: make_quick(self, name) for name in config.read_by}

    def init(self, rngs: Mapping[str, jax.Array], batch: Mapping[str, Any]) -> dict[str, Any]:
        """Fresh parameters, or those of ``model.start``; a fresh bottleneck is fitted to data."""
        return beginning.fresh(self, rngs, batch)

    def init_shapes(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Shapes of what `init` returns: neither a start's weights nor the data are read."""
        ids = batch["context"]
        found = jax.eval_shape(
            lambda r, i: self.model.init(jax.random.key(0), r, i, jnp.ones(i.shape, bool)),
            self.frozen["reader"], jax.ShapeDtypeStruct(ids.shape, jnp.int32),
        )  # fmt: skip
        params = dict(found["params"])
        if self.readers:
            params["readers"] = jax.eval_shape(
                lambda: reader_start.fresh(self.readers, jax.random.key(0))
            )
        return {**found, "params": params}

    @property
    def notes(self) -> tuple[str, ...]:
        """How many latents texts get whose tokens do not divide into whole spans."""
        return self.config.spans

    def batch_specs(self, phase: str):
        """See `recipe.batch_specs`."""
        return recipe.batch_specs(self.config, phase)

    def param_labels(self, params):
        """Groups ``lora_a``, ``lora_b``, ``encoder``, ``pool``, ``bytes``, ``refiner``,
        ``adapter``, ``gate``, ``memory``, ``prompt``, ``heads``, ``bottleneck``, ``gist`` and
        ``reader_lora``, and ``reader_<name>`` of each further reader; input statistics are frozen.
        """
        own = [(rf"^readers/{label}/", f"reader_{label}") for label in self.readers]
        return trees.match_tree((*LABELS, *own), params)

    def unit_counts(self, batch: Mapping[str, Any]) -> dict[str, int]:
        """Compressed tokens in a batch."""
        return {"tokens": int(np.sum(batch["context_mask"]))}

    def loss_terms(self, variables, frozen, batch, rngs, train, rates=None):
        """See `batch_terms`."""
        return batch_terms(
            self.model, self.config, variables["params"], frozen, batch,
            rngs["corrupt"] if train else None, self.readers, rates,
            {name: tree for name, tree in variables.items() if name != "params"},
        )  # fmt: skip

    def train_data(self, phase: str, start_state: Any):
        """The mixture of tasks, or of the phase ``prompt`` questions on raw texts.

        Raises:
          DataError: training or evaluation data that is missing or cannot serve: better said now
            than when training is over.
        """
        if self.config.eval.questions:
            for examples in self.question_sets().values():
                check_examples(
                    self.builder, examples, self.config.data.max_context, self.config.eval.arms
                )
            if SPAN in self.config.eval.extract:  # of what its head is trained
                recipe.questions(self.config, self.builder, "train", 1)
        if self.config.eval.segments:
            self.eval_data()
        if self.config.eval.continuations:
            self.windows()
        stream = recipe.train_stream(
            self.config, self.backbone.tokenizer, self.builder, phase, self.readers
        )
        if start_state is not None:
            stream.set_state(start_state)
        return stream

    def held_out_questions(self) -> list[QAExample]:
        """``eval.questions`` examples of the validation split whose passage fits."""
        return self.question_sets()["squad"]

    def question_sets(self) -> dict[str, list[QAExample]]:
        """Held-out questions by what their results are called: ``squad``, those of ``data.qa``,
        and where ``eval.ood`` names other ones, ``qed`` or ``ood``.
        """
        if self._questions is None:
            e, found = self.config.eval, {}
            sources = {"squad": "data.qa"}
            if e.ood is not None:
                sources["qed" if e.ood == "qed" else "ood"] = "eval.ood"
            for name, field in sources.items():
                found[name], _ = recipe.questions(
                    self.config, self.builder, "validation", e.questions, field
                )
            self._questions = found
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

    def windows(self) -> tuple[np.ndarray, int]:
        """Held-out texts with the tokens that follow each, and how many tokens are the text."""
        e, d = self.config.eval, self.config.data
        found = recipe.text_segments(
            self.config, self.backbone.tokenizer, "validation", e.continuations, d.continuation
        )
        return found, found.shape[1] - d.continuation

    def quick_eval(self, variables, frozen) -> dict[str, float]:
        """Teacher-forced reconstruction of held-out segments, with own and with a neighbour's
        latents, by every reader that is trained; see `quick.quick_eval`.
        """
        n = self.config.eval.quick_segments
        if not n or not self.config.data.mix.get("reconstruct"):
            return {}
        return quick_eval(self, as_params(variables), frozen, self.eval_data()[:n])

    def wire(self, variables, frozen) -> LatentWire:
        """The compressor with these weights, as users hold it.

        Raises:
          ConfigError: the weights are not those of this configuration's parts.
        """
        context = jax.ShapeDtypeStruct((1, self.config.model.segment), jnp.int32)
        check_parts(variables["params"], self.init_shapes({"context": context})["params"])
        backbone = dataclasses.replace(self.backbone, params=apart(frozen["reader"]))
        separate = self.separate and self.separate.placed(frozen["reader"])
        params, tasks = with_every_task(as_params(variables)), trained_tasks(self.config)
        params = heads.folded(params)
        return LatentWire(
            backbone, self.config.model, params, self.builder, tasks, separate=separate
        )

    @staticmethod
    def stored(name: str) -> dict[str, Any] | None:
        """Settings with which a packaged or exported compressor was trained and is evaluated; None
        where there is none of that name.
        """
        return stored_run(name) if is_compressor(name) else None

    def stored_variables(self, name: str) -> dict[str, Any]:
        """Weights of a packaged or exported compressor.

        Raises:
          CheckpointError: trained with other LLMs than these.
        """
        found = load_compressor(name, self.backbone)
        if self.separate is not None:
            own = self.config.model.encoder.backbone, self.separate.backbone.sha256
            check_weights(*own, found.encoder)
        for label, r in self.readers.items():  # refuses another LLM than its adapter's
            prompt, own = self.config.prompt, found.readers.get(label, "")
            open_reader(label, self.config.model, self.backbone, prompt, r.backbone, own)
        return as_variables(jax.tree.map(jnp.asarray, found.params))

    def centre(self, latents: Compressed, batches: int = 24) -> np.ndarray | None:
        """Mean latent of the first training texts, which integer wires take off; None where the
        numbers of a latent are other heads' in every text.
        """
        if self.config.model.encoder.slots == "heads":
            return None
        stream = itertools.islice(self.train_data("main", None), batches)
        return mean_latent(latents, ((row["context"], row["context_mask"]) for row in stream))

    def train_controls(self, fit, out, mesh=None) -> None:
        """Trains the soft prompts of ``eval.tuned`` for every reader, each a small (resumable) run
        below ``out``.
        """
        arms = self.config.eval.tuned if self.config.eval.questions else ()
        self._tuned = train_controls(self.config, self.backbone, self.builder, arms, fit, out, mesh)
        if arms:
            self.tuned_by = train_reader_controls(self, fit, Path(out), mesh)

    def evaluate(self, variables, frozen, progress=None):
        """See `suite.final_evaluation`."""
        if faults.FRESH in self.config.eval.faults:
            variables = self._without_a_part(variables)
        found, artefacts = suite.final_evaluation(
            self, self.wire(variables, frozen), progress, self._tuned
        )
        return found | suite.trained_again(self, variables, frozen), artefacts

    def _without_a_part(self, variables):
        """The largest trained part as it was before training."""
        batch = next(self.train_data("main", None))
        names = ("params", *self.rng_names)
        fresh = jax.jit(self.init)(rng.named(self.config.seed, names), batch)["params"]
        params, _ = faults.with_fresh_part(variables["params"], fresh)
        return {**variables, "params": params}

    def judge(self, run: Path) -> dict[str, float]:
        """What a run's log says of annealing, if it was one; see `annealing.verdict`."""
        log = Path(run) / "metrics.jsonl"
        found = verdict(read_log(log)) if log.is_file() else None
        return {} if found is None else found.numbers()

    def ask(self, variables, frozen, text: str, question: str) -> dict[str, Any]:
        """Compresses a text, rebuilds it, and answers from the latents alone."""
        return suite.demonstrate(self.wire(variables, frozen), text, question)

    def generate(self, variables, frozen, prompt: str) -> dict[str, Any]:
        """Compresses a text and rebuilds it."""
        return suite.demonstrate(self.wire(variables, frozen), prompt, None)

    def diagnose(self, variables, frozen, run: str | None = None) -> dict[str, Any]:
        """Statistics of the latents of held-out texts, and what is known to be wrong with them."""
        told = suite.diagnosis(self, self.wire(variables, frozen), run)
        return suite.gradients(self, variables, frozen) | told

    @staticmethod
    def findings(results, samples, log) -> list[str]:
        """What is known to be wrong with a run, from what it left behind."""
        return suite.found_in(results, samples, log)

    def export(self, variables, frozen, to: str, run: str | None = None) -> dict[str, Any]:
        """Writes the compressor, large matrices as int8, with the record of how it was trained."""
        record = training_record(run) if run is not None else {}
        params, tasks = heads.folded(as_params(variables)), trained_tasks(self.config)
        config = self.config
        if (note := reader_lora.note(config.model, params)) is not None:
            record["reader"] = note
        out = save_compressor(
            to, params, config.model, self.backbone, tasks, record, config.prompt,
            {label: r.backbone.sha256 for label, r in self.readers.items()},
            "" if self.separate is None else self.separate.backbone.sha256,
        )  # fmt: skip
        # Of the weights as they are stored, which are what will be loaded.
        stored = jax.tree.map(jnp.asarray, load_compressor(out, self.backbone).params)
        centre = self.centre(self.wire(as_variables(stored), frozen).latents)
        if centre is not None:
            save_centre(out, centre, f"the first training texts of {config.name}")
        size = sum(f.stat().st_size for f in out.iterdir())
        return {"written": out, "megabytes": f"{size / 1e6:.1f}"}

    def show(self, results):
        """What a run ends with: its numbers, and one passage compressed, rebuilt and asked."""
        return {**results, **(results.artefacts.get("demonstration") or {})}
