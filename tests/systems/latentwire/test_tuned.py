"""Tuned controls: the loss is the evaluation's, and training goes through the shared trainer."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax.backbones.testing import byte_reader
from latent_jax.core.config import parse
from latent_jax.core.errors import ConfigError
from latent_jax.systems.latentwire import baselines, tuned
from latent_jax.systems.latentwire.config import LatentWireRun
from latent_jax.systems.latentwire.given import Asked
from latent_jax.systems.latentwire.prompts import PromptBuilder, pad_rows
from latent_jax.systems.latentwire.scoring import score_answers


@pytest.fixture(scope="module")
def reader():
    return byte_reader()


@pytest.fixture(scope="module")
def run():
    return parse(
        LatentWireRun,
        {
            "system": "latentwire",
            "model": {"segment": 32, "ratio": 4},
            "data": {"qa": "lookup", "length": 32, "max_context": 256, "max_prompt": 64,
                     "questions": 40, "mix": {"reconstruct": 0.5, "answer": 0.5}},
            "eval": {"tuned_tokens": 3},
            "train": {"steps": 6, "batch_size": 8},
        },
    )  # fmt: skip


def test_training_and_evaluation_see_the_same_sequence(reader, run):
    """Training has question and answer in one row, evaluation has them apart; the NLL agrees."""
    builder = PromptBuilder(reader.tokenizer, run.prompt)
    contexts = [builder.context_ids("k1: red; k2: blue"), builder.context_ids("k1: blue")]
    pairs = [builder.supervised("k2?", "blue"), builder.supervised("key k1?", "red")]
    context = pad_rows(contexts, 32)
    inputs = pad_rows([p + a for p, a in pairs], 40)
    supervised = np.zeros(inputs[0].shape, bool)
    for i, (p, a) in enumerate(pairs):
        supervised[i, len(p) : len(p) + len(a)] = True
    batch = {
        "context": context[0], "context_mask": context[1], "inputs": inputs[0],
        "inputs_mask": inputs[1], "supervised": supervised,
    }  # fmt: skip
    prompt = {"prompt": jax.random.normal(jax.random.key(3), (3, reader.config.hidden_size))}
    loss, _ = tuned.tuned_loss(
        prompt, reader.decoder, reader.params, jax.tree.map(jnp.asarray, batch),
        arm="token_budget_head", ratio=2.0,
    )  # fmt: skip
    asked = pad_rows([p for p, _ in pairs], 30, left=True)
    gold = pad_rows([a for _, a in pairs], 8)
    given = baselines.build(
        "token_budget_head",
        reader.decoder,
        reader.params,
        *context,
        *asked,
        np.arange(2),
        ratio=2.0,
    )
    lead = jnp.broadcast_to(prompt["prompt"], (2, *prompt["prompt"].shape))
    scores = score_answers(reader.decoder, reader.params, Asked(given, *asked, lead), *gold)
    assert float(loss.count) == float(scores["count"].sum())
    np.testing.assert_allclose(loss.sum, scores["nll"].sum(), rtol=1e-4)


def test_a_control_trains_through_the_trainer(reader, run, tmp_path):
    from latent_jax.train.loop import fit

    builder = PromptBuilder(reader.tokenizer, run.prompt)
    assert tuned.answer_steps(run) == 3
    prompts = tuned.train_controls(run, reader, builder, ["no_context"], fit, tmp_path)
    start = tuned.init_prompt(reader.params["embed"], reader.tokenizer, 3)["prompt"]
    assert prompts["no_context"].shape == (3, reader.config.hidden_size)
    assert float(jnp.abs(prompts["no_context"] - start).max()) > 1e-4
    assert (tmp_path / "no_context" / "metrics.jsonl").is_file()


def test_latent_arms_are_not_tunable(reader, run):
    with pytest.raises(ConfigError, match="cannot tune 'latent'"):
        tuned.SoftPromptSystem(run, reader, None, "latent")
    longer = dataclasses.replace(run, eval=dataclasses.replace(run.eval, tuned_steps=9))
    assert tuned.answer_steps(longer) == 9
    assert tuned.control_config(longer, "full_text").train.steps == 9
    batches = dataclasses.replace(run, eval=dataclasses.replace(run.eval, batch_size=2))
    same = tuned.control_config(run, "full_text")
    assert tuned.control_config(batches, "full_text") == same
    assert tuned.control_config(longer, "full_text") != same
