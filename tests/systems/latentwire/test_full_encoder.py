"""An encoder whose layers are trained as a whole: where it starts, and what it leaves alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax.backbones.testing import random_params, tiny_config
from latent_jax.core import trees
from latent_jax.core.errors import ConfigError
from latent_jax.systems.latentwire import full_encoder
from latent_jax.systems.latentwire.adapter_config import AdapterConfig
from latent_jax.systems.latentwire.labels import LABELS
from latent_jax.systems.latentwire.model import Compressor
from latent_jax.systems.latentwire.model_config import EncoderConfig, ModelConfig

READER = tiny_config("llama")
STATES = {"slots": "states", "output": "hidden", "lora_on": "all"}
CASES = {"memory": {}, "text": {"view": "text"}, "all": {"view": "text", "lora_on": "all"},
         "states": STATES, "first": {"layers": 2, "output": "hidden"}}  # fmt: skip


def made(**encoder):
    adapter = AdapterConfig("soft" if encoder.get("output") == "hidden" else "kv")
    encoder = EncoderConfig(**encoder)
    model = ModelConfig(segment=8, encoder=encoder, adapter=adapter)
    # No sink: its keys and values are the LLM's, whatever is trained.
    return Compressor(model, READER, sink=None)


@pytest.fixture(scope="module")
def reader():
    return random_params(READER, jax.random.key(0))


@pytest.fixture(scope="module")
def texts():
    ids = np.random.default_rng(0).integers(0, READER.vocab_size, (2, 16)).astype(np.int32)
    return jnp.asarray(ids), jnp.arange(16) < jnp.array([[16], [11]])


@pytest.mark.parametrize("case", CASES)
def test_it_starts_as_the_frozen_llm_and_then_moves(reader, texts, case):
    full, frozen = made(train="full", **CASES[case]), made(lora_rank=0, **CASES[case])
    params = full.init(jax.random.key(1), reader, *texts)["params"]
    assert not any(x.any() for x in jax.tree.leaves(params[full_encoder.PART]))
    assert "lora" not in params
    rest = {k: v for k, v in params.items() if k != full_encoder.PART}

    def z(model, params, reader=reader):
        return model.apply({"params": params}, reader, *texts, method="compress").z

    wanted = z(frozen, rest)
    np.testing.assert_allclose(z(full, params), wanted, atol=1e-6)
    moved = jax.tree.map(lambda x: x + 0.02, params[full_encoder.PART])
    assert jnp.abs(z(full, {**params, full_encoder.PART: moved}) - wanted).max() > 1e-3
    # What is added to is the LLM's own: moving both by the same, one up and one down, is no move.
    if case == "all":
        layers = jax.tree.map(lambda x: x - 0.02, reader["layers"])
        found = z(full, {**params, full_encoder.PART: moved}, {**reader, "layers": layers})
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_the_llm_gets_no_gradient_through_the_sum(reader):
    own = full_encoder.blank(READER, hidden=True)
    assert set(own) == {"layers", "final_norm"} <= set(reader)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), reader)

    def total(frozen, own):
        found = full_encoder.added(frozen, own)
        return sum(jnp.sum(x) for name in own for x in jax.tree.leaves(found[name]))

    to_frozen, to_own = jax.grad(total, (0, 1))(half, own)
    assert not any(x.any() for x in jax.tree.leaves(to_frozen))
    assert all((x == 1).all() for x in jax.tree.leaves(to_own))
    # A difference far below bf16's step at 1 is not lost in the sum.
    small = jax.tree.map(lambda x: x + 1e-5, own)
    found = full_encoder.added(half, small)["final_norm"]
    for new, old in zip(jax.tree.leaves(found), jax.tree.leaves(half["final_norm"]), strict=True):
        np.testing.assert_allclose(new - old.astype(jnp.float32), 1e-5, rtol=0.02)


def test_its_parameters_are_a_group_of_their_own(reader, texts):
    params = made(train="full").init(jax.random.key(1), reader, *texts)["params"]
    labels = trees.match_tree(LABELS, params)
    assert set(jax.tree.leaves(labels[full_encoder.PART])) == {"encoder"}
    assert "encoder" not in jax.tree.leaves({**labels, full_encoder.PART: {}})


@pytest.mark.parametrize(
    "encoder",
    [{"slots": "pooled"}, {"slots": "heads"}, {"slots": "states", "output": "hidden"}],
)
def test_slots_that_run_through_no_trained_layer_are_refused(encoder):
    with pytest.raises(ConfigError, match=r"encoder.train=full: no trained pass"):
        EncoderConfig(train="full", **encoder).validate()
    EncoderConfig(**encoder).validate()
