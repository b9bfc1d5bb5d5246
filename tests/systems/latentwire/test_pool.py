"""How many slots a length has, and which tokens are whose, at ratios that fp32 rounds."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax.backbones.testing import random_params, tiny_config
from latent_jax.systems.latentwire import baselines, wire
from latent_jax.systems.latentwire.config import EncoderConfig, ModelConfig
from latent_jax.systems.latentwire.model import Compressor, Wire
from latent_jax.systems.latentwire.pool import (
    num_latents,
    real_slots,
    span_index,
    span_means,
    span_of,
)
from latent_jax.systems.latentwire.wire_header import Origin, places

SEGMENT = 128
RATIOS = [round(n / 10, 1) for n in range(11, 161)]
LENGTHS = np.arange(1, SEGMENT + 1)


def test_a_length_has_as_many_slots_everywhere():
    for ratio in RATIOS:
        counts = [num_latents(n, ratio) for n in LENGTHS]
        mask = real_slots(LENGTHS, SEGMENT, ratio)
        assert mask.sum(-1).tolist() == counts
        assert not np.any(mask[:, 1:] > mask[:, :-1])  # those that come first
        longer = LENGTHS + SEGMENT  # a whole segment first
        assert places(LENGTHS, SEGMENT, ratio, SEGMENT)[0].sum(1).tolist() == counts
        made = places(longer, 2 * SEGMENT, ratio, SEGMENT, private=2)[0].sum(1)
        assert made.tolist() == [num_latents(SEGMENT, ratio) + n + 4 for n in counts]


def test_a_length_has_as_many_slots_on_the_device():
    for ratio, tokens in [(1.3, 117), (2.1, 63), (2.6, 117), (4.2, 63), (8.4, 126), (1.2, 12)]:
        mask = jnp.arange(SEGMENT)[None] < tokens
        assert baselines.budget(mask, ratio).tolist() == [num_latents(tokens, ratio)]


def test_the_compressor_has_that_many():
    reader = tiny_config("llama", num_layers=1)
    config = ModelConfig(ratio=2.1, segment=64, encoder=EncoderConfig(slots="embedded"))
    model, frozen = Compressor(config, reader), random_params(reader, jax.random.key(0))
    ids = np.ones((2, 64), np.int32)
    mask = np.arange(64) < np.array([[63], [22]])

    def made(key):
        return model.init_with_output(key, frozen, ids, mask, method="compress")[0].mask

    assert jax.jit(made)(jax.random.key(1)).sum(1).tolist() == [30, 11]


def test_wires_of_any_length_and_ratio_are_read_back():
    origin = Origin("e", "0" * 64, "r", "llama")
    for ratio in (1.3, 2.1, 2.6, 4.0, 4.2, 8.4):
        mask, positions = places(LENGTHS, SEGMENT, ratio, SEGMENT)
        z = np.arange(mask.size, dtype=np.float32).reshape(*mask.shape, 1) * mask[..., None]
        data, _ = wire.pack(Wire(z, mask, positions, LENGTHS), origin, ratio, SEGMENT, "fp32")
        back, header, _ = wire.unpack(data)
        assert header.latents == tuple(num_latents(n, ratio) for n in LENGTHS)
        np.testing.assert_array_equal(back.z, z)
        np.testing.assert_array_equal(back.mask, mask)


def test_a_token_is_in_one_span():
    for ratio in RATIOS:
        for tokens in (1, 60, SEGMENT):
            index, real = span_index(tokens, ratio)
            slot = np.broadcast_to(np.arange(len(index))[:, None], index.shape)
            np.testing.assert_array_equal(index[real], np.arange(tokens))
            np.testing.assert_array_equal(slot[real], span_of(tokens, ratio))


@pytest.mark.parametrize("ratio", [1.2, 2.4])
def test_the_mean_of_a_span_is_that_of_its_own_tokens(ratio):
    text = np.arange(61, dtype=np.float32)[None, :, None]
    index, real = span_index(61, ratio)
    found = span_means(text, np.ones((1, 61), bool), len(index), ratio)[0, :, 0]
    want = (index * real).sum(1) / real.sum(1)
    np.testing.assert_allclose(found, want, rtol=1e-6)
