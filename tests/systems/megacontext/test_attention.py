"""The base's own attention to nodes: parity with a plain reading, and a focus that follows it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax import backbones
from latent_jax.backbones.attention_probe import queries
from latent_jax.backbones.decoder import Decoder
from latent_jax.backbones.sink import sink_kv
from latent_jax.backbones.testing import random_params, tiny_config
from latent_jax.core.errors import ConfigError
from latent_jax.systems.megacontext.attention import node_attention
from latent_jax.systems.megacontext.focus import Focus, RuntimeConfig
from latent_jax.systems.megacontext.gist import Gists
from latent_jax.systems.megacontext.layout import Layout
from latent_jax.systems.megacontext.memory import Memory
from latent_jax.systems.megacontext.model_config import GistConfig, ModelConfig
from latent_jax.systems.megacontext.reading import encode, place
from latent_jax.systems.megacontext.runtime import Runtime
from latent_jax.systems.megacontext.tiling import start

BASE = tiny_config("llama")
DECODER = Decoder(BASE)
SINK = 1


def test_attention_to_raw_blocks_is_that_of_a_plain_reading():
    """Blocks of one window are what one sequence holds; its queries and keys are taken there."""
    base = random_params(BASE, jax.random.key(0))
    ids = jax.random.randint(jax.random.key(2), (1, 40), 2, BASE.vocab_size)
    raw, _ = encode(DECODER, base, SINK, ids[:, :32], 8, 4)
    at = jnp.arange(32)[None]
    placed = place(DECODER, Gists(raw.k, raw.v), at, jnp.ones((1, 32), bool))
    owner = jnp.repeat(jnp.arange(4), 8)
    found = node_attention(DECODER, base, SINK, placed, owner, 6, ids[0, 32:], 32, 3)

    sink = sink_kv(DECODER, base, jnp.int32(SINK), 1)
    x = DECODER.apply({"params": base}, ids, method="embed")
    rows = jnp.arange(37, 40)[None]
    q, kv = queries(DECODER, base, x, jnp.arange(40)[None], jnp.ones((1, 40), bool), rows, sink)
    keys = jnp.repeat(jnp.concatenate([sink.k, kv.k], 2), BASE.num_heads // BASE.num_kv_heads, 3)
    logits = jnp.einsum("lwhd,lshd->lhws", q[:, 0], keys[:, 0]) * BASE.head_dim**-0.5
    seen = jnp.arange(-1, 40)[None] <= rows[0][:, None]
    weight = jax.nn.softmax(jnp.where(seen, logits, -1e30), -1)[..., 1:33].mean(2)
    of_block = weight.reshape(*weight.shape[:2], 4, 8).sum(-1)
    np.testing.assert_allclose(
        found, [*jnp.sqrt(jnp.square(of_block).mean((0, 1))), 0, 0], atol=1e-5
    )


MODEL = ModelConfig(layout=Layout(block=8, branching=4, slots=(2,), protected=1),
                    gist=GistConfig(window=4))  # fmt: skip


@pytest.fixture(scope="module")
def memory(untrained, tmp_path_factory):
    reader = backbones.load("tiny")
    ids = np.random.default_rng(0).integers(10, reader.config.vocab_size, 20 * 8)
    path = tmp_path_factory.mktemp("attention") / "store"
    with Memory.open(path, reader, MODEL, untrained(reader, MODEL), "v", writable=True) as memory:
        memory.tree.append(ids)
        memory.build()
        yield memory


def test_a_runtime_focuses_by_it_with_the_tail_or_with_a_question(memory):
    runtime = Runtime(memory, RuntimeConfig(70, "attention", iterations=6))
    tail, question = memory.tree.tokens(152, 160), np.arange(20, 33, dtype=np.int32)
    nodes = runtime.nodes(runtime.settle(tail))[0]
    assert {level for level, _ in nodes} == {0, 1}
    first = start(MODEL.layout, 20, 70, coarse=True)
    mass, asked = (
        runtime._seen(first, query, 20)["attention"] for query in (tail, question)
    )
    count = int(first.count) - 1
    assert (mass[:count] > 0).all() and not mass[count:].any()
    assert np.abs(mass - asked).max() > 1e-3 * mass.max()
    assert (0, int(mass.argmax())) in nodes


def test_it_needs_a_language_model(memory):
    with pytest.raises(ConfigError, match="asks a language model"):
        Focus(memory.tree, MODEL.layout, RuntimeConfig(70, "attention"))
