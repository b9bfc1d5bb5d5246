"""Heads share one budget of entries: who gets how many, which ones, and that nothing else moves."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax.backbones import decode_cpu, head_budgets
from latent_jax.backbones.decoder import KV, Decoder
from latent_jax.backbones.generate import generate_ids
from latent_jax.backbones.sink import behind, sink_kv
from latent_jax.backbones.testing import random_params, tiny_config
from latent_jax.ops.attention import MASKED, attend

CONFIG = tiny_config("qwen3", num_layers=2)
BODY = Decoder(CONFIG)
LENGTHS = np.array([11, 7])
MASK = np.arange(11)[None] < LENGTHS[:, None]
IDS = np.where(MASK, np.random.default_rng(0).integers(2, 90, MASK.shape), 0).astype(np.int32)


@functools.cache
def params():
    return random_params(CONFIG, jax.random.key(0))


@functools.cache
def prefilled():
    first = sink_kv(BODY, params(), jnp.int32(1), 2)
    x = BODY.apply({"params": params()}, jnp.asarray(IDS), method="embed")
    return BODY.apply({"params": params()}, x, mask=jnp.asarray(MASK), prefix=first).kv


def uneven(key=0):
    """A profile in which heads differ widely."""
    x = jax.random.uniform(jax.random.key(key), (2, 2, head_budgets.POINTS))
    x = jnp.sort(x, -1)[..., ::-1]
    return x * jnp.array([[4.0, 1.0], [0.5, 0.05]])[..., None]


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_all_of_the_budget_is_given_and_no_more(share):
    total = np.maximum((share * 4 * LENGTHS).astype(int), 4)
    for places in (11, 16):
        got = np.asarray(head_budgets.counts(uneven(), LENGTHS, total, places))
        np.testing.assert_array_equal(got.sum((1, 2)), total)
        assert (got >= 1).all() and (got <= LENGTHS[:, None, None]).all()
        # Whoever has another number of places comes to the same.
        again = head_budgets.counts(uneven(), LENGTHS, total, places + 5)
        np.testing.assert_array_equal(got, again)
    assert share == 1.0 or (got[:, 0, 0] > got[:, 1, 1]).all()


def test_more_than_there_is_gives_everything():
    got = head_budgets.counts(uneven(), LENGTHS, 100 * LENGTHS, 11)
    np.testing.assert_array_equal(got, np.broadcast_to(LENGTHS[:, None, None], got.shape))


def test_a_profile_is_the_mean_of_worths_by_rank():
    worth = np.random.default_rng(1).uniform(size=(2, 2, 2, 11)).astype(np.float32)
    got = head_budgets.profile(jnp.asarray(worth), jnp.asarray(MASK))
    assert got.shape == (2, 2, head_budgets.POINTS)
    np.testing.assert_allclose(got[..., 0], worth[..., 0].mean(1), rtol=1e-6)
    last = (worth[:, 0, :, 10] + worth[:, 1, :, 6]) / 2  # of the shorter text its own last
    np.testing.assert_allclose(got[..., -1], last, rtol=1e-6)


def packed(total):
    cache, count = prefilled(), head_budgets.counts(uneven(3), LENGTHS, total, 11)
    # Any entries do: here those of a random order.
    drawn = np.random.default_rng(2).uniform(size=(2, 2, 11, 2))
    value = np.where(MASK[None, :, :, None], drawn, -1)
    rank = np.argsort(np.argsort(-value, axis=2), axis=2)
    kept = jnp.asarray(rank) < count.transpose(1, 0, 2)[:, :, None]
    rows = jnp.concatenate([cache.k, cache.v], -1)
    order = head_budgets.kept_first(kept)
    return count, kept, head_budgets.pack(rows, order, count, int(max(total)) + 3)


def unpacked(rows, count, places):
    found, used = head_budgets.unpack(rows, count, places)
    k, v = jnp.split(found, 2, axis=-1)
    return KV(k, v, used.any((0, 3)), jnp.where(used, 0.0, MASKED))


def test_unpacked_is_what_was_packed():
    cache = prefilled()
    count, kept, rows = packed(np.array([20, 9]))
    back = unpacked(rows, count, 13)
    assert back.k.shape == (2, 2, 13, 2, CONFIG.head_dim)
    for layer, b, head in np.ndindex(2, 2, 2):
        n = int(count[b, layer, head])
        at = np.flatnonzero(np.asarray(kept)[layer, b, :, head])
        assert len(at) == n and MASK[b, at].all()
        np.testing.assert_array_equal(back.k[layer, b, :n, head], cache.k[layer, b, at, head])
        np.testing.assert_array_equal(back.v[layer, b, :n, head], cache.v[layer, b, at, head])
        hidden = np.asarray(back.bias)[layer, b, :, head]
        assert (hidden[:n] == 0).all() and (hidden[n:] == np.float32(MASKED)).all()


def read(prefix, start=LENGTHS):
    x = BODY.apply({"params": params()}, jnp.asarray(IDS[:, :4]), method="embed")
    where = start[:, None] + jnp.arange(4)
    first = sink_kv(BODY, params(), jnp.int32(1), 2)
    return BODY.apply({"params": params()}, x, where, prefix=behind(first, prefix)).hidden


def test_the_whole_budget_reads_as_the_text_does():
    count, _, rows = packed(4 * LENGTHS)
    np.testing.assert_allclose(read(unpacked(rows, count, 11)), read(prefilled()), atol=1e-5)


def test_a_hidden_entry_is_as_good_as_gone():
    q = jax.random.normal(jax.random.key(0), (1, 3, 4, 8))
    k, v = (jax.random.normal(jax.random.key(i), (1, 3, 2, 8)) for i in (1, 2))
    before = [jax.random.normal(jax.random.key(i), (1, 5, 2, 8)) for i in (3, 4)]
    mask, seen = jnp.ones((1, 3, 3), bool), jnp.ones((1, 5), bool)
    bias = jnp.zeros((1, 5, 2)).at[0, 1:3, 0].set(MASKED)
    out = attend(q, k, v, mask, *before, seen, bias)
    left = [x[:, jnp.array([0, 3, 4])] for x in before]
    np.testing.assert_allclose(
        out[:, :, :2], attend(q, k, v, mask, *left, seen[:, :3])[:, :, :2], atol=1e-6
    )
    np.testing.assert_allclose(
        out[:, :, 2:], attend(q, k, v, mask, *before, seen)[:, :, 2:], atol=1e-6
    )
    # Any other bias multiplies an entry's weight.
    twice = attend(q, k, v, mask, *before, seen, jnp.zeros((1, 5, 2)).at[0, 4].set(jnp.log(2.0)))
    doubled = [jnp.concatenate([x, x[:, 4:]], 1) for x in before]
    np.testing.assert_allclose(
        twice, attend(q, k, v, mask, *doubled, jnp.ones((1, 6), bool)), atol=1e-6
    )


@pytest.mark.parametrize("layout", ["general", "cpu"])
def test_generation_heeds_biases(layout, monkeypatch):
    monkeypatch.setattr(decode_cpu, "pays", lambda *a: layout == "cpu")
    count, _, rows = packed(np.array([20, 9]))
    kept = unpacked(rows, count, 11)
    x = BODY.apply({"params": params()}, jnp.asarray(IDS[:, :4]), method="embed")
    out = generate_ids(
        BODY, params(), x, prefix=kept, start=jnp.asarray(LENGTHS), max_new_tokens=3
    ).tokens
    # Teacher-forced, one token more each time.
    for n in range(3):
        ids = jnp.concatenate([jnp.asarray(IDS[:, :4]), out[:, :n]], 1)
        e = BODY.apply({"params": params()}, ids, method="embed")
        where = LENGTHS[:, None] + jnp.arange(4 + n)
        hidden = BODY.apply({"params": params()}, e, where, prefix=kept).hidden[:, -1:]
        logits = BODY.apply({"params": params()}, hidden, method="unembed")
        np.testing.assert_array_equal(jnp.argmax(logits[:, 0], -1), out[:, n])
    bare = KV(kept.k, kept.v, kept.mask)
    other = generate_ids(
        BODY, params(), x, prefix=bare, start=jnp.asarray(LENGTHS), max_new_tokens=3
    ).tokens
    assert (np.asarray(other) != np.asarray(out)).any()
