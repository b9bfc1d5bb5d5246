"""Corrupted lookback: bits that stay, rows that are replaced, and which segments are scored."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax import run as runs
from latent_jax.core.errors import ConfigError
from latent_jax.systems.abstractinator import corrupt, losses


def system_with(tiny, **settings):
    tree = tiny()
    tree["level"]["vq"] = {"init": "random"}
    tree["level"]["corrupt"] = settings
    return runs.system_class("abstractinator")(runs.resolve(tree))


@pytest.fixture(scope="module")
def encoded(made):
    system, variables, batch = made
    out = jax.jit(lambda *a: system.model.apply(variables, *a, method="encode"))(
        batch["ids"], batch["there"]
    )
    return variables, out


def at_step(variables, step):
    book = variables["codebook"]["quantiser"] | {"step": jnp.int32(step)}
    return {**variables, "codebook": {"quantiser": book}}


def test_off_is_nothing_and_before_its_time_changes_no_bit(tiny, made, encoded):
    variables, out = encoded
    key = jax.random.key(0)
    assert corrupt.lookback(made[0].model, variables, (out,), 0, key) is None
    late = system_with(tiny, share={"value": 0.5, "start": 0.0, "begin": 10})
    assert corrupt.lookback(late.model, variables, (out,), 0, None) is None, "in evaluation"
    before = corrupt.lookback(late.model, at_step(variables, 9), (out,), 0, key)
    np.testing.assert_array_equal(before.rows, out.rows)
    assert bool(before.clean.all())
    after = corrupt.lookback(late.model, at_step(variables, 10), (out,), 0, key)
    assert 0 < int((~after.clean).sum()) < int(out.there.sum())


@pytest.mark.slow
def test_noise_is_as_large_as_asked_and_leaves_other_rows_alone(tiny, encoded):
    variables, out = encoded
    # Many rows, so that the size of the noise is known well.
    out = jax.tree.map(lambda a: jnp.tile(a, (64, *[1] * (a.ndim - 1))) if a.ndim else a, out)
    noisy = system_with(tiny, share={"value": 0.25}, noise=0.3)
    found = corrupt.lookback(noisy.model, variables, (out,), 0, jax.random.key(1))
    there, clean = np.asarray(out.there), np.asarray(found.clean)
    assert clean[~there].all()
    share = (~clean).sum() / there.sum()
    assert share == pytest.approx(0.25, abs=0.05)
    np.testing.assert_array_equal(found.rows[clean], out.rows[clean])
    size = np.sqrt(np.mean(np.asarray(out.rows)[there] ** 2))
    spread = np.asarray(found.rows - out.rows)[~clean].std()
    assert spread == pytest.approx(0.3 * size, rel=0.1)


@pytest.mark.slow
def test_the_models_own_rows_are_codes_that_it_predicts(tiny, encoded):
    variables, out = encoded
    own = system_with(tiny, share={"value": 1.0}, by="model")

    @jax.jit
    def both():
        found = corrupt.lookback(own.model, variables, (out,), 0, jax.random.key(2))
        digits = jnp.argmax(losses.next_rows(own.model, variables, out).logits, -1)
        return found, own.model.apply(variables, digits, method="append")

    found, expected = both()
    there = np.asarray(out.there)
    assert not np.asarray(found.clean)[there].any()
    np.testing.assert_array_equal(found.rows[there], expected[there])
    assert np.abs(np.asarray(found.rows - out.rows))[there].max() > 1e-3


@pytest.mark.slow
def test_only_segments_of_true_rows_are_scored(made, encoded):
    system, batch = made[0], made[2]
    variables, out = encoded

    @jax.jit
    def terms(rows, clean):
        read = corrupt.Lookback(rows, clean)
        args = (system.model, variables, batch["ids"], batch["there"], out)
        return losses.level(*args)[0]["reconstruct"], losses.level(*args, read)[0]["reconstruct"]

    everything = jnp.ones_like(out.there)
    plain, same = terms(out.rows, everything)
    # One is a sum over two losses' fusions: some processors round it elsewhere.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), plain, same)
    # The row of segment 1 is replaced: it is not scored, and segment 2, which looks back, differs.
    clean = everything.at[:, 1].set(False)
    _, kept = terms(out.rows, clean)
    _, moved = terms(out.rows.at[:, 1].add(5.0), clean)
    gone = int(out.found.length[:, 1].sum() + (out.found.length[:, 1] < 6).sum())
    assert int(plain.count) - int(moved.count) == gone > 0
    assert abs(float(moved.sum) - float(kept.sum)) > 1e-3


def test_without_a_lookback_it_is_refused(tiny):
    tree = tiny()
    tree["level"] |= {"lookback": 0, "corrupt": {"share": {"value": 0.1}}}
    with pytest.raises(ConfigError, match="lookback=0"):
        runs.resolve(tree)
