"""`load` by name and path, and the model it returns."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax import backbones
from latent_jax.backbones import ByteTokenizer, registry, save_hf
from latent_jax.backbones.testing import random_params, tiny_config
from latent_jax.core import fetch
from latent_jax.core.errors import BackboneError


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    config = tiny_config("llama", vocab_size=259, max_position=32)
    params = random_params(config, jax.random.key(0))
    return save_hf(tmp_path_factory.mktemp("model"), config, params, ByteTokenizer())


@pytest.fixture(scope="module")
def bb(model_dir):
    return backbones.load(model_dir)


def test_names(smollm2_path, monkeypatch):
    assert registry.locate("smollm2") == smollm2_path
    monkeypatch.setattr(fetch, "cached", lambda name: None)
    monkeypatch.setattr(fetch, "fetch", lambda name: smollm2_path)
    assert registry.locate("smollm2") == smollm2_path


def test_packaged_name(model_dir, monkeypatch):
    monkeypatch.setitem(registry.PACKAGED, "tiny", model_dir)
    bb = backbones.load("tiny")
    assert bb.name == "tiny" and bb.config.hidden_size == 48


def test_model(bb):
    assert len(repr(bb)) < 1000
    assert bb.parameter_count() == bb.config.num_params()
    ids = np.array([[1, 2, 3, 4]])
    assert bb.embed(ids).shape == (1, 4, 48)
    logits = bb.logits(ids)
    assert logits.shape == (1, 4, 259) and logits.dtype == jnp.float32


def test_padding_on_either_side(bb):
    ids = np.arange(1, 6)
    right, left = np.zeros((2, 9), np.int32), np.zeros((2, 9), np.int32)
    right[0, :5], left[0, 4:] = ids, ids
    plain = bb.logits(ids[None])[0]
    padded_right = bb.logits(right[:1], np.arange(9)[None] < 5)[0, :5]
    padded_left = bb.logits(left[:1], np.arange(9)[None] >= 4)[0, 4:]
    np.testing.assert_allclose(padded_right, plain, atol=1e-4)
    np.testing.assert_allclose(padded_left, plain, atol=1e-4)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1, 259]], "token id 259 is outside the vocabulary of 259"),
        ([[-1, 2]], "token id -1 is outside"),
        ([1, 2], r"shape \(2,\)"),
        ([[1] * 33], "33 tokens exceed the context window of 32"),
    ],
)
def test_bad_ids(bb, ids, message):
    with pytest.raises(BackboneError, match=message):
        bb.logits(ids)


def test_bf16_is_close(model_dir, bb):
    half = backbones.load(model_dir, dtype=jnp.bfloat16)
    ids = np.arange(20)[None]
    assert half.dtype == jnp.bfloat16 and half.embed(ids).dtype == jnp.bfloat16
    exact = np.asarray(bb.logits(ids))
    error = np.abs(np.asarray(half.logits(ids)) - exact).mean()
    assert error < 0.05 * exact.std()
