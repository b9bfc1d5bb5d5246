"""The stack with and without a memory, and the names of the expander's parameters."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax.core import trees
from latent_jax.core.config import parse
from latent_jax.nn.cross_attention import CrossAttention
from latent_jax.nn.transformer import Block
from latent_jax.ops.rope import inverse_frequencies
from latent_jax.systems.abstractinator.config import LevelConfig
from latent_jax.systems.abstractinator.expander import Expander
from latent_jax.systems.abstractinator.layers import ROPE_THETA, Stack

LAYERS, WIDTH, HEADS, FF = 2, 8, 2, 12


@pytest.mark.parametrize("reads", [False, True])
def test_a_stack_is_its_parts_one_after_another(reads):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 5, WIDTH)), jnp.float32)
    mask = jnp.tril(jnp.ones((5, 5), bool))[None]
    memory = jnp.asarray(rng.normal(size=(2, 3, WIDTH)), jnp.float32) if reads else None
    seen = jnp.asarray([[True, True, False], [True, False, False]]) if reads else None

    @jax.jit
    def both(x, memory):
        stack = Stack(LAYERS, WIDTH, HEADS, FF)
        params = stack.init(jax.random.key(0), x, mask, memory, seen)["params"]
        at = jnp.broadcast_to(jnp.arange(5), (2, 5))
        waves = jnp.asarray(inverse_frequencies(WIDTH // HEADS, ROPE_THETA))
        y = x
        for i in range(LAYERS):
            if reads:
                cross = CrossAttention(WIDTH, HEADS)
                y = cross.apply({"params": params[f"cross{i}"]}, y, memory, seen)
            block = Block(WIDTH, HEADS, FF)
            y = block.apply({"params": params[f"block{i}"]}, y, at, mask, waves)
        y = nn.LayerNorm().apply({"params": params["final_norm"]}, y)
        return params, stack.apply({"params": params}, x, mask, memory, seen), y

    params, found, expected = both(x, memory)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    names = {f"{part}{i}" for part in (("block", "cross") if reads else ("block",)) for i in (0, 1)}
    assert set(params) == names | {"final_norm"}


def test_the_expanders_parameters_keep_their_names():
    tree = {"width": WIDTH, "heads": HEADS, "ff": FF, "row_width": 6, "expander_layers": 2}
    expander = Expander(parse(LevelConfig, tree, "test"), 4)
    shapes = jax.eval_shape(
        expander.init, jax.random.key(0),
        jnp.zeros((1, 3, 6)), jnp.ones((1, 3), bool), jnp.zeros((1, 3, 4), jnp.int32),
    )["params"]  # fmt: skip
    names = {path.rpartition("/")[0] for path in trees.flatten(shapes)}
    blocks = {"attention_norm", "mlp_norm", "qkv", "out", "up", "down"}
    cross = {"query_norm", "q", "kv", "out"}
    assert names == {
        "bytes", "unfold", "read", "back", "final_norm", "head",
        *(f"block{i}/{name}" for i in (0, 1) for name in blocks),
        *(f"cross{i}/{name}" for i in (0, 1) for name in cross),
    }  # fmt: skip
