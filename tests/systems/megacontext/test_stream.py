"""Reading on through a growing history: what is counted, and what a still focus gives."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax import backbones
from latent_jax.core.errors import ConfigError, DataError
from latent_jax.run import resolve
from latent_jax.systems.megacontext import stream
from latent_jax.systems.megacontext import tiling as tl
from latent_jax.systems.megacontext.layout import Layout
from latent_jax.systems.megacontext.memory import Memory
from latent_jax.systems.megacontext.model_config import GistConfig, ModelConfig
from latent_jax.systems.megacontext.system import MegaContextSystem
from latent_jax.systems.megacontext.telemetry import PARTS

MODEL = ModelConfig(
    layout=Layout(block=8, branching=4, slots=(2, 4), protected=1), gist=GistConfig(window=4)
)


@pytest.fixture(scope="module")
def read(untrained, tmp_path_factory):
    reader = backbones.load("tiny")
    ids = np.random.default_rng(0).integers(10, reader.config.vocab_size, 30 * 8)
    path = tmp_path_factory.mktemp("stream") / "store"
    with Memory.open(path, reader, MODEL, untrained(reader, MODEL), "v", writable=True) as memory:
        memory._windows = 2  # full at once, as in a long text
        yield (*stream.read(memory, ids, ("recency", "bm25", "random"), 64, 12), memory, ids)


def test_every_block_is_predicted_and_every_budget_kept(read):
    found, histories, _, _ = read
    for name in ("recency", "bm25", "random"):
        history = histories[name]
        assert len(history.count) == 17  # the first context is taken as it starts
        rows = zip(history.level, history.index, history.count, strict=True)
        for at, (level, index, count) in enumerate(rows, 13):
            tiling = tl.Tiling(level, index, 0 * level, 0 * level, count)
            assert bool(tl.check(MODEL.layout, tiling, at, 64).ok)
        assert found[f"stream.{name}.token_budget_utilization"] <= 1
        assert 0 < found[f"stream.{name}.nll"] < 20
        spent = [found[f"stream.{name}.latency_ms.{part}"] for part in PARTS]
        assert all(milliseconds > 0 for milliseconds in spent)
        assert sum(found[f"stream.{name}.residency_histogram"]) > 0 or name != "random"
    # Blocks arrive oldest last: recency has nothing to change its mind about.
    assert found["stream.recency.flip_rate"] <= found["stream.random.flip_rate"]
    assert found["stream.random.moved"] > 0 and "stream.random.jump.p95" in found


def test_what_lies_on_the_device_does_not_grow_with_the_history(read):
    found = read[0]
    r = backbones.outline("tiny").config
    entry = 4 * 2 * r.num_layers * r.num_kv_heads * r.head_dim
    for name in ("recency", "bm25", "random"):
        assert found[f"stream.{name}.context_bytes"] == 64 * entry
    assert found["stream.device_bytes"] > 3 * 64 * entry
    # What telemetry keeps of a block; its keys and values would be 8 entries for each policy.
    assert found["stream.device_bytes.per_block"] < 8 * entry / 2


def test_bytes_of_a_new_array_are_counted():
    before = stream.device_bytes()
    array = jnp.ones((1000, 100), jnp.float32).block_until_ready()
    assert stream.device_bytes() - before >= array.nbytes == 400_000


def test_the_losses_are_those_of_the_contexts(read):
    """Every block, read again behind the contexts that were kept, now that the text is longer."""
    found, histories, memory, ids = read
    history, losses = histories["bm25"], []
    contexts = [tl.nodes(tl.start(MODEL.layout, 12, 64))]
    contexts += [
        [(int(n), int(i)) for n, i in zip(level[:count], index, strict=False)]
        for level, index, count in zip(history.level, history.index, history.count, strict=True)
    ]
    for cursor, nodes in enumerate(contexts, 12):
        start = (cursor - 1) * 8
        nodes = [(n, i) for n, i in nodes if n or i < cursor - 1]
        live = ids[start : start + 16]
        losses.append(memory.losses([memory.gather(nodes, start)], live, start, 8, 64)[0])
    assert found["stream.bm25.nll"] == pytest.approx(np.mean(losses), abs=1e-5)


def test_a_stream_needs_a_context_that_holds_it():
    with pytest.raises(ConfigError, match=r"eval\.stream: give eval\.budgets"):
        resolve("megacontext/tiny", {"eval.stream": 16})
    with pytest.raises(ConfigError, match=r"eval\.stream=4000"):
        resolve("megacontext/tiny", {"eval.stream": 4000, "eval.budgets": [64], "eval.long": 8})


def test_a_text_that_is_too_short_is_said_before_training(tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("The mill burned down. " * 300)
    config = resolve("megacontext/tiny", {
        "eval.stream": 400, "eval.budgets": [512], "eval.text": str(text), "eval.rows": 2,
        "eval.upper_rows": 0, "eval.quick_rows": 2, "eval.long": 8,
    })  # fmt: skip
    with pytest.raises(DataError, match="3200 tokens are needed"):
        MegaContextSystem(config).train_data("main", None)
