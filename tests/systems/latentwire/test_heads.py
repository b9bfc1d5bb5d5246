"""Latents of the text's own entries: all of them are the text, fewer are shared out unevenly."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax.backbones.backbone import Backbone
from latent_jax.backbones.decoder import Decoder
from latent_jax.backbones.testing import random_params, tiny_config
from latent_jax.backbones.tokenizer import ByteTokenizer
from latent_jax.core.errors import ConfigError
from latent_jax.systems.latentwire import baselines
from latent_jax.systems.latentwire.api import LatentWire, _given
from latent_jax.systems.latentwire.beside_text import beside_text
from latent_jax.systems.latentwire.config import (
    AdapterConfig,
    EncoderConfig,
    ModelConfig,
    ReaderConfig,
    WireConfig,
)
from latent_jax.systems.latentwire.cost import cost
from latent_jax.systems.latentwire.model import num_latents

TEXTS = ["abcdefghijklmnopqr", "xyz12345"]


@functools.cache
def reader():
    config = tiny_config(num_layers=2, vocab_size=262)
    params = random_params(config, jax.random.key(0))
    return Backbone("tiny", config, params, ByteTokenizer(), "0" * 64, Decoder(config))


@functools.cache
def wire():
    return LatentWire.training_free(reader(), "kv_heads", ratio=3, segment=16)


def hidden(given, ids=(5, 6, 7)):
    body, frozen, b = reader().decoder, reader().params, given.start.shape[0]
    x = body.apply({"params": frozen}, jnp.tile(jnp.array([ids]), (b, 1)), method="embed")
    where = given.start[:, None] + jnp.arange(len(ids))
    return body.apply({"params": frozen}, x, where, prefix=given.kv).hidden


def test_at_one_token_per_latent_it_is_the_text():
    own = wire()
    z = own.compress([TEXTS[1], TEXTS[1][:5]], ratio=1)
    assert z.latents == [8, 5]
    latents = own._opened(z)[1]
    got = _given(reader().decoder, latents, z.wire)
    ids, mask = own._padded([TEXTS[1], TEXTS[1][:5]])
    none = np.zeros((2, 0), np.int32), np.zeros((2, 0), bool)
    text = baselines.build(
        "full_text", reader().decoder, reader().params, jnp.asarray(ids), jnp.asarray(mask), *none,
        np.arange(2, dtype=np.int32), sink=jnp.int32(own.sink),
    )  # fmt: skip
    np.testing.assert_array_equal(got.start, text.start)
    np.testing.assert_allclose(hidden(got), hidden(text), atol=1e-5)


def test_heads_differ_and_the_budget_is_kept():
    z = wire().compress(TEXTS[0][:16], ratio=4)
    given = _given(reader().decoder, wire()._opened(z)[1], z.wire)
    shown = np.asarray(given.kv.bias)[:, 0, 1:] == 0  # behind the sink
    each = shown.sum(1)
    assert each.sum() == z.latents[0] * 4 == 16 and each.min() >= 1 and len(np.unique(each)) > 1


def test_segments_stand_where_they_stood():
    """Two segments, read together, are the two texts behind one another, each encoded alone."""
    own, text = wire(), TEXTS[0][:16] + TEXTS[1]
    z = own.compress(text, ratio=2)
    assert z.latents == [num_latents(16, 2) + num_latents(8, 2)]
    given = _given(reader().decoder, own._opened(z)[1], z.wire)
    assert int(given.start[0]) == 24
    # Moved back by a segment, the second is what it is alone.
    alone = own.compress(TEXTS[1], ratio=2)
    single = _given(reader().decoder, own._opened(alone)[1], alone.wire)
    v, k = (np.asarray(x)[:, 0, 17:25] for x in (given.kv.v, given.kv.k))
    np.testing.assert_allclose(v, np.asarray(single.kv.v)[:, 0, 1:9], atol=1e-5)
    assert np.abs(k - np.asarray(single.kv.k)[:, 0, 1:9]).max() > 0.1


@pytest.mark.parametrize("form,far", [("fp32", 1e-6), ("int8", 0.05)])
def test_another_process_reads_it(form, far):
    own = wire()
    z = own.compress(TEXTS)
    back = own.unpack(z.pack(form))
    ours, theirs = (hidden(_given(reader().decoder, own._opened(m)[1], m.wire)) for m in (z, back))
    assert float(jnp.abs(ours - theirs).max() / jnp.abs(ours).max()) < far


def test_what_it_costs_and_how_it_is_looked_at():
    z = wire().compress(TEXTS[0][:16])
    spent = cost(wire(), z, [TEXTS[0][:16]], "fp32")
    assert spent.encode_flops > 2 * spent.text_flops  # read twice, the second time behind itself
    assert spent.text_kv_bytes / spent.latent_kv_bytes == pytest.approx(16 / 6)
    shown = wire().latents.module.informative(z.wire)
    assert shown.shape == (1, 6, wire().width // 2)
    ids, mask = wire()._padded([TEXTS[0][:16]])
    assert beside_text(wire(), z.wire, jnp.asarray(ids), jnp.asarray(mask)) == {}


HEADS = EncoderConfig(slots="heads")


@pytest.mark.parametrize("options,line", [
    ({"wire": WireConfig(d_z=8)}, "encoder.slots=heads sends keys and values"),
    ({"adapter": AdapterConfig("soft"), "wire": WireConfig(d_z=8)}, "adapter.kind=kv"),
    ({"readers": {"b": ReaderConfig("tiny")}}, "no adapter of model.readers could read"),
    ({"private": 2}, "private latents"),
])  # fmt: skip
def test_what_it_cannot_be_is_refused(options, line):
    with pytest.raises(ConfigError, match=line):
        ModelConfig(encoder=HEADS, **options).validate()
    with pytest.raises(ConfigError, match="made of keys and values"):
        EncoderConfig(slots="heads", output="hidden").validate()
