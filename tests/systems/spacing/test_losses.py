"""Loss terms, auxiliary targets, clipping per seed, scores."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax.systems.spacing import auxiliary, losses, rollout, scores
from latent_jax.systems.spacing.config import AUXILIARY, MemoryConfig
from latent_jax.systems.spacing.diagnose import entropy_share, gradient_geometry


def test_clipped_gradients_are_shortened_and_others_kept():
    tree = {"a": jnp.asarray([3.0, 0.0]), "b": jnp.asarray([0.0, 4.0])}

    def loss(tree, longest):
        tree = losses.clip_gradient(tree, longest)
        return sum(jnp.vdot(x, x) / 2 for x in jax.tree.leaves(tree))

    g = jax.grad(loss)(tree, 1.0)
    np.testing.assert_allclose(g["a"], [0.6, 0], rtol=1e-6)
    np.testing.assert_allclose(g["b"], [0, 0.8], rtol=1e-6)
    np.testing.assert_allclose(jax.grad(loss)(tree, 10.0)["a"], [3, 0])


def test_each_seed_is_clipped_by_itself():
    stacked = {"a": jnp.asarray([[30.0], [0.1]])}

    def one(tree):
        return jnp.sum(losses.clip_gradient(tree, 1.0)["a"] ** 2) / 2

    g = jax.grad(lambda t: jax.vmap(one)(t).sum())(stacked)
    np.testing.assert_allclose(g["a"], [[1.0], [0.1]], rtol=1e-6)


def test_cuts_are_spread_and_end_at_the_end():
    cuts = np.asarray(losses.draw_cuts(jax.random.key(0), 8, 255))
    assert cuts[-1] == 254 and 0 <= cuts[0] < 32
    assert (np.diff(cuts) > 0).all()


def test_orthogonality_by_hand():
    slots = jnp.asarray([[[[1.0, 0.0], [0.0, 2.0]]]])
    assert float(losses.orthogonality(slots)[0, 0]) == pytest.approx(0, abs=1e-6)
    same = jnp.asarray([[[[1.0, 0.0], [3.0, 0.0]]]])
    assert float(losses.orthogonality(same)[0, 0]) == pytest.approx(1, abs=1e-5)


def test_auxiliary_targets_by_hand():
    rng = np.random.default_rng(0)
    gaps = rng.gamma(4, 0.25, size=(2, 100))
    got = np.asarray(auxiliary.targets(jnp.asarray(gaps), jnp.asarray([99])))[:, 0]
    s = gaps[:, 36:][:, ::-1]
    by = dict(zip(AUXILIARY, got.T, strict=True))
    np.testing.assert_allclose(by["mean"], s.mean(1) - 1, atol=1e-5)
    np.testing.assert_allclose(by["max_step"], np.abs(np.diff(s)).max(1), rtol=1e-5)
    np.testing.assert_allclose(by["energy"], (np.diff(s, n=2) ** 2).mean(1), rtol=1e-4)
    np.testing.assert_allclose(
        by["halves"], np.abs(s[:, :32].mean(1) - s[:, 32:].mean(1)), rtol=1e-3, atol=1e-5
    )
    assert (by["entropy"] > 0).all() and (by["entropy"] < np.log(16)).all()


@pytest.mark.parametrize("assignment", ["mean", "diagonal"])
def test_a_perfect_reader_has_no_error(assignment):
    slots = jax.random.normal(jax.random.key(0), (2, 1, 8, 5))
    kernel = jax.random.normal(jax.random.key(1), (5, 8))
    readers = {"kernel": kernel, "bias": jnp.ones(8)}
    read = slots.mean(2) @ kernel if assignment == "mean" else jnp.einsum(
        "bckw,wk->bck", slots, kernel
    )
    memory = MemoryConfig(kind="postfix", slots=8, assignment=assignment)
    assert float(losses.auxiliary_errors(slots, read + 1, readers, memory).max()) < 1e-9
    assert float(losses.auxiliary_errors(slots, read, readers, memory).min()) > 0.9


def test_scores_of_the_truth_and_of_a_liar():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=4000)
    from scipy.stats import norm

    def summary(sigma):
        nll, pit = -norm.logpdf(truth, 0, sigma), norm.cdf(truth, 0, sigma)
        return scores.summary(nll, None, np.zeros(4000), pit, truth)

    right, narrow = summary(1.0), summary(0.5)
    assert right["pit.ks_p"] > 0.01 > narrow["pit.ks_p"]
    assert right["coverage.80"] == pytest.approx(0.8, abs=0.03)
    assert narrow["coverage.80"] < 0.6
    assert narrow["coverage.80.conformal"] == pytest.approx(0.8, abs=0.03)
    low, high = right["nll.last.ci95"]
    assert low < 0.5 * np.log(2 * np.pi * np.e) < high


def test_seeds_are_averaged():
    rows = [{"nll.last": 1.0, "rmse": 0.1, "x": [1]}, {"nll.last": 3.0, "rmse": 0.3, "x": [2]}]
    got = scores.over_seeds(rows)
    assert got["nll.last"] == 2.0 and got["nll.last.seed1"] == 3.0 and got["x"] == [1]
    assert got["nll.last.std"] == pytest.approx(2**0.5)


def test_rollout_statistics_know_rigid_from_random():
    rng = np.random.default_rng(0)
    even, random = np.ones((20, 300)), rng.exponential(size=(20, 300))
    assert rollout.number_variance(even + 1e-6, 5) < 0.3
    assert rollout.number_variance(random, 5) == pytest.approx(5, rel=0.3)
    edges = np.linspace(0, 3, 13)
    np.testing.assert_allclose(rollout.pair_correlation(random, edges), 1, atol=0.25)
    t = np.arange(300)
    wave = 1 + 0.1 * np.diff(np.cos(np.log(3) * 2 * np.pi * np.arange(301) / 12.0))
    height = np.full(1, 12.0)
    powers = [rollout.line_power(wave[None, t], height, q) for q in (2.0, 3.0, 5.0)]
    assert np.argmax(powers) == 1


def test_gradient_geometry():
    same = gradient_geometry(np.ones((4, 10)))
    assert same["slots.gradient_rank_ratio"] == pytest.approx(0.25, abs=1e-6)
    assert same["slots.gradient_correlation"] == pytest.approx(1)
    apart = gradient_geometry(np.eye(4, 10))
    assert apart["slots.gradient_rank_ratio"] == pytest.approx(1)
    assert apart["slots.gradient_correlation"] == pytest.approx(0)


def test_entropy_share():
    assert entropy_share(np.ones(5)) == pytest.approx(1)
    assert entropy_share(np.asarray([1.0, 0, 0])) == pytest.approx(0, abs=1e-6)
