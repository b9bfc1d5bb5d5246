"""Tuned controls: what a soft prompt of the same training makes of text, without any latent.

A frozen reader that was never trained on the task is a weak yardstick: a compressor trained on
answers also learns how to answer. So the text arms get ``n`` learned soft tokens between the text
and the question (Lester et al. 2021), trained by the same loss through the same frozen reader, on
the same questions, for as many steps as the compressor's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from latent_jax.backbones.backbone import Backbone
from latent_jax.backbones.cross_entropy import token_cross_entropy
from latent_jax.backbones.sharding import DECODER_RULES
from latent_jax.backbones.sink import sink_token
from latent_jax.core.errors import ConfigError
from latent_jax.core.types import Mean
from latent_jax.systems.latentwire import baselines, recipe
from latent_jax.systems.latentwire.config import MAIN, EvalConfig, LatentWireRun
from latent_jax.systems.latentwire.given import Asked, answer_hidden
from latent_jax.systems.latentwire.prompts import PromptBuilder
from latent_jax.train.config import CheckpointConfig, OptimizerConfig, TrainConfig

#: Arms a soft prompt can be trained for.
TUNABLE = (*baselines.TEXT_ARMS, *baselines.FROZEN_ARMS)
#: Soft tokens start as the embeddings of these words, as often as needed.
INSTRUCTION = "\nAnswer the question briefly with words from the text above."


def init_prompt(
    table: Float[Array, "v d"], tokenizer: Any, tokens: int
) -> dict[str, Float[Array, "n d"]]:
    """Soft tokens that start as the embeddings of `INSTRUCTION`, repeated to ``tokens``."""
    chosen = np.resize(np.asarray(tokenizer.encode(INSTRUCTION), np.int32), tokens)
    return {"prompt": jnp.asarray(table)[chosen].astype(jnp.float32)}


def tuned_loss(
    params: Mapping[str, Any],
    decoder: Any,
    reader: Any,
    batch: Mapping[str, Any],
    *,
    arm: str,
    ratio: float,
    seed: int = 0,
    chunk: int | None = None,
    sink: int | None = None,
) -> tuple[Mean, Mean]:
    """Answer cross-entropy (nats per answer token, stop token included) and teacher-forced
    accuracy.

    Args:
      params: ``{'prompt': [n, d]}``.
      decoder: the frozen reader's module.
      reader: its parameters.
      batch: records of the task ``answer`` (`recipe`).
      arm: what stands for the text, of `TUNABLE`.
      ratio: context tokens per slot of the budgeted arms.
      seed: of the arm ``random_tokens``.
      chunk: rows of logits at once.
      sink: token before the text.
    """
    inputs, b = batch["inputs"], batch["inputs"].shape[0]
    none = jnp.zeros((b, 0), jnp.int32), jnp.zeros((b, 0), bool)
    # The question is at hand, left-padded as the arms expect it, only for those that select by it.
    question = batch["inputs_mask"] & ~batch["supervised"]
    given = baselines.build(
        arm, decoder, reader, batch["context"], batch["context_mask"], inputs, question,
        jnp.arange(b), ratio=ratio, key=jax.random.key(seed),
        sink=None if sink is None else jnp.int32(sink),
    )  # fmt: skip
    lead = jnp.broadcast_to(params["prompt"], (b, *params["prompt"].shape))
    asked = Asked(jax.lax.stop_gradient(given), *none, lead)
    hidden = answer_hidden(decoder, reader, asked, inputs, batch["inputs_mask"])
    nll, guess = token_cross_entropy(decoder, reader, hidden, inputs, chunk)
    hit = guess == inputs
    mask = batch["supervised"].astype(jnp.float32)
    return Mean(jnp.sum(nll * mask), mask.sum()), Mean(jnp.sum(hit * mask), mask.sum())


class SoftPromptSystem:
    """One tuned control; implements `latent_jax.train.protocol.System`.

    Args:
      config: the compressor's run, whose data, prompts and ratio the control shares.
      backbone: the frozen reader.
      builder: the prompt builder of training and evaluation.
      arm: what stands for the text.
    """

    rng_names = ()
    jit_init = False
    logical_rules = DECODER_RULES

    def __init__(self, config: LatentWireRun, backbone: Backbone, builder: PromptBuilder, arm: str):
        if arm not in TUNABLE:
            raise ConfigError(f"eval.tuned: cannot tune {arm!r}; allowed: {', '.join(TUNABLE)}")
        self.config, self.backbone, self.builder, self.arm = config, backbone, builder, arm
        self.frozen = {"reader": backbone.params}
        self.weights = {"answer": 1.0}

    def init(self, rngs: Any, batch: Any) -> dict[str, Any]:
        """Soft tokens at their start."""
        reader, tokens = self.backbone, self.config.eval.tuned_tokens
        return {"params": init_prompt(reader.params["embed"], reader.tokenizer, tokens)}

    def param_labels(self, params: Any) -> Any:
        """All of it is trained."""
        return jax.tree.map(lambda _: "prompt", params)

    def unit_counts(self, batch: Mapping[str, Any]) -> dict[str, int]:
        """Text tokens in a batch."""
        return {"tokens": int(np.sum(batch["context_mask"]))}

    def loss_terms(self, variables, frozen, batch, rngs, train):
        """See `tuned_loss`."""
        loss, accuracy = tuned_loss(
            variables["params"], self.backbone.decoder, frozen["reader"], batch,
            arm=self.arm, ratio=self.config.model.ratio, seed=self.config.seed,
            chunk=self.config.losses.chunk,
            sink=sink_token(self.backbone.tokenizer) if self.config.model.sink else None,
        )  # fmt: skip
        return {"answer": loss}, {}, {"answer_accuracy": accuracy}

    def train_data(self, phase: str, start_state: Any) -> Any:
        """The compressor's own questions, in the same order."""
        data = dataclasses.replace(self.config.data, mix={"answer": 1.0}, read_by=(MAIN,))
        config = dataclasses.replace(self.config, data=data)
        stream = recipe.train_stream(config, self.backbone.tokenizer, self.builder)
        if start_state is not None:
            stream.set_state(start_state)
        return stream

    def eval_data(self) -> None:
        """None: the compressor's evaluation measures the tuned arm."""

    def evaluate(self, variables, frozen, progress=None):
        """Nothing of its own."""
        return {}, {}


def answer_steps(config: LatentWireRun) -> int:
    """``eval.tuned_steps``, else as many steps as the compressor had answer batches."""
    if config.eval.tuned_steps is not None:
        return config.eval.tuned_steps
    mix = config.data.mix
    return max(1, round(config.train.steps * mix.get("answer", 0.0) / sum(mix.values())))


def control_config(config: LatentWireRun, arm: str, lr: float = 5e-3) -> LatentWireRun:
    """The run's config with a soft prompt's training: its own optimizer, no phases or guards.

    How the run is evaluated is not part of it, so that an evaluation of other questions, or in
    other batches, finds the controls of the one before.
    """
    steps = answer_steps(config)
    train = TrainConfig(
        steps=steps,
        batch_size=config.train.batch_size,
        accumulate=config.train.accumulate,
        optimizer=OptimizerConfig(lr=lr, warmup_steps=min(20, steps // 5)),
        checkpoint=CheckpointConfig(every=config.train.checkpoint.every, keep_best=0),
        log=dataclasses.replace(config.train.log, tensorboard=False, wandb=None, mlflow=None),
        log_every=config.train.log_every,
    )
    kept = EvalConfig(tuned_tokens=config.eval.tuned_tokens)
    return dataclasses.replace(
        config, name=f"{config.name}-{arm}-tuned", train=train, eval=kept
    )


def train_controls(
    config: LatentWireRun,
    backbone: Backbone,
    builder: PromptBuilder,
    arms: Sequence[str],
    fit: Callable[..., Any],
    out: str | Path,
    mesh: Any = None,
    progress: Any = None,
) -> dict[str, Float[Array, "n d"]]:
    """Trains a soft prompt for each text arm.

    Args:
      config: the compressor's run.
      backbone: the frozen reader.
      builder: the prompt builder.
      arms: of `TUNABLE`.
      fit: the trainer, ``fit(system, config, out, mesh, progress) -> state with .params`` (systems
        do not import it).
      out: each control trains, and resumes, in ``out/<arm>``.
      mesh: device mesh.
      progress: handed to ``fit``.

    Returns:
      ``{arm: soft prompt}``, what `evaluate_qa` takes as ``tuned``.
    """
    systems = {arm: SoftPromptSystem(config, backbone, builder, arm) for arm in arms}
    prompts = {}
    for arm, system in systems.items():
        state = fit(system, control_config(config, arm), Path(out) / arm, mesh, progress)
        prompts[arm] = jnp.asarray(state.params["prompt"])
    return prompts
