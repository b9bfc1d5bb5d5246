"""The residual quantiser as a module: gradients, what moves and what must not."""

from __future__ import annotations

import doctest

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax import ResidualVQ
from latent_jax.nn import residual_vq, vq_config
from latent_jax.nn.vq_config import ResetConfig, VQConfig
from tests.nn.quantising import X, call, config, decode, loss_gradient, make, moved


def test_examples_run():
    assert doctest.testmod(residual_vq).failed == 0
    assert doctest.testmod(vq_config).failed == 0


@pytest.mark.parametrize("stages", [1, 2, 4, 8])
def test_the_jacobian_is_the_identity_at_any_depth(stages):
    module, variables = make(stages)
    jac = jax.jit(jax.jacobian(lambda x: module.apply(variables, x[None], train=True).quantized[0]))
    np.testing.assert_array_equal(jac(X[0]), np.eye(4))


def test_commitment_reaches_the_input_from_every_stage():
    module, variables = make(3)
    out = call(module, variables, X)[0]
    code = np.asarray(variables["codebook"]["code"][0])
    passed, expected, loss = np.zeros_like(X), np.zeros_like(X), 0.0
    for s in range(3):
        passed = passed + code[s][out.indices[:, s]]
        expected += 2 * (X - passed) / X.size
        loss += ((X - passed) ** 2).mean()
    np.testing.assert_allclose(out.losses["commitment"].value, loss, rtol=1e-5)
    np.testing.assert_allclose(out.loss, 0.25 * loss, rtol=1e-5)  # the default weight
    grad = loss_gradient(module, variables, X, "commitment")[1][1]
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-6)
    weighted = ResidualVQ(4, 8, 3, config(stage_weights=(0.0, 0.0, 1.0)))
    last = loss_gradient(weighted, variables, X, "commitment")[0]
    np.testing.assert_allclose(last, ((X - passed) ** 2).mean(), rtol=1e-5)


def test_the_fresh_codebook_has_sizes_of_one_beside_sums_equal_to_the_codes():
    _, variables = make()
    book = variables["codebook"]
    np.testing.assert_array_equal(book["size"], np.ones((1, 2, 8)))
    np.testing.assert_array_equal(book["total"], book["code"])
    assert all(leaf.dtype in (jnp.float32, jnp.int32, jnp.bool_) for leaf in jax.tree.leaves(book))


def test_norms_and_usage_stay_put_at_the_first_step():
    """From sizes of 0 the codes' lengths explode at step 1 and use falls to one code."""
    module, variables = make(codes=8)
    for _ in range(3):
        out, new = call(module, variables, X)
        before = np.linalg.norm(variables["codebook"]["code"], axis=-1).max()
        assert np.linalg.norm(new["codebook"]["code"], axis=-1).max() < 3 * before
        variables = new
    assert (out.metrics["perplexity"] > 3).all()


def test_evaluation_and_frozen_training_change_no_bit():
    module, variables = make()
    for kw in ({"train": False}, {"frozen": True}):
        out, new = call(module, variables, X, **kw)
        chex.assert_trees_all_equal(new["codebook"], variables["codebook"])
    out, new = call(module, variables, X)
    assert moved(new["codebook"], variables["codebook"])
    np.testing.assert_allclose(
        new["codebook"]["norm"], (np.asarray(new["codebook"]["code"]) ** 2).sum(-1), rtol=1e-5
    )
    fixed = jax.jit(lambda v, x: module.apply(v, x, train=True))  # an immutable collection
    untouched = fixed(variables, X)
    np.testing.assert_array_equal(untouched.indices, out.indices)
    decoded = decode(module, variables, out.indices)
    np.testing.assert_array_equal(decoded, out.quantized)


def test_padding_enters_nothing():
    module, variables = make()
    mask = jnp.arange(64) < 40
    padded = jnp.where(mask[:, None], X, jnp.nan)
    out, new = call(module, variables, padded, mask)
    short, expected = call(module, variables, X[:40])
    assert (out.indices[40:] == -1).all() and (out.quantized[40:] == 0).all()
    np.testing.assert_array_equal(out.indices[:40], short.indices)
    chex.assert_trees_all_close(new, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(
        (out.loss, out.losses, out.metrics), (short.loss, short.losses, short.metrics), rtol=1e-5
    )
    grad = jax.jit(jax.grad(lambda x: module.apply(variables, x, mask, train=True).loss))(padded)
    assert np.isfinite(grad).all() and (grad[40:] == 0).all()
    _, empty = call(module, variables, padded, jnp.zeros(64, bool))
    step = empty["codebook"].pop("step")
    rest = {k: v for k, v in variables["codebook"].items() if k != "step"}
    chex.assert_trees_all_equal(empty["codebook"], rest)
    assert step == 1


@pytest.mark.parametrize("init", ["kmeans", "data"])
def test_codes_from_data_one_stage_per_step(init):
    module, variables = make(3, init=init, kmeans_iters=4)
    out = call(module, variables, X, train=False)[0]
    assert (out.indices == -1).all() and (out.quantized == 0).all()
    error = []
    for t in range(3):
        out, variables = call(module, variables, X)
        np.testing.assert_array_equal(variables["codebook"]["ready"], [np.arange(3) <= t])
        assert (out.indices[:, : t + 1] >= 0).all() and (out.indices[:, t + 1 :] == -1).all()
        error.append(float(out.metrics["error"].value[-1]))
    assert error[0] > 1.5 * error[1] > 1.5 * error[2]
    assert (out.metrics["dead"] == 0).all()


def test_gradient_codebooks_move_by_gradient_alone():
    module, variables = make(2, learn="gradient")
    assert set(variables["codebook"]) == {"offset", "usage", "stale", "resets", "ready", "step"}
    out, new = call(module, variables, X)
    np.testing.assert_array_equal(new["codebook"]["offset"], 0.0)

    grad = loss_gradient(module, variables, X, "codebook")[1][0]["codebook"][0]
    code = np.asarray(variables["params"]["codebook"][0])
    residual = np.asarray(X)
    for s in range(2):
        index = np.asarray(out.indices[:, s])
        for k in range(8):
            chosen = residual[index == k]
            expected = 2 * (len(chosen) * code[s, k] - chosen.sum(0)) / X.size
            np.testing.assert_allclose(grad[s, k], expected, rtol=1e-3, atol=1e-5)
        residual = residual - code[s][index]
    ema, state = make(2)
    assert "params" not in state and "codebook" not in call(ema, state, X)[0].losses
    # The straight-through output holds no gradient for the codes.
    through = jax.jit(jax.grad(
        lambda p: module.apply({**variables, "params": p}, X, train=True).quantized.sum()
    ))(variables["params"])  # fmt: skip
    assert (through["codebook"] == 0).all()


@pytest.mark.parametrize("learn", ["ema", "gradient"])
def test_dead_codes_restart_from_residuals_at_most_a_share_at_once(learn):
    reset = ResetConfig(fraction=0.5, stale=2, share=0.25, every=1, protect=1)
    module, variables = make(1, codes=8, learn=learn, reset=reset)
    where = "offset" if learn == "gradient" else "code"
    far = dict(variables["codebook"])
    far[where] = far[where].at[:, :, :6].add(100.0)  # six codes that nothing will choose
    if learn == "ema":
        far |= {"norm": (far["code"] ** 2).sum(-1), "total": far["code"]}
    variables = {**variables, "codebook": far}
    read = jax.jit(lambda v: module.apply(v, method="codebooks")[0, 0])
    module_codes = lambda v: np.asarray(read(v))  # noqa: E731
    near = []
    for _ in range(24):
        out, new = call(module, variables, X)
        variables = {**variables, **new}
        near.append(int((np.abs(module_codes(variables)).max(-1) < 50).sum()))
    jumps = np.diff([2, *near])
    assert jumps.max() <= 2 and near[-1] == 7  # the protected one stays lost
    assert int(out.metrics["resets"][0]) == 5
    assert np.abs(module_codes(variables)[0]).max() > 50


def test_half_precision_in_and_out_with_fp32_statistics():
    module, variables = make()
    out, new = call(module, variables, X.astype(jnp.bfloat16))
    assert out.quantized.dtype == jnp.bfloat16 and out.loss.dtype == jnp.float32
    assert new["codebook"]["code"].dtype == jnp.float32


def test_it_learns():
    module = ResidualVQ(4, 16, 2, VQConfig())
    variables = jax.jit(module.init)(jax.random.key(0), X)
    x = jax.random.normal(jax.random.key(3), (256, 4))
    for _ in range(20):
        out, variables = call(module, variables, x)
    # 2 bits per dimension; random codebooks of this size leave about half.
    assert float(out.metrics["quantisation_error"].value) < 0.2
    assert (out.metrics["entropy_ratio"] > 0.9).all() and (out.metrics["dead"] == 0).all()
