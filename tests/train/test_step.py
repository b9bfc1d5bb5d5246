from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax.core import trees
from latent_jax.core.errors import ConfigError
from latent_jax.train.config import GroupConfig, OptimizerConfig
from latent_jax.train.curriculum import init_gates
from latent_jax.train.optimizers import GroupedOptimizer
from latent_jax.train.state import create_state
from latent_jax.train.step import make_train_step
from latent_jax.train.testing import ToySystem


def build(system=None, optimizer=None, total=100, **kw):
    system = system or ToySystem()
    cfg = optimizer or OptimizerConfig(lr=0.02)
    data = system.train_data("main", None)
    batch = next(data)
    tx = GroupedOptimizer.create(cfg, system.param_labels(None), total)

    @jax.jit
    def create(key):
        variables = system.init({"params": key}, batch)
        return create_state(variables, tx.init(variables["params"]), init_gates(system.weights))

    state = create(jax.random.key(0))
    return system, tx, state, make_train_step(system, tx, seed=0, **kw), batch, data


def host(tree):
    return jax.tree.map(np.array, tree)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_metrics_and_movement():
    system, _, state, step, batch, _ = build()
    before = host(state)
    state, metrics = step(state, system.frozen, batch)
    m = {k: float(v) for k, v in metrics.items()}
    assert m["loss"] == pytest.approx(m["term.mse"] + 0.01 * m["term.l2"], rel=1e-5)
    assert m["share.mse"] + m["share.l2"] == pytest.approx(1.0, rel=1e-5)
    assert "weight.watched" not in m and "term.watched" in m
    norm = np.hypot(m["grad_norm.body"], m["grad_norm.head"])
    assert m["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert not np.allclose(before.params["out"]["kernel"], state.params["out"]["kernel"])
    assert not np.allclose(before.collections["stats"]["mean"], state.collections["stats"]["mean"])
    assert int(state.step) == 1


def test_frozen_leaf_and_frozen_argument_stay_bit_for_bit():
    opt = OptimizerConfig(lr=0.1, weight_decay=0.5)
    system, _, state, step, batch, data = build(optimizer=opt)
    fixed, mix = host(state.params["fixed"]), host(system.frozen)
    for _ in range(3):
        state, _ = step(state, system.frozen, next(data))
    equal(fixed, state.params["fixed"])
    equal(mix, system.frozen)  # also proves that it was not donated
    assert not any("fixed" in path for path in trees.paths(state.opt_state))


def test_first_adam_step_is_lr_times_sign_and_decay_skips_bias():
    opt = OptimizerConfig(lr=0.1, decay="constant", weight_decay=0.5, clip_norm=None, eps=1e-12)
    system, _, state, step, batch, _ = build(optimizer=opt)
    before = host(state.params)
    state, _ = step(state, system.frozen, batch)
    after = host(state.params)
    moved = after["hidden"]["bias"] - before["hidden"]["bias"]
    np.testing.assert_allclose(np.abs(moved), 0.1, rtol=1e-4)
    w = before["hidden"]["kernel"]
    moved = after["hidden"]["kernel"] - w + 0.1 * 0.5 * w
    np.testing.assert_allclose(np.abs(moved), 0.1, rtol=1e-3)


def test_groups_scale_the_rate_and_unknown_groups_are_refused():
    opt = OptimizerConfig(lr=0.1, decay="constant", clip_norm=None,
                          groups={"head": GroupConfig(lr_scale=0.0)})
    system, _, state, step, batch, _ = build(optimizer=opt)
    before = host(state.params)
    state, m = step(state, system.frozen, batch)
    equal(before["out"], state.params["out"])
    assert float(m["lr.head"]) == 0.0 and float(m["lr.body"]) == pytest.approx(0.1)
    with pytest.raises(ConfigError, match="nobody"):
        build(optimizer=OptimizerConfig(groups={"nobody": GroupConfig()}))


@pytest.mark.parametrize("kind", ["adamw", "lion", "sgd", "adafactor"])
def test_every_optimizer_lowers_the_loss(kind):
    lr = {"sgd": 0.05, "lion": 0.005}.get(kind, 0.02)
    system, _, state, step, _, data = build(optimizer=OptimizerConfig(kind=kind, lr=lr))
    losses = []
    for _ in range(40):
        state, m = step(state, system.frozen, next(data))
        losses.append(float(m["loss"]))
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


def test_clipping_is_over_the_trained_part_only():
    opt = OptimizerConfig(kind="sgd", b1=0.0, lr=1.0, decay="constant", clip_norm=0.01)
    system, _, state, step, batch, _ = build(optimizer=opt, active=("head",))
    before = host(state.params)
    state, m = step(state, system.frozen, batch)
    change = np.linalg.norm(np.asarray(state.params["out"]["kernel"]) - before["out"]["kernel"])
    assert change == pytest.approx(0.01, rel=1e-3)
    equal(before["hidden"], state.params["hidden"])  # not active in this phase
    assert "grad_norm.body" not in m


def test_accumulation_equals_the_whole_batch():
    results = []
    for n in (1, 2, 4):
        opt = OptimizerConfig(kind="sgd", b1=0.0, lr=0.5, decay="constant", clip_norm=None)
        system, _, state, step, batch, _ = build(ToySystem(noise=0.0), opt, accumulate=n)
        # the mask is ragged over micro-batches: that is the point
        state, m = step(state, system.frozen, batch)
        results.append((host(state.params), {k: float(v) for k, v in m.items()}))
    for params, metrics in results[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6),
                     results[0][0], params)
        assert metrics["loss"] == pytest.approx(results[0][1]["loss"], rel=1e-5)
        assert metrics["term.mse"] == pytest.approx(results[0][1]["term.mse"], rel=1e-5)


def test_non_finite_step_keeps_everything_but_the_counters():
    system, _, state, step, batch, data = build()
    state, _ = step(state, system.frozen, batch)
    before = host(state)
    bad = {**batch, "x": np.full_like(batch["x"], np.nan)}
    state, m = step(state, system.frozen, bad)
    assert float(m["skipped"]) == 1.0 and int(state.step) == 2
    for name in ("params", "collections", "opt_state", "gates"):
        equal(getattr(before, name), getattr(state, name))
    assert int(state.guard["in_a_row"]) == 1
    state, m = step(state, system.frozen, next(data))
    assert int(state.guard["in_a_row"]) == 0 and int(state.guard["skipped"]) == 1


def test_step_compiles_once_and_is_deterministic():
    system, _, state, step, batch, data = build()
    for _ in range(4):
        state, _ = step(state, system.frozen, next(data))
    assert step._cache_size() == 1
    system2, _, again, step2, _, data = build()
    for _ in range(4):
        again, _ = step2(again, system2.frozen, next(data))
    equal(host(state), host(again))


def test_no_weighted_term_is_one_clear_error():
    system, _, state, step, batch, _ = build(ToySystem(weights={"nothing": 1.0}))
    with pytest.raises(ConfigError, match="none of the loss terms.*mse.*nothing"):
        step(state, system.frozen, batch)


def test_a_switched_off_term_that_is_inf_does_not_stop_training():
    class Bad(ToySystem):
        def loss_terms(self, *a):
            terms, c, aux = super().loss_terms(*a)
            terms["l2"] = terms["l2"]._replace(sum=jnp.inf)
            return terms, c, aux

    system, _, state, step, batch, _ = build(Bad(weights={"mse": 1.0, "l2": 0.0}))
    _, m = step(state, system.frozen, batch)
    assert float(m["skipped"]) == 0.0
