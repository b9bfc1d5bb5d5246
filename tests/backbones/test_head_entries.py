"""Entries of a cache: what each is worth, which are left out, and what the others say for them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax.backbones import head_entries
from latent_jax.backbones.attention_probe import queries
from latent_jax.backbones.decoder import Decoder
from latent_jax.backbones.sink import behind, sink_kv
from latent_jax.backbones.testing import random_params, tiny_config
from latent_jax.ops.attention import MASKED
from latent_jax.ops.subsets import removal_order

CONFIG = tiny_config("qwen3", num_layers=2)
BODY = Decoder(CONFIG)
LENGTHS = np.array([11, 7])
MASK = np.arange(11)[None] < LENGTHS[:, None]
IDS = np.where(MASK, np.random.default_rng(0).integers(2, 90, MASK.shape), 0).astype(np.int32)
EACH = CONFIG.num_heads // CONFIG.num_kv_heads


@functools.cache
def params():
    return random_params(CONFIG, jax.random.key(0))


@functools.cache
def run():
    return jax.jit(lambda p, i, m, c: head_entries.entries(BODY, p, i, m, jnp.int32(1), c))


def found(count=None):
    return run()(params(), IDS, MASK, count)


def prefill(ids):
    first = sink_kv(BODY, params(), jnp.int32(1), len(ids))
    x = BODY.apply({"params": params()}, jnp.asarray(ids), method="embed")
    return BODY.apply({"params": params()}, x, prefix=first).kv


@functools.cache
def second_reading():
    """By hand, first text: it twice, as one sequence behind the sink; attention to its entries."""
    twice = np.concatenate([IDS[:1], IDS[:1]], 1)
    x = BODY.apply({"params": params()}, jnp.asarray(twice), method="embed")
    sink, whole = sink_kv(BODY, params(), jnp.int32(1), 1), prefill(twice)
    rows = jnp.arange(11, 22)[None]
    q, _ = queries(BODY, params(), x, jnp.arange(22)[None], jnp.ones((1, 22), bool), rows, sink)
    keys = jnp.concatenate([sink.k, whole.k], 2)[:, 0]
    d, groups = CONFIG.head_dim, CONFIG.num_kv_heads
    logits = jnp.einsum("lwghd,lsgd->lghws", q[:, 0].reshape(2, 11, groups, EACH, d), keys)
    seen = jnp.arange(23)[None] <= jnp.arange(12, 23)[:, None]
    weight = jax.nn.softmax(jnp.where(seen, logits * d**-0.5, -jnp.inf), -1)[..., 1:12]
    return weight.reshape(2, groups, -1, 11), whole


def test_worth_is_attention_and_the_error_of_leaving_it_out():
    p, whole = second_reading()
    gram = jnp.einsum("lgqi,lgqj->lgij", p, p) / p.shape[2]
    size = jnp.trace(gram, axis1=-2, axis2=-1) / 11
    o = jnp.asarray(params()["layers"]["o"]["kernel"])
    o = o.reshape(2, CONFIG.num_kv_heads, EACH, CONFIG.head_dim, -1)
    value = whole.v[:, 0, :11].swapaxes(1, 2)
    moved = jnp.einsum("lgsd,lgxde->lgsxe", value, o)
    wanted = jnp.einsum("lgsxe,lgtxe->lgst", moved, moved) / EACH
    wanted = wanted + (jnp.trace(wanted, axis1=-2, axis2=-1) / 11)[..., None, None]
    ridge = head_entries.RIDGE * size[..., None, None] * jnp.eye(11)
    rank, cost = removal_order(gram + ridge, wanted)
    got = found()
    np.testing.assert_array_equal(got.rank[:, 0], rank)
    attended = -np.sort(-np.sqrt(np.einsum("lgii->lgi", gram)), axis=-1)
    error = np.asarray(got.worth)[:, 0] ** 4 / attended**2  # cost over the stream's power
    ratio = error / np.asarray(cost)
    np.testing.assert_allclose(ratio, ratio[:, :1, :1] * np.ones_like(ratio), rtol=0.02)


def test_padding_changes_nothing():
    wide = np.pad(IDS, [(0, 0), (0, 5)], constant_values=3), np.pad(MASK, [(0, 0), (0, 5)])
    count = np.full((2, 2, 2), 4)
    ours, theirs = found(count), run()(params(), *wide, count)
    for b, n in enumerate(LENGTHS):
        np.testing.assert_array_equal(theirs.rank[:, b, :, :n], ours.rank[:, b, :, :n])
        np.testing.assert_allclose(theirs.worth[:, b, :, :n], ours.worth[:, b, :, :n], rtol=1e-2)
        np.testing.assert_allclose(theirs.kv.v[:, b, :n], ours.kv.v[:, b, :n], atol=1e-3)
        np.testing.assert_allclose(theirs.kv.bias[:, b, :n], ours.kv.bias[:, b, :n], atol=1e-3)
        assert (np.asarray(theirs.kv.bias)[:, b, n:] == np.float32(MASKED)).all()


def test_all_entries_are_the_text():
    got = found(np.broadcast_to(LENGTHS[:, None, None], (2, 2, 2)))
    for b, n in enumerate(LENGTHS):
        whole = prefill(IDS[b : b + 1, :n])
        np.testing.assert_allclose(got.kv.k[:, b, :n], whole.k[:, 0], atol=1e-5)
        np.testing.assert_allclose(got.kv.v[:, b, :n], whole.v[:, 0], atol=1e-4)
        np.testing.assert_allclose(got.kv.bias[:, b, :n], 0, atol=1e-4)


@pytest.mark.parametrize("keep", [2, 5])
def test_the_kept_ones_stand_in_for_the_others(keep):
    """Reading the text again: nearer to reading it behind all of it than the same entries raw."""
    got, sink = found(np.full((2, 2, 2), keep)), sink_kv(BODY, params(), jnp.int32(1), 2)
    kept = np.asarray(got.kv.bias) > MASKED
    np.testing.assert_array_equal(kept.sum(2), keep)
    np.testing.assert_array_equal(kept.swapaxes(2, 3), np.asarray(got.rank) < keep)
    x = BODY.apply({"params": params()}, jnp.asarray(IDS), method="embed")
    where = LENGTHS[:, None] + jnp.arange(11)

    def read(kv):
        out = BODY.apply(
            {"params": params()}, x, where, jnp.asarray(MASK), prefix=behind(sink, kv)
        )
        return np.asarray(out.hidden)[MASK]

    raw = found().kv
    whole = read(raw._replace(bias=None))
    thinned = raw._replace(bias=jnp.where(kept, 0.0, MASKED))
    fitted, plain = (np.square(read(kv) - whole).sum() for kv in (got.kv, thinned))
    assert fitted < 0.7 * plain
