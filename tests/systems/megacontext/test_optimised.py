"""Slots optimised for one history: nearer to the text than they began, on text they never saw."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax import backbones
from latent_jax.backbones.sink import sink_token
from latent_jax.backbones.substitution import substitution
from latent_jax.core.errors import ConfigError
from latent_jax.run import resolve
from latent_jax.systems.megacontext import optimised, recipe
from latent_jax.systems.megacontext.embedding_gists import EmbeddingGists
from latent_jax.systems.megacontext.gist import GistNet, build
from latent_jax.systems.megacontext.head_gists import HeadGists
from latent_jax.systems.megacontext.reading import read_on
from latent_jax.systems.megacontext.recovery import Recovery

ARMS = ["full", "gist", "optimised", "dropped"]


@pytest.fixture(scope="module")
def base():
    return backbones.load("tiny")


def settings(**more):
    overrides = {"eval.arms": ARMS, "eval.batch_size": 4, "model.layout.slots": [2]} | more
    return resolve("megacontext/tiny", {"train.phases": [], **overrides})


def measure(base, gists, config):
    return Recovery(base.decoder, gists, sink_token(base.tokenizer), config, 1, 7)


@pytest.fixture(scope="module")
def found(base, untrained):
    """What the slots of two histories begin as, and what becomes of them."""
    config = settings(**{"eval.optimised_steps": 40})
    gists = GistNet(config.model, base.config)
    one, params = measure(base, gists, config), {"gist": untrained(base, config.model)}
    rows = recipe.histories(config, base.tokenizer, "validation", one.length, 4)
    raw = one._encode(base.params, rows)
    return one, params, rows, build(gists, params["gist"], raw, 1), one._optimise(
        params, base.params, raw, None, rows
    )  # fmt: skip


def test_what_is_read_meanwhile_is_not_the_horizon(found):
    one, params, rows, _, moved = found
    told, weight = optimised.queries(jnp.asarray(rows), one.past, 8)
    assert told.shape[1] == optimised.length(one.past, one.length - one.past, 8) == 8 + 24 + 56
    np.testing.assert_array_equal(told[:, :8], rows[:, 56:64])
    np.testing.assert_array_equal(told[:, 8:32], np.roll(rows[:, :24], 1, axis=0))
    np.testing.assert_array_equal(told[:, 32:], rows[:, :56])
    assert float(weight.sum()) == pytest.approx(1)
    assert float(weight[:31].sum()) == pytest.approx(0.5)
    other = rows.copy()
    other[:, 64:] = (other[:, 64:] + 5) % 1000
    base = backbones.load("tiny")
    again = one._optimise(params, base.params, one._encode(base.params, other), None, other)
    np.testing.assert_array_equal(again.k, moved.k)


def test_on_the_horizon_it_is_nearer_to_the_text_than_where_it_began(base, found):
    one, _, rows, start, moved = found

    @jax.jit
    def apart(entries):
        where = jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape)
        full = read_on(base.decoder, base.params, one.sink, None, rows, where)[:, 64:-1]
        given = read_on(
            base.decoder, base.params, one.sink, one._moved(base.params, entries, len(rows)),
            rows[:, 56:], where[:, 56:],
        )[:, 8:-1]  # fmt: skip
        return substitution(base.decoder, base.params, full, given, rows[:, 65:]).kl.mean()

    assert apart(moved) < 0.85 * apart(start)  # 0.76 when this was written


def test_as_an_arm(base, found):
    one, params, rows, start, moved = found
    lost = one.losses(params, base.params, rows, ARMS)
    again = one._arm(params, base.params, None, moved, rows, "optimised")
    np.testing.assert_allclose(lost["optimised"], again, rtol=1e-5)
    began = one._arm(params, base.params, None, start, rows, "optimised")
    np.testing.assert_allclose(lost["gist"], began, rtol=1e-5)
    assert "nll_at_h.lod1.optimised" in one.summary(lost)
    assert one.checked.entries == 2 * 14 and not one.checked.inconsistent


@pytest.mark.parametrize("kind", ["heads", "embeddings"])
def test_of_gists_of_other_kinds(base, kind):
    config = settings(
        **{"eval.optimised_steps": 2, "eval.batch_size": 2, "model.gist.kind": kind,
           "model.gist.reads": 4, "train.steps": 0},
    )  # fmt: skip
    make = HeadGists if kind == "heads" else EmbeddingGists
    gists = make(config.model, base.decoder, sink_token(base.tokenizer))
    params = {"gist": gists.empty() if kind == "heads" else gists.fresh(jax.random.key(0))}
    one = measure(base, gists, config)
    rows = recipe.histories(config, base.tokenizer, "validation", one.length, 2)
    lost = one.losses(params, base.params, rows, ["optimised", "dropped"])
    assert np.isfinite(lost["optimised"]).all()
    assert np.abs(lost["optimised"] - lost["dropped"]).max() > 1e-4


def test_histories_that_the_base_cannot_read_twice_are_refused(base):
    config = settings(**{"eval.history": 2000})
    with pytest.raises(ConfigError, match="optimised reads histories of 16000 tokens"):
        Recovery(base.decoder, None, 0, config, 1, 2000)
