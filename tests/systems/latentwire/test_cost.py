"""Every part of a compressor is in what compressing costs; the first token is timed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax.backbones.testing import byte_reader
from latent_jax.core.config import parse
from latent_jax.core.errors import ConfigError
from latent_jax.systems.latentwire import baselines, latency
from latent_jax.systems.latentwire.api import LatentWire
from latent_jax.systems.latentwire.compressed import Latents
from latent_jax.systems.latentwire.config import LatentWireRun, ModelConfig
from latent_jax.systems.latentwire.cost import compressor_flops, prefill_flops
from latent_jax.systems.latentwire.given import Asked
from latent_jax.systems.latentwire.model import Compressor
from latent_jax.systems.latentwire.prompts import pad_rows
from latent_jax.systems.latentwire.scoring import decode

READER = byte_reader()
HIDDEN = {"slots": "pooled", "output": "hidden"}
NARROW = {"segment": 16, "wire": {"d_z": 8}}


def flops(tokens=16, **shape):
    """Of compressing a text and of reading its wire."""
    module = Compressor(parse(ModelConfig, {"segment": 16, **shape}), READER.config, sink=1)
    ids = jnp.zeros((1, 16), jnp.int32)
    make = lambda: module.init(jax.random.key(0), READER.params, ids, ids == 0)  # noqa: E731
    return compressor_flops(Latents(module, jax.eval_shape(make)["params"], READER.params), tokens)


def test_a_prefill_by_hand():
    c, n = READER.config, 12
    attention = 4 * c.num_layers * c.num_heads * c.head_dim * n * n
    by_hand = 2 * n * c.num_params(embedding=False) + attention  # norms are among the parameters
    assert 0.98 * by_hand < prefill_flops(c, n) <= by_hand


def test_every_part_counts():
    width, latents = READER.config.kv_floats_per_token, 4
    plain, read = flops()
    assert plain >= prefill_flops(READER.config, 16) and read == 0
    assert flops(tokens=32)[0] == pytest.approx(2 * plain, rel=0.1)
    narrow = flops(wire={"d_z": 8})
    assert narrow[0] - plain == 2 * latents * width * 8
    assert narrow[1] == 2 * latents * 8 * width  # what widens them again, at every reading
    assert flops(wire={"d_z": 8}, encoder={"refiner": 1})[0] > narrow[0]


SOFT = {"adapter": {"kind": "soft"}, "wire": {"d_z": 8}}


def test_poolers_adapters_and_other_encoders_count():
    states = {"slots": "states", "output": "hidden"}
    mean = flops(encoder=states, **SOFT)
    assert flops(encoder=states | {"pooler": "queries"}, **SOFT)[0] > mean[0]
    assert flops(encoder={"slots": "anchor", "output": "hidden"}, **SOFT)[0] > mean[0]
    spelt = {"slots": "bytes", "output": "hidden"}
    few, more = (flops(encoder=spelt | {"byte_layers": n}, **SOFT)[0] for n in (1, 2))
    assert 0 < few < more
    deep = SOFT | {"adapter": {"kind": "soft", "residual": "mlp", "hidden": 32}}
    assert flops(encoder=states, **deep)[1] > mean[1]


def test_the_first_token_is_timed_and_is_the_same_as_in_the_evaluation(monkeypatch):
    wire = LatentWire.training_free(READER, "kv_stride", ratio=4, segment=16)
    said = {}
    for name in ("first_from_wire", "first_from_text"):
        run = getattr(latency, name)
        monkeypatch.setattr(
            latency, name, lambda *a, run=run, name=name: said.setdefault(name, run(*a))
        )
    found = latency.first_token(wire, ["k?", "who?"], 16, pairs=2)
    for arm in ("latent", "full_text"):
        assert found[f"cost.seconds_to_first_token.{arm}"] > 0
        assert found[f"cost.prefill_flops.{arm}"] == 2 * latency.sizes(wire, 16)[
            f"cost.prefill_flops.{arm}"
        ]
    assert found["cost.speedup_min"] <= found["cost.speedup"] <= found["cost.speedup_max"]
    assert found["cost.kv_bytes.full_text"] == 4 * found["cost.kv_bytes.latent"] > 0
    assert found["cost.encode_flops"] >= found["cost.prefill_flops.full_text"]
    # The same tokens, questions and learned prompt as the arms of an evaluation have.
    ids = np.random.default_rng(0).integers(0, READER.config.vocab_size, (2, 16)).astype(np.int32)
    real = np.ones(ids.shape, bool)
    prompt = pad_rows([wire.builder.prompt_ids(q) for q in ("k?", "who?")], 24, left=True)
    rows, sink = np.arange(2, dtype=np.int32), jnp.int32(wire.sink)
    for arm, name in (("kv_stride", "first_from_wire"), ("embedding_replay", "first_from_text")):
        given = baselines.build(
            arm, READER.decoder, READER.params, ids, real, *prompt, rows, ratio=4,
            sink=sink if arm == "kv_stride" else None,
        )  # fmt: skip
        tokens, _ = decode(READER, Asked(given, *prompt), 1, ())
        np.testing.assert_array_equal(said[name], tokens[:, 0])


def test_texts_of_no_whole_segments_are_refused():
    with pytest.raises(ConfigError, match="eval.cost_tokens=24 is not a multiple"):
        parse(LatentWireRun, {
            "system": "latentwire", "model": {"segment": 16}, "data": {"length": 16},
            "eval": {"cost_rows": 1, "cost_tokens": 24},
        })  # fmt: skip
