"""Compressors without training are the evaluation's arms; crammed latents are the upper bound."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax import backbones
from latent_jax.backbones.testing import byte_reader as reader
from latent_jax.core.errors import ConfigError
from latent_jax.systems.latentwire import baselines, evaluate
from latent_jax.systems.latentwire.api import LatentWire
from latent_jax.systems.latentwire.compressed import Latents
from latent_jax.systems.latentwire.config import EncoderConfig, ModelConfig
from latent_jax.systems.latentwire.cost import cost, prefill_flops
from latent_jax.systems.latentwire.model import Compressor, num_latents
from latent_jax.systems.latentwire.telling import given_of
from latent_jax.systems.latentwire.training_free import METHODS

TEXTS = ["abcdefghijklmnopqr", "xyz12345"]


@pytest.mark.parametrize("method", [m for m in METHODS if m in baselines.ARMS])
def test_the_wire_holds_what_the_arm_keeps(method):
    wire = LatentWire.training_free(reader(), method, ratio=3)
    z = wire.compress(TEXTS)
    assert z.latents == [6, 3]
    back = wire.unpack(z.pack("fp32"))
    given = given_of(reader().decoder, reader().params, wire.latents, back.wire)
    ids, mask = wire._padded(TEXTS)
    none = np.zeros((2, 0), np.int32), np.zeros((2, 0), bool)
    rows = np.arange(2, dtype=np.int32)
    arm = baselines.build(
        method, reader().decoder, reader().params, jnp.asarray(ids), jnp.asarray(mask), *none, rows,
        ratio=3, sink=jnp.int32(wire.sink),
    )  # fmt: skip
    np.testing.assert_array_equal(given.start, arm.start)
    for ours, theirs in ((given.kv.k, arm.kv.k), (given.kv.v, arm.kv.v)):
        for row in range(2):
            a = np.asarray(ours)[:, row, np.asarray(given.kv.mask)[row]]
            b = np.asarray(theirs)[:, row, np.asarray(arm.kv.mask)[row]]
            np.testing.assert_allclose(a, b, atol=2e-4)


def test_any_ratio_and_long_texts():
    wire = LatentWire.training_free(reader(), "kv_stride", segment=16)
    z = wire.compress(TEXTS[1], ratio=5.5)
    assert z.latents == [num_latents(8, 5.5)]
    z = wire.compress("x" * 40)
    assert z.latents == [10] and z.z.shape[1] == 12
    spent = cost(wire, z, ["x" * 40], "int8")
    assert spent.text_bytes == 40 and spent.text_kv_bytes == 4 * spent.latent_kv_bytes
    # Compressing is reading every segment, behind the sink.
    segments = sum(prefill_flops(reader().config, n) for n in (16, 16, 8))
    assert spent.latent_flops == 0 and segments <= spent.encode_flops < 1.2 * segments
    assert spent.wire_bytes == len(z.pack("int8"))
    assert "saved: key/value memory (4.0x)" in spent.verdict()


def test_methods_do_not_read_each_others_wires():
    hashes = {
        LatentWire.training_free(reader(), method, ratio).origin.encoder_sha256
        for method in METHODS for ratio in (2, 4)
    }  # fmt: skip
    assert len(hashes) == 2 * len(METHODS)


@pytest.mark.parametrize("options,line", [
    ({"method": "kv_question"}, "looks at the question before"),
    ({"method": "best"}, "no training-free method 'best'; known: kv_stride"),
    ({"ratio": 0.5}, "ratio 0.5: use 1 to 512"),
])  # fmt: skip
def test_what_cannot_be_is_refused(options, line):
    with pytest.raises(ConfigError, match=line):
        LatentWire.training_free(reader(), **options)


@pytest.mark.slow
def test_it_answers_and_rebuilds():
    wire = LatentWire.training_free(reader(), "mean_pool", segment=16)
    z = wire.compress(TEXTS)
    assert all(isinstance(said, str) for said in wire.answer(z, "what?", 2))
    assert [len(ids) for ids in wire.rebuild_ids(z)] == [18, 8]


@pytest.mark.slow
def test_crammed_latents_hold_the_text_that_an_untrained_encoder_loses():
    tiny = backbones.load("tiny")
    model = Compressor(
        ModelConfig(ratio=4, segment=16, encoder=EncoderConfig(lora_rank=2)), tiny.config, 0
    )
    ids = np.ones((4, 16), np.int32)
    params = jax.jit(model.init)(jax.random.key(0), tiny.params, ids, ids > 0)["params"]
    latents = Latents(model, params, tiny.params)
    text = tiny.tokenizer.encode("The mill at Dunmore burned down in 1911, and nobody saw it go.")
    segments = np.resize(np.asarray(text, np.int32), (4, 16))
    out, _ = evaluate.evaluate_ae(
        tiny, latents, segments, arms=("latent", "cramming"), segment=16, batch_size=4,
        cramming_steps=150,
    )  # fmt: skip
    assert out["ae.token_accuracy"] < 0.5 < 0.95 < out["ae.token_accuracy.cramming"]
    assert out["ae.nll.cramming"] < 0.1 < out["ae.nll"]
