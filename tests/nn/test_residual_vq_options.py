"""Every option of the residual quantiser, and the quantisers that can stand in its place."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax import ResidualVQ
from latent_jax.core.config import parse
from latent_jax.core.errors import ConfigError
from latent_jax.nn.vq_config import QuantizerConfig, Ramp
from latent_jax.ops import rvq, vq
from tests.nn.quantising import RANDOM, X, call, config, decode, loss_gradient, make, moved


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
