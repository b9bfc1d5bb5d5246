"""Gists of gists of single heads' entries: what is kept, what readers see, stores, and the lens."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax import backbones
from latent_jax.backbones.testing import random_params
from latent_jax.systems.megacontext.counterfactual import Counterfactuals, actions
from latent_jax.systems.megacontext.focus import before_tail
from latent_jax.systems.megacontext.gist import Gists
from latent_jax.systems.megacontext.head_calibration import calibrate
from latent_jax.systems.megacontext.head_gists import HeadGists
from latent_jax.systems.megacontext.head_merge import NOTHING, merged
from latent_jax.systems.megacontext.memory import Memory, digest
from latent_jax.systems.megacontext.model_config import LensConfig
from latent_jax.systems.megacontext.oracle import Oracle
from latent_jax.systems.megacontext.positions import slot_positions
from latent_jax.systems.megacontext.reading import place, read_on
from latent_jax.systems.megacontext.runtime import Runtime, RuntimeConfig
from latent_jax.systems.megacontext.sight import Look, sight_width
from latent_jax.systems.megacontext.store import GistTree
from latent_jax.systems.megacontext.tiling import start
from tests.systems.megacontext.test_head_gists import (
    BASE,
    DECODER,
    LAYOUT,
    MODEL,
    SINK,
    with_room_for_all,
)

TWO = dataclasses.replace(
    MODEL, layout=dataclasses.replace(LAYOUT, slots=(3, 4)),
    gist=dataclasses.replace(MODEL.gist, places=12),
)  # fmt: skip


@pytest.fixture(scope="module")
def base():
    return random_params(BASE, jax.random.key(0))


@pytest.fixture(scope="module")
def ids():
    return jax.random.randint(jax.random.key(2), (2, 64), 2, BASE.vocab_size)


def texts(vocab):
    rows = np.random.default_rng(3).integers(2, vocab, (4, 32))
    return lambda level: rows[: 4 // level]


@pytest.fixture(scope="module")
def params(base):
    return calibrate(HeadGists(TWO, DECODER, SINK), base, texts(BASE.vocab_size), batch=2)


def behind(gists, params, base, records, level, then):
    """Hidden states of tokens behind all nodes of a level."""
    found = gists.spread(params, records, level)
    count = 64 // (8 * int(LAYOUT.widths[1] if level == 1 else 4))
    at = slot_positions(gists.config, level, jnp.arange(count))
    at = jnp.broadcast_to(at, (2, at.size))
    entries = place(DECODER, Gists(found.k, found.v), at, jnp.ones(at.shape, bool), found.bias)
    where = jnp.broadcast_to(64 + jnp.arange(then.shape[1]), then.shape)
    return read_on(DECODER, base, SINK, entries, then, where)


def test_with_room_for_all_nothing_changes_for_a_reader(params, base, ids):
    wide = dataclasses.replace(TWO, gist=dataclasses.replace(TWO.gist, places=32))
    gists = with_room_for_all(wide)
    full = gists.empty() | {k: params[k] for k in ("query", "normaliser", "metric", "mass")}
    build = jax.jit(gists.build, static_argnames=("level",))
    one, two = (build(full, base, ids, level=level) for level in (1, 2))
    then = ids[:, :8]
    np.testing.assert_allclose(
        behind(gists, full, base, two, 2, then), behind(gists, full, base, one, 1, then), atol=2e-4
    )


def test_what_is_kept_fills_the_room_and_stands_in_better_than_it_would_alone(params, base, ids):
    gists = HeadGists(TWO, DECODER, SINK)
    count = np.asarray(gists.counts(params, 2))
    assert count.sum() == gists.room(2) and count.max() <= 12 and count.max() > count.min()
    build = jax.jit(gists.build, static_argnames=("level",))
    found = gists.spread(params, build(params, base, ids, level=2), 2)
    used = np.asarray(found.bias) > NOTHING / 2
    assert (used.sum((1, 2)) == 4 * count).all()
    assert np.isfinite(np.asarray(found.k)).all() and np.isfinite(np.asarray(found.v)).all()

    # One head by hand, six keys four times each: those that are kept stand for all, and alone
    # they would not.
    key = jax.random.split(jax.random.key(4), 4)
    keys, values = (jnp.tile(jax.random.normal(k, (1, 1, 6, 8)), (1, 1, 4, 1)) for k in key[:2])
    keys += 0.05 * jax.random.normal(key[2], keys.shape)
    asked = jax.random.normal(key[2], (40, 1, 1, 8))
    bias = jnp.log(jax.random.uniform(key[3], (1, 1, 24), minval=0.5, maxval=4.0))
    elsewhere = jnp.full((40, 1, 1), 2.0)
    new, order, cost = merged(
        keys, values, bias, asked, elsewhere, jnp.eye(8)[None], jnp.ones(1), jnp.array([6]), 8, 1e-4
    )
    new = np.asarray(new)[0][np.asarray(order)[0, :6, 0], 0]

    def given(k, v, b):
        logits = asked[:, 0, 0] @ k.T + b
        total = jnp.logaddexp(jax.nn.logsumexp(jnp.asarray(all_logits), -1), 2.0)
        return np.asarray(jnp.exp(logits - total[:, None]) @ v)

    all_logits = asked[:, 0, 0] @ keys[0, 0].T + bias[0, 0]
    truth = given(keys[0, 0], values[0, 0], bias[0, 0])
    fit = given(new[:, :8], new[:, 8:-1], new[:, -1])
    near = [int(np.abs(np.asarray(keys[0, 0]) - k).max(1).argmin()) for k in new[:, :8]]
    alone = given(*(np.asarray(x)[0, 0][near] for x in (keys, values, bias)))
    assert np.square(fit - truth).mean() < 0.1 * np.square(alone - truth).mean()
    assert np.asarray(cost)[0, 0, :5].min() > 10 * np.asarray(cost)[0, 0, 6:].max()


def test_places_that_hold_nothing_are_never_read(params):
    """A gist below with fewer entries than places: its empty ones say nothing above."""
    gists = HeadGists(TWO, DECODER, SINK)
    below = 0.3 * jax.random.normal(jax.random.key(1), (1, 4, 3, gists.width))
    loud = gists.spread(params, below[0])
    assert (np.asarray(loud.bias) < -1e29).any()
    entries, order, _ = gists.over(params, below, 2)
    assert np.isfinite(np.asarray(entries)).all()
    assert np.asarray(order).shape[2] == 24


@pytest.fixture(scope="module")
def reader():
    return backbones.load("tiny")


@pytest.fixture(scope="module")
def kept(reader):
    return calibrate(
        HeadGists(TWO, reader.decoder, 0), reader.params, texts(reader.config.vocab_size)
    )


@pytest.fixture(scope="module")
def memory(reader, kept, tmp_path_factory):
    ids = np.random.default_rng(0).integers(10, reader.config.vocab_size, 21 * 8 + 3)
    path = tmp_path_factory.mktemp("store") / "whole"
    with Memory.open(path, reader, TWO, kept, digest(kept), writable=True) as memory:
        memory.tree.append(ids)
        assert memory.build() == {1: 21, 2: 5}
        yield memory


def test_streamed_and_bulk_builds_agree(memory, reader, kept, tmp_path):
    ids = memory.tree.tokens(0, len(memory.tree))
    path = tmp_path / "stream"
    with Memory.open(path, reader, TWO, kept, digest(kept), writable=True) as other:
        for first in range(0, len(ids), 20):
            other.tree.append(ids[first : first + 20])
            other.build()
        np.testing.assert_array_equal(other.tree.gists(2, 0, 5), memory.tree.gists(2, 0, 5))
    assert isinstance(memory.tree, GistTree)


def test_what_actions_are_worth_is_what_reading_says(memory):
    """Counterfactuals share a prefix; each equals the loss behind its own context."""
    layout = TWO.layout
    tiling = start(layout, 20, 60)
    here, first = before_tail(layout, tiling)
    todo = [a for i, a in enumerate(actions(layout, tiling)) if i in (0, 3, 4, 8)]
    made = {(a.kind, n) for a in todo for n, _ in a.made}
    assert made == {(1, 1), (1, 0), (-1, 2), (-1, 1)}
    live = memory.tree.tokens(first, 21 * 8)
    found = Counterfactuals(memory, 60, rows=3).measure(here, todo, live, first, 8)

    def loss(context):
        return memory.losses([memory.gather(context, first)], live, first, 8, 60)[0]

    assert abs(loss(here) - found.nll) < 2e-5
    for action, delta in zip(todo, found.delta_nll, strict=True):
        at = here.index(action.gone[0])
        changed = [*here[:at], *action.made, *here[at + len(action.gone) :]]
        assert abs(loss(changed) - found.nll - delta) < 2e-5
    best, _ = Oracle(memory, 60, RuntimeConfig().focus, 2).settle(20, live, first, 8)
    assert best <= found.nll + 2e-5


def test_a_context_of_both_levels_is_gathered_and_answered(memory):
    found, first = before_tail(TWO.layout, start(TWO.layout, 20, 60))
    assert {level for level, _ in found} == {0, 1, 2}
    entries = memory.gather(found, first)
    widths = {0: 8, 1: 8, 2: 12}
    assert len(entries.positions) == sum(widths[level] for level, _ in found)
    runtime = Runtime(memory, RuntimeConfig(60, "recency"))
    answer = runtime.answer("The mill", 3)
    assert 2 in {level for level, _ in answer.nodes} and answer.text


def test_a_lens_sees_the_heads_mean_values(memory, reader, kept):
    config, base = LensConfig(layers=2), reader.config
    look = Look(base, config, memory.heads.all_counts(kept))
    for level in (1, 2):
        records = memory.tree.gists(level, 0, 2)
        seen = look(records, level)
        assert seen.shape == (2, sight_width(base, config))
        found = memory.heads.spread(kept, records, level)
        weight = np.exp(np.maximum(np.asarray(found.bias, np.float64), -80.0))[..., None]
        weight = np.where(np.asarray(found.bias)[..., None] < -1e4, 0, weight)
        mean = (weight * np.asarray(found.v)).sum(2) / np.maximum(weight.sum(2), 1e-6)  # l n g d
        wanted = mean[[0, -1]].swapaxes(0, 1).reshape(2, 2, -1)
        wanted /= np.sqrt(np.square(wanted).mean(-1, keepdims=True))
        np.testing.assert_allclose(seen.reshape(2, 2, -1), wanted, atol=2e-2)
