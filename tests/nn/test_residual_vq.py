"""The residual quantiser as a module: gradients, what moves and what must not, every option."""

from __future__ import annotations

import dataclasses
import doctest
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax import ResidualVQ
from latent_jax.core.config import parse
from latent_jax.core.errors import ConfigError
from latent_jax.nn import residual_vq, vq_config
from latent_jax.nn.vq_config import QuantizerConfig, Ramp, ResetConfig, VQConfig
from latent_jax.ops import rvq, vq

X = jax.random.normal(jax.random.key(7), (64, 4))
RANDOM = VQConfig(init="random", reset=ResetConfig(fraction=0.0))


def config(**kw):
    return dataclasses.replace(RANDOM, **kw)


@functools.partial(jax.jit, static_argnums=(0,), static_argnames=("train", "frozen"))
def call(module, variables, x, mask=None, train=True, frozen=False, step=None):
    return module.apply(
        variables, x, mask, train=train, frozen=frozen, step=step, mutable=["codebook"]
    )


@functools.partial(jax.jit, static_argnums=(0,))
def decode(module, variables, indices):
    return module.apply(variables, indices, method="decode")


@functools.partial(jax.jit, static_argnums=(0, 3))
def loss_gradient(module, variables, x, name):
    """Gradients of one loss in the parameters and in the input."""

    def loss(params, x):
        out = module.apply({**variables, "params": params}, x, train=True)
        return out.losses[name].value

    return jax.value_and_grad(loss, (0, 1))(variables.get("params", {}), x)


def make(stages=2, codes=8, **kw):
    module = ResidualVQ(4, codes, stages, config(**kw))
    return module, jax.jit(module.init)(jax.random.key(0), X)


def moved(a, b):
    return any(not np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


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


def test_schedules():
    ramp = Ramp(1.0, start=0.0, begin=10, steps=0)
    module, variables = make(2, ema=ramp, bypass=Ramp(0.0, start=1.0, begin=10))
    out, new = call(module, variables, X, step=5)
    np.testing.assert_allclose(out.quantized, X, atol=1e-5)  # bypassed, and the codes held still
    for name in ("code", "size", "total", "norm"):
        np.testing.assert_array_equal(new["codebook"][name], variables["codebook"][name])
    assert moved(new["codebook"]["usage"], variables["codebook"]["usage"])
    out, new = call(module, variables, X, step=10)
    decoded = decode(module, variables, out.indices)
    np.testing.assert_array_equal(out.quantized, decoded)
    assert moved(new["codebook"]["code"], variables["codebook"]["code"])
    low = make(2, commitment=Ramp(1.0, start=0.1, begin=0, steps=10))[0]
    losses = [float(call(low, variables, X, step=t)[0].loss) for t in (0, 5, 10)]
    assert losses[2] > 0.1
    np.testing.assert_allclose(losses, losses[2] * np.asarray([0.1, 0.55, 1.0]), rtol=1e-5)


def test_the_modules_own_count_drives_the_schedules():
    module, variables = make(1, ema=Ramp(1.0, start=0.0, begin=2))
    changed = []
    for _ in range(4):
        _, new = call(module, variables, X)
        changed.append(moved(new["codebook"]["code"], variables["codebook"]["code"]))
        variables = new
    assert changed == [False, False, True, True]


def test_soft_and_sampled_codes_end_hard():
    hard = call(*make(2), X)[0]
    kw = {"soft": Ramp(0.0, start=1.0, begin=5), "temperature": Ramp(0.0, start=3.0, begin=5)}
    for name, ramp in kw.items():
        module, variables = make(2, **{name: ramp})
        early, late = (call(module, variables, X, step=t)[0] for t in (0, 5))
        assert moved(early.quantized, hard.quantized), name
        np.testing.assert_array_equal(late.indices, hard.indices)
        evaluated = call(module, variables, X, train=False, step=0)[0]
        np.testing.assert_array_equal(evaluated.indices, hard.indices)


def test_quantise_dropout_cuts_the_tail_in_training_only():
    module, variables = make(4, dropout=1.0, dropout_keep=2)
    out, _ = call(module, variables, X)
    on = np.asarray(out.indices) >= 0
    assert (on[:, :2]).all() and (np.diff(on.astype(int), axis=1) <= 0).all()
    assert len(np.unique(on.sum(-1))) == 3
    assert (np.asarray(call(module, variables, X, train=False)[0].indices) >= 0).all()
    decoded = decode(module, variables, out.indices)
    np.testing.assert_array_equal(decoded, out.quantized)


def test_entropy_bonus_and_orthogonality_have_their_gradients():
    module, variables = make(2, learn="gradient", entropy=Ramp(0.1), orthogonality=Ramp(0.1))

    for name, of_x in (("entropy", True), ("orthogonality", False)):
        value, (params, x) = loss_gradient(module, variables, X, name)
        assert jnp.abs(params["codebook"]).max() > 0 and bool(jnp.abs(x).max() > 0) == of_x
        assert -1 <= value < 0 if of_x else 0 < value < 1


def test_groups_are_quantisers_of_their_own():
    module, variables = make(2, groups=2)
    out, new = call(module, variables, X)
    assert out.indices.shape == (64, 4) and variables["codebook"]["code"].shape == (2, 2, 8, 2)
    for g in range(2):
        one = ResidualVQ(2, 8, 2, RANDOM)
        pick = lambda tree, g=g: jax.tree.map(  # noqa: E731
            lambda a: a[g : g + 1] if jnp.ndim(a) else a, tree
        )
        alone, expected = call(one, pick(variables), X[:, 2 * g : 2 * g + 2])
        np.testing.assert_array_equal(out.indices[:, 2 * g : 2 * g + 2], alone.indices)
        chex.assert_trees_all_close(pick(new), expected, rtol=1e-5, atol=1e-6)
    decoded = decode(module, variables, out.indices)
    np.testing.assert_array_equal(decoded, out.quantized)


def test_a_shared_codebook_is_one_and_learns_from_all_stages():
    module, variables = make(3, shared=True)
    assert variables["codebook"]["code"].shape == (1, 1, 8, 4)
    out, new = call(module, variables, X)
    count = np.asarray(out.metrics["usage"]).sum(0)
    np.testing.assert_allclose(new["codebook"]["size"][0, 0], 0.95 + 0.05 * count, rtol=1e-5)
    assert module.apply(variables, method="codebooks").shape == (1, 3, 8, 4)


def test_stages_of_different_sizes():
    module, variables = make(3, codes=(8, 4, 2))
    for _ in range(3):
        out, variables = call(module, variables, X)
    assert [int(out.indices[:, s].max()) < n for s, n in enumerate((8, 4, 2))] == [True] * 3
    book = variables["codebook"]
    assert (book["code"][0, 2, 2:] == 0).all() and (book["size"][0, 1, 4:] == 0).all()
    assert (out.metrics["perplexity"] <= np.asarray([8, 4, 2]) + 1e-4).all()


def test_projected_codes():
    module, variables = make(2, code_dim=3)
    out, _ = call(module, variables, X)
    assert out.quantized.shape == X.shape and variables["codebook"]["code"].shape[-1] == 3
    decoded = decode(module, variables, out.indices)
    np.testing.assert_allclose(decoded, out.quantized, atol=1e-6)


def test_beams_in_training_and_evaluation_are_separate():
    greedy, variables = make(3)
    module = ResidualVQ(4, 8, 3, config(beam=1, eval_beam=4))
    error = lambda o: float(o.metrics["quantisation_error"].value)  # noqa: E731
    plain = call(greedy, variables, X)[0]
    np.testing.assert_array_equal(call(module, variables, X)[0].indices, plain.indices)
    assert error(call(module, variables, X, train=False)[0]) < error(plain)
    trained = call(ResidualVQ(4, 8, 3, config(beam=4)), variables, X)[0]
    np.testing.assert_array_equal(
        trained.indices, call(module, variables, X, train=False)[0].indices
    )


def test_joint_targets_lower_the_error_of_fixed_assignments():
    module, variables = make(2, target="joint", decay=0.99)
    out, new = call(module, variables, X)
    before, after = (
        ((X - rvq.decode(out.indices, v["codebook"]["code"][0])) ** 2).mean()
        for v in (variables, new)
    )
    assert after < 0.99 * before


def test_cosine_codes_have_unit_length():
    module, variables = make(2, distance="cosine")
    out, new = call(module, variables, X)
    np.testing.assert_allclose(np.linalg.norm(new["codebook"]["code"], axis=-1), 1, rtol=1e-5)
    unit = np.asarray(vq.unit(X)) @ np.asarray(variables["codebook"]["code"][0, 0]).T
    np.testing.assert_array_equal(out.indices[:, 0], unit.argmax(-1))


def test_the_rotation_trick_turns_the_gradient_once():
    module, variables = make(3, rotation=True)
    jac = jax.jit(jax.jacobian(lambda x: module.apply(variables, x[None]).quantized[0]))(X[0])
    q = call(module, variables, X[:1], train=False)[0].quantized[0]
    ratio = float(jnp.linalg.norm(q) / jnp.linalg.norm(X[0]))
    np.testing.assert_allclose(jac @ jac.T, ratio**2 * np.eye(4), atol=1e-5)


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


@pytest.mark.parametrize("kind", ["rvq", "fsq", "lfq"])
def test_the_alternatives_share_the_interface(kind):
    tree = {"kind": kind, "codes": 8, "stages": 2, "bits": 5, "vq": {"init": "random"}}
    module = parse(QuantizerConfig, tree).make(4)
    variables = jax.jit(module.init)(jax.random.key(0), X)
    mask = jnp.arange(64) < 50
    out, _ = call(module, variables, jnp.where(mask[:, None], X, jnp.nan), mask)
    assert out.quantized.shape == X.shape and out.indices.shape == (64, module.digits)
    assert (out.indices[50:] == -1).all() and (out.quantized[50:] == 0).all()
    assert np.isfinite(out.loss) and out.metrics["joint_perplexity"] > 2
    short = call(module, variables, X[:50])[0]
    np.testing.assert_array_equal(out.indices[:50], short.indices)
    chex.assert_trees_all_close(out.losses, short.losses, rtol=1e-4)
    decoded = decode(module, variables, out.indices[:50])
    np.testing.assert_allclose(decoded, out.quantized[:50], atol=1e-5)
    chex.assert_trees_all_equal(out.metrics["usage"].sum(-1), jnp.full(2, 50.0))


@pytest.mark.parametrize("make,message", [
    (lambda: ResidualVQ(4, 8, 0).init(jax.random.key(0), X), "stages=0"),
    (lambda: ResidualVQ(5, 8, 2).init(jax.random.key(0), X), "width 4, dim is 5"),
    (lambda: ResidualVQ(4, (8, 4), 3).init(jax.random.key(0), X), "3 stages, but codes="),
    (lambda: ResidualVQ(4, 8, 2, config(groups=3)).init(jax.random.key(0), X), "groups=3"),
    (lambda: ResidualVQ(4, 8, 2, config(beam=9)).init(jax.random.key(0), X), "beam=9 is wider"),
    (lambda: ResidualVQ(4, (8, 4), 2, config(shared=True)).init(jax.random.key(0), X), "shared"),
    (lambda: ResidualVQ(4, 8, 2, config(stage_weights=(1.0,))).init(jax.random.key(0), X), "1 sta"),
    (lambda: ResidualVQ(4, 8, 2).init(jax.random.key(0), X, jnp.ones(3, bool)), r"mask \(3,\)"),
    (lambda: make()[0].apply(make()[1], jnp.zeros((2, 3), int), method="decode"), "3 digits"),
    (lambda: config(orthogonality=Ramp(1.0)), "orthogonality has no gradient"),
    (lambda: config(learn="gradient", target="joint"), "needs learn=ema"),
    (lambda: config(beam=2, soft=Ramp(1.0)), "beam wider than 1"),
    (lambda: parse(QuantizerConfig, {"kind": "vq"}), "kind = 'vq'"),
    (lambda: parse(QuantizerConfig, {"vq": {"decay": 1.5}}), "vq.decay = 1.5"),
    (lambda: QuantizerConfig(kind="fsq", levels=(1,)).make(4).init(jax.random.key(0), X), "levels"),
    (lambda: QuantizerConfig(kind="lfq").make(5).init(jax.random.key(0), X), "dim is 5"),
])  # fmt: skip
def test_impossible_settings_say_so(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
