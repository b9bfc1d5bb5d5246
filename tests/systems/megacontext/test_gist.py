"""GistNet and the base behind gists, on a tiny random base."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax.backbones.decoder import Decoder
from latent_jax.backbones.testing import random_params, tiny_config
from latent_jax.systems.megacontext.gist import GistNet, Gists, build, grouped
from latent_jax.systems.megacontext.layout import Layout
from latent_jax.systems.megacontext.model_config import GistConfig, ModelConfig
from latent_jax.systems.megacontext.positions import slot_offsets, slot_positions
from latent_jax.systems.megacontext.reading import encode, place, read_on, who_sees_what
from latent_jax.systems.megacontext.recovery import _pooled

BASE = tiny_config("llama")
DECODER = Decoder(BASE)
LAYOUT = Layout(block=4, branching=2, slots=(2, 3), protected=1)
MODEL = ModelConfig(layout=LAYOUT, gist=GistConfig(reads=2, window=4))
NET = GistNet(MODEL, BASE)
SINK = 1


@pytest.fixture(scope="module")
def base():
    return random_params(BASE, jax.random.key(0))


@pytest.fixture(scope="module")
def params():
    shape = (BASE.num_layers, 1, LAYOUT.block, BASE.num_kv_heads, BASE.head_dim)
    some = Gists(jnp.zeros(shape), jnp.zeros(shape))
    return NET.init(jax.random.key(1), some, method="touch")["params"]


@pytest.fixture(scope="module")
def ids():
    return jax.random.randint(jax.random.key(2), (2, 32), 2, BASE.vocab_size)


@functools.partial(jax.jit, static_argnames=("window",))
def raw_entries(base, ids, window=4):
    return encode(DECODER, base, SINK, ids, LAYOUT.block, window)


def test_slots_stand_in_their_stretch():
    assert slot_offsets(LAYOUT, 0).tolist() == [0, 1, 2, 3]
    assert slot_offsets(LAYOUT, 1).tolist() == [0, 2]
    # 8 tokens for 3 slots: stretches of 2.67, their middles at 0.83, 3.5 and 6.17
    assert slot_offsets(LAYOUT, 2).tolist() == [0, 3, 6]
    assert slot_offsets(LAYOUT, 2, "start").tolist() == [0, 2, 5]
    assert slot_positions(MODEL, 2, jnp.array([0, 3])).tolist() == [0, 3, 6, 24, 27, 30]


def test_a_slot_starts_as_the_mean_of_what_it_reads(params):
    """Untrained, with equal sources, a gist is the source, at every level."""
    key = jax.random.key(3)
    shape = (BASE.num_layers, 4, 1, BASE.num_kv_heads, BASE.head_dim)
    one = Gists(*(jax.random.normal(k, shape) for k in jax.random.split(key)))
    raw = Gists(*(jnp.repeat(x[:, :1], 4, 1).repeat(LAYOUT.block, 2) for x in one))
    for level, count in ((1, 4), (2, 2)):
        found = build(NET, params, raw, level)
        assert found.k.shape[1:3] == (count, LAYOUT.slots[level - 1])
        for got, want in zip(found, one, strict=True):
            np.testing.assert_allclose(got, jnp.broadcast_to(want[:, :1], got.shape), atol=1e-5)


def test_pooling_is_uneven_where_slots_do_not_divide_a_block():
    x = jnp.arange(16.0).reshape(1, 1, 16, 1, 1)  # two blocks of eight
    for slots, means in ((3, [1.0, 4.0, 6.5, 9.0, 12.0, 14.5]), (2, [1.5, 5.5, 9.5, 13.5])):
        np.testing.assert_allclose(_pooled(x, 2, slots).ravel(), means, rtol=1e-6)


def test_grouping_keeps_the_order():
    x = jnp.arange(2 * 4 * 3 * 1 * 1).reshape(2, 4, 3, 1, 1)
    found = grouped(Gists(x, x), 2)
    assert found.k.shape == (2, 2, 6, 1, 1)
    assert found.k[0, 1].ravel().tolist() == [6, 7, 8, 9, 10, 11]


def test_a_window_depends_on_itself_only(base, ids):
    entries, _ = raw_entries(base, ids)
    other, _ = raw_entries(base, ids.at[:, :16].set(5))
    blocks = lambda e: np.asarray(e.k).reshape(BASE.num_layers, 2, 8, -1)  # noqa: E731
    np.testing.assert_array_equal(blocks(entries)[:, :, 4:], blocks(other)[:, :, 4:])
    assert np.abs(blocks(entries)[:, :, 3] - blocks(other)[:, :, 3]).max() > 0.1


def test_an_incomplete_window_is_like_a_whole_one(base, ids):
    """Streaming: the blocks of a window do not change when later ones arrive."""
    whole, _ = raw_entries(base, ids)
    part, _ = raw_entries(base, ids[:, :20])
    cut = lambda e, n: np.asarray(e.v).reshape(BASE.num_layers, 2, n, -1)[:, :, :5]  # noqa: E731
    np.testing.assert_allclose(cut(whole, 8), cut(part, 5), atol=1e-5)


def test_reading_on_behind_raw_entries_is_plain_reading(base, ids):
    """Within one window, placed raw entries are the cache of an ordinary forward pass."""
    t, past = 16, 8
    where = jnp.broadcast_to(jnp.arange(t), (2, t))
    full = read_on(DECODER, base, SINK, None, ids[:, :t], where)
    entries, _ = raw_entries(base, ids[:, :past])
    seen = jnp.ones((2, past), bool)
    placed = place(DECODER, entries, where[:, :past], seen)
    got = read_on(DECODER, base, SINK, placed, ids[:, past:t], where[:, past:])
    np.testing.assert_allclose(got, full[:, past:], atol=2e-4)


@pytest.mark.parametrize("chunk", [1, 2])
def test_every_token_sees_each_block_once(chunk):
    block, n = 3, 6
    replaced = jax.random.bernoulli(jax.random.key(4), 0.6, (4, n))
    gists, raw = map(np.asarray, who_sees_what(replaced, block, chunk))
    for b, t, j in np.ndindex(4, n * block, n):
        seen = raw[b, t, j * block : (j + 1) * block]
        past = min(max(t + 1 - j * block, 0), block)
        if j // chunk < t // block // chunk and replaced[b, j]:
            assert gists[b, t, j] and not seen.any()
        else:
            assert not gists[b, t, j] and seen.sum() == past


def test_gradient_reaches_every_weight_of_a_level(base, params, ids):
    entries, _ = raw_entries(base, ids)

    def total(params, level):
        gists = build(NET, params, entries, level)
        return sum(jnp.sum(jnp.sin(3 * x)) for x in gists)

    for level in (1, 2):
        gradient = jax.grad(total)(params, level)[f"level_{level}"]
        for name, leaf in gradient.items():
            assert np.abs(np.asarray(leaf)).max(axis=tuple(range(1, leaf.ndim))).min() > 0, name
