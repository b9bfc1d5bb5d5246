"""Low-rank deltas: nothing at the start, and afterwards the same as changed weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax.backbones.decoder import Decoder
from latent_jax.backbones.testing import random_params, tiny_config
from latent_jax.nn.lora import LoRA

CONFIG = tiny_config("llama")


@pytest.fixture(scope="module")
def run():
    decoder = Decoder(CONFIG)
    x = jax.random.normal(jax.random.key(2), (2, 5, CONFIG.hidden_size))
    return jax.jit(lambda params, lora: decoder.apply({"params": params}, x, lora=lora).hidden)


@pytest.fixture(scope="module")
def lora():
    module = LoRA(CONFIG.projection_shapes, CONFIG.num_layers, rank=3, alpha=6.0)
    return module, module.init(jax.random.key(1))["params"]


def test_fresh_deltas_change_nothing(run, lora):
    module, params = lora
    base = random_params(CONFIG, jax.random.key(0))
    fresh = module.apply({"params": params})
    np.testing.assert_array_equal(run(base, fresh), run(base, jax.tree.map(jnp.zeros_like, fresh)))


def test_deltas_equal_changed_weights(run, lora):
    module, params = lora
    base = random_params(CONFIG, jax.random.key(0))
    moved = jax.tree.map(lambda p: p + 0.02, params)
    layers = dict(base["layers"])
    for name in CONFIG.projection_shapes:
        delta = 2.0 * moved[f"{name}_a"] @ moved[f"{name}_b"]  # alpha / rank
        layers[name] = {**layers[name], "kernel": layers[name]["kernel"] + delta}
    tree = module.apply({"params": moved})
    none = jax.tree.map(jnp.zeros_like, tree)
    np.testing.assert_allclose(
        run(base, tree), run({**base, "layers": layers}, none), rtol=2e-4, atol=2e-4
    )
