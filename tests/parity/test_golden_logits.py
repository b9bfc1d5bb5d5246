"""SmolLM2 against transformers + torch on the same GGUF file (arrays: make_golden_logits.py)."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax import backbones

GOLDEN = Path(__file__).with_name("golden_smollm2.npz")
PROMPTS = ("fact", "story", "code", "chat", "mixed")
TOLERANCE = 2e-3


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as arrays:
        return {name: arrays[name] for name in arrays.files}


@pytest.fixture(scope="module")
def smollm2(smollm2_path):
    return backbones.load(smollm2_path)


@pytest.fixture(scope="module")
def logits(golden, smollm2):
    """All prompts in one right-padded batch: [prompt][token, vocabulary]."""
    rows = [golden[f"{p}/ids"] for p in PROMPTS]
    width = max(map(len, rows))
    ids = np.stack([np.pad(row, (0, width - len(row))) for row in rows])
    mask = np.arange(width) < np.array([len(r) for r in rows])[:, None]
    out = np.asarray(smollm2.logits(ids, mask))
    return {p: out[i, : len(rows[i])] for i, p in enumerate(PROMPTS)}


def test_same_file(golden, smollm2):
    assert smollm2.sha256 == str(golden["sha256"])
    assert smollm2.config.num_params() == smollm2.parameter_count() == 134_515_008


@pytest.mark.parametrize("prompt", PROMPTS)
def test_logits(prompt, golden, logits):
    ours = logits[prompt]
    differences = {
        "columns": ours[:, golden["columns"]] - golden[f"{prompt}/logits"],
        "top": np.take_along_axis(ours, golden[f"{prompt}/top_ids"], -1) - golden[f"{prompt}/top"],
        "logsumexp": np.logaddexp.reduce(ours.astype(np.float64), axis=-1)
        - golden[f"{prompt}/logsumexp"],
    }
    worst = {name: float(np.abs(d).max()) for name, d in differences.items()}
    print(prompt, worst)
    assert max(worst.values()) <= TOLERANCE, worst
    np.testing.assert_array_equal(ours.argmax(-1), golden[f"{prompt}/argmax"])


def test_left_padding_changes_nothing(golden, smollm2, logits):
    ids = golden["fact/ids"]
    padded = np.pad(ids, (5, 0))[None]
    mask = (np.arange(len(padded[0])) >= 5)[None]
    out = np.asarray(smollm2.logits(padded, mask))[0, 5:]
    np.testing.assert_allclose(out, logits["fact"], atol=TOLERANCE)


def test_embed(golden, smollm2):
    ids = golden["fact/ids"][None]
    rows = jnp.take(smollm2.params["embed"], ids, axis=0)
    np.testing.assert_array_equal(smollm2.embed(ids), rows)


def test_chat_answer(smollm2):
    question = "What is the capital of France? Answer in one word."
    text = smollm2.tokenizer.apply_chat([{"role": "user", "content": question}])
    (answer,) = smollm2.generate([text], max_new_tokens=12)
    assert "Paris" in answer
