"""Residual quantisation against a loop in numpy, beam search against exhaustion, codec, metrics."""

from __future__ import annotations

import doctest
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_jax.core.errors import ConfigError
from latent_jax.ops import digits, rvq, rvq_search, vq, vq_losses, vq_metrics

RNG = np.random.default_rng(0)
N, D, K, S = 24, 3, 5, 3
X = RNG.normal(size=(N, D)).astype(np.float32)
CODE = (RNG.normal(size=(S, K, D)) * [[[1.0]], [[0.5]], [[0.25]]]).astype(np.float32)
KEEP = np.arange(N) < 20


JOINT = jax.jit(vq_metrics.joint_perplexity)
RUN = jax.jit(rvq.run, static_argnames=("cosine", "chunk", "collect", "matmul"))
BEAM = jax.jit(rvq_search.beam, static_argnums=3, static_argnames=("chunk",))
DECODE = jax.jit(rvq.decode)


def stages(code=CODE, ready=True):
    norm = jnp.sum(jnp.asarray(code) ** 2, -1)
    return rvq.Stages(jnp.asarray(code), vq.bias_of(norm), jnp.full(len(code), ready))


def loop(x, code, depth):
    """Greedy residual quantisation, row by row."""
    indices, residual = np.full((len(x), len(code)), -1), x.copy()
    for n in range(len(x)):
        for s in range(depth[n]):
            indices[n, s] = ((residual[n] - code[s]) ** 2).sum(-1).argmin()
            residual[n] -= code[s][indices[n, s]]
    return indices, x - residual


def test_one_pass_against_a_loop_with_padding_and_depth():
    depth = np.where(KEEP, RNG.integers(1, S + 1, N), 0)
    padded = np.where(KEEP[:, None], X, 0.0)
    rows = jnp.asarray([[0, 1]] * S)
    found = RUN(padded, stages(), KEEP, depth=jnp.asarray(depth), rows=rows)
    indices, quantised = loop(padded, CODE, depth)
    np.testing.assert_array_equal(found.indices, indices)
    np.testing.assert_allclose(found.quantised, quantised, atol=1e-6)
    np.testing.assert_allclose(found.gap, padded - quantised, atol=1e-6)
    np.testing.assert_array_equal(DECODE(found.indices, stages().code), found.quantised)
    for s in range(S):
        before = padded - loop(padded, CODE[:s], np.minimum(depth, s))[1]
        np.testing.assert_allclose(found.candidates[s], before[:2], atol=1e-6)
        for k in range(K):
            chosen = indices[:, s] == k
            assert found.count[s, k] == chosen.sum()
            np.testing.assert_allclose(found.total[s, k], before[chosen].sum(0), atol=1e-5)
        after = padded - loop(padded, CODE[: s + 1], np.minimum(depth, s + 1))[1]
        np.testing.assert_allclose(found.distortion[s], (after**2).sum(), rtol=1e-4)
        on = indices[:, s] >= 0
        np.testing.assert_allclose(found.error[s], (after[on] ** 2).sum(), rtol=1e-4)


def test_stages_that_are_not_ready_are_skipped():
    table = stages()._replace(ready=jnp.asarray([True, False, False]))
    found = RUN(X, table, jnp.ones(N, bool))
    assert (found.indices[:, 1:] == -1).all() and (found.indices[:, 0] >= 0).all()
    np.testing.assert_array_equal(found.quantised, CODE[0][found.indices[:, 0]])


@pytest.mark.parametrize("cosine", [False, True])
def test_pull_is_the_gradient_of_the_commitment(cosine):
    code = np.asarray(vq.unit(CODE)) if cosine else CODE
    table = rvq.Stages(
        jnp.asarray(code), vq.bias_of(jnp.sum(code**2, -1), None, cosine), jnp.ones(S, bool)
    )
    weights = jnp.asarray([1.0, 0.5, 2.0])
    found = RUN(X, table, jnp.ones(N, bool), cosine=cosine, weights=weights)

    def commitment(x):  # written out, with the indices as they are and the codes constant
        total, passed = 0.0, jnp.zeros_like(x)
        for s in range(S):
            seen = x - passed
            seen = vq.unit(seen) if cosine else seen
            used = table.code[s][found.indices[:, s]]
            total += weights[s] * jnp.sum((seen - used) ** 2)
            passed = passed + used
        return total

    np.testing.assert_allclose((weights * found.error).sum(), commitment(X), rtol=1e-5)
    np.testing.assert_allclose(found.pull, jax.jit(jax.grad(commitment))(X), rtol=1e-3, atol=1e-4)
    attached = jax.grad(lambda x: vq_losses.attach(found.error.sum(), x, found.pull))(X)
    np.testing.assert_array_equal(attached, found.pull)


def test_soft_codes_are_blended_by_their_weight():
    soft = rvq.Soft(jnp.float32(0.25), jnp.float32(1.0))
    one = stages(CODE[:1])
    found = RUN(X, one, jnp.ones(N, bool), soft=soft, key=jax.random.key(3))
    hard = CODE[0][np.asarray(found.indices[:, 0])]
    drawn = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), 0), 1)
    mixed = vq.soft_codes(X, one.code[0], one.bias[0], 1.0, drawn)
    np.testing.assert_allclose(found.quantised, 0.75 * hard + 0.25 * mixed, atol=1e-5)


def test_the_widest_beam_is_exhaustive_and_no_beam_is_worse_than_greedy():
    two = stages(CODE[:2])
    sums = {(a, b): CODE[0, a] + CODE[1, b] for a, b in itertools.product(range(K), repeat=2)}
    table = np.stack(list(sums.values()))
    best = ((X[:, None] - table) ** 2).sum(-1).argmin(-1)
    found = BEAM(X, two, KEEP, K)
    np.testing.assert_array_equal(found[:20], np.asarray(list(sums))[best][:20])
    assert (found[20:] == -1).all()
    greedy = RUN(X, stages(), jnp.ones(N, bool))
    np.testing.assert_array_equal(
        BEAM(X, stages(), jnp.ones(N, bool), 1), greedy.indices
    )
    wide = BEAM(X, stages(), jnp.ones(N, bool), 3, chunk=2)
    error = lambda i: np.sum((X - DECODE(i, stages().code)) ** 2, -1)  # noqa: E731
    assert error(wide).mean() < error(greedy.indices).mean()
    given = RUN(X, stages(), jnp.ones(N, bool), given=wide)
    np.testing.assert_array_equal(given.indices, wide)


def test_joint_statistics_lower_the_final_error():
    found = RUN(X, stages(), jnp.ones(N, bool))
    total = rvq.joint_statistics(found, stages().code)
    before = float((found.gap**2).sum())
    for s in range(S):  # one stage to its joint mean, the others fixed
        mean = total[s] / jnp.maximum(found.count[s], 1)[:, None]
        code = jnp.asarray(CODE).at[s].set(jnp.where(found.count[s][:, None] > 0, mean, CODE[s]))
        assert float(((X - DECODE(found.indices, code)) ** 2).sum()) < before


def test_depth_costs_no_program():
    def size(depth):
        code = jnp.zeros((depth, 64, 8))
        lowered = jax.jit(lambda x, t: rvq.run(x, t, jnp.ones(32, bool))[:7]).lower(
            jnp.zeros((32, 8)), stages(code)
        )
        return len(lowered.as_text().splitlines())

    assert size(8) <= size(2) * 1.05 and size(8) <= size(1) * 1.3


def test_usage_entropy_and_orthogonality_by_hand():
    # Two codes at equal distance of every row: the mean soft assignment is uniform.
    code = jnp.asarray([[[1.0, 0.0], [-1.0, 0.0]]])
    table = rvq.Stages(code, vq.bias_of(jnp.ones((1, 2))), jnp.ones(1, bool))
    x = jnp.asarray([[0.0, 1.0], [0.0, 2.0], [9.0, 9.0]])
    index = jnp.asarray([[0], [1], [-1]])
    measure = jax.jit(vq_losses.usage_entropy)
    entropy, rows = measure(x, table, index, 1.0)
    np.testing.assert_allclose(entropy, [np.log(2)], rtol=1e-6)
    assert rows == 2
    skew = x.at[:, 0].add(0.5)
    grad = jax.grad(lambda x: measure(x, table, index, 1.0)[0][0])(skew)
    assert (grad[:2, 0] < 0).all() and (grad[2] == 0).all()  # back towards balance
    live = jnp.ones((1, 2), bool)
    np.testing.assert_allclose(vq_losses.orthogonality(code, live), [0.5], atol=1e-6)
    square = jnp.eye(2)[None]
    np.testing.assert_allclose(vq_losses.orthogonality(square, live), [0.0], atol=1e-6)
    one = vq_losses.orthogonality(code, jnp.asarray([[True, False]]))
    np.testing.assert_allclose(one, [0.0], atol=1e-6)


def test_metrics_by_hand():
    indices = jnp.asarray([[0, 1], [0, 2], [1, 1], [1, 2], [-1, -1]])
    count = jax.jit(vq_metrics.histogram, static_argnums=1)(indices, 4)
    np.testing.assert_array_equal(count, [[2, 2, 0, 0], [0, 2, 2, 0]])
    figures = jax.jit(vq_metrics.usage)(count)
    np.testing.assert_allclose(figures["perplexity"], [2, 2], rtol=1e-6)
    np.testing.assert_allclose(figures["entropy_ratio"], [0.5, 0.5], rtol=1e-6)
    np.testing.assert_allclose(figures["dead"], [0.5, 0.5])
    np.testing.assert_allclose(JOINT(indices), 4, rtol=1e-5)
    same = jnp.asarray([[0, 1], [0, 1], [2, 3], [2, 3]])
    np.testing.assert_allclose(JOINT(same), 2, rtol=1e-5)


@settings(max_examples=10)
@given(st.integers(0, 1000))
def test_joint_perplexity_counts_whole_rows(seed):
    rows = np.random.default_rng(seed).integers(0, 3, (40, 4))
    share = np.unique(rows, axis=0, return_counts=True)[1] / 40
    expected = np.exp(-(share * np.log(share)).sum())
    np.testing.assert_allclose(JOINT(jnp.asarray(rows)), expected, rtol=1e-4)


def test_digits_put_stage_0_last_and_round_trip():
    assert int(digits.compose(np.asarray([1, 2, 3]), 10)) == 321
    rows = RNG.integers(0, 1024, (50, 3))
    np.testing.assert_array_equal(digits.decompose(digits.compose(rows, 1024), 1024, 3), rows)
    wide = RNG.integers(0, 1024, (50, 6))
    np.testing.assert_array_equal(
        digits.decompose_wide(digits.compose_wide(wide, 1024), 1024, 6), wide
    )
    top = np.full((1, 31), 1)
    assert int(digits.compose(top, 2)[0]) == 2**31 - 1  # the very last id


@given(st.integers(2, 40), st.integers(1, 6), st.integers(0, 2**31))
def test_the_wide_codec_is_exact(k, depth, seed):
    rows = np.random.default_rng(seed).integers(0, k, (7, depth))
    ids = digits.compose_wide(rows, k)
    np.testing.assert_array_equal(digits.decompose_wide(ids, k, depth), rows)
    assert ids.max() < k**depth


def test_overflow_and_padding_are_refused():
    with pytest.raises(ConfigError, match="4 digits of base 1024 do not compose into one int32"):
        digits.compose(np.zeros((1, 4), int), 1024)
    with pytest.raises(ConfigError, match="int64"):
        digits.compose_wide(np.zeros((1, 7), int), 1024)
    with pytest.raises(ConfigError, match=r"digit -1 is not in \[0, 8\)"):
        digits.compose(np.asarray([[1, -1]]), 8)
    with pytest.raises(ConfigError, match="digit 8"):
        digits.compose_wide(np.asarray([[1, 8]]), 8)
    with pytest.raises(ConfigError, match=r"codes in \[0, 64\)"):
        digits.decompose(np.asarray([64]), 8, 2)
    with pytest.raises(ConfigError, match="at least 1"):
        digits.check_fits(0, 2)


def test_special_ids_follow_the_codes():
    assert doctest.testmod(digits).failed == 0
    table = digits.Specials.composed(4, 2)
    named = [getattr(table, n) for n in table.names]
    assert named == list(range(16, 20)) and table.size == 20
    ids = np.asarray(digits.compose(np.asarray(list(itertools.product(range(4), repeat=2))), 4))
    assert not table.is_special(ids).any() and table.is_special(np.asarray(named)).all()
    with pytest.raises(AttributeError, match="no special id 'sep'"):
        table.sep  # noqa: B018
    with pytest.raises(ConfigError, match="overflow"):
        digits.Specials(2**31 - 2)
    with pytest.raises(ConfigError, match="int32"):
        digits.Specials.composed(2, 31)
