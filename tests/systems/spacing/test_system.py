"""Spacing through the shared trainer: learns, resumes nothing odd, evaluates, diagnoses."""

from __future__ import annotations

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import latent_jax
from latent_jax import run as runs
from latent_jax.core.errors import CheckpointError, ConfigError, DataError
from latent_jax.systems.spacing import predict, recipe
from latent_jax.train.checkpoints import load_variables

TINY = {
    "system": "spacing", "name": "t",
    "data": {"source": "ar:count=6000,seed=0", "window": 24},
    # one device: eight virtual ones only share these cores, and compile for longer
    "mesh": {"data": 1},
    "model": {
        "layers": 1, "heads": 2, "width": 16, "ff": 32,
        "embed": {"near": 6, "kernels": 4, "knots": 24},
    },
    "train": {
        "steps": 60, "batch_size": 32, "eval_every": 30, "log_every": 10,
        "log": {"tensorboard": False},
        "optimizer": {"lr": 0.01, "warmup_steps": 5, "clip_norm": None},
    },
    "eval": {"windows": 256, "quick": 64, "floors": False, "rollouts": 4, "horizon": 12},
}  # fmt: skip
# Gaussian innovations of standard deviation 0.2: no predictor can be better than this.
OPTIMUM = 0.5 * np.log(2 * np.pi * np.e * 0.04)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("spacing") / "run"
    tree = TINY | {"data": TINY["data"] | {"calibration": 0.1}}
    tree["eval"] = TINY["eval"] | {"calibration_targets": 400}
    return latent_jax.run(tree, out=str(out), seeds=2)


def test_it_reaches_the_known_optimum(done):
    # The data's own autoregression is the best there is; the model has to be near it from above.
    assert OPTIMUM - 0.05 < done["nll.last"] < OPTIMUM + 0.08
    assert done["nll.last"] == pytest.approx(np.mean([done[f"nll.last.seed{i}"] for i in (0, 1)]))
    assert abs(done["nll.last"] - done["baseline.ar8.nll"]) < 0.08
    assert done["nll.position_averaged"] < 0.2
    assert 0 < done["rollout.error.h10"] < 2
    assert not [k for k in done if "warped" in k], "there are no heights"
    # Sixty steps do not overfit 5000 gaps: a calibration has nothing to do, and does nothing.
    assert abs(done["calibrated.nll.last"] - done["uncalibrated.nll.last"]) < 0.02
    assert done["calibrated.pit.ks_p"] > 0.01


def test_it_starts_at_the_autoregression():
    # As many kernels as there are lengths of the past to fit.
    config = runs.resolve(TINY, {"seeds": 2, "model.embed.kernels": 10})
    system = runs.system_class("spacing")(config)
    params = system.init({"params": jax.random.key(0)}, {})["params"]
    forward = jax.jit(lambda tree, *inputs: system.model.apply({"params": tree}, *inputs).raw)
    for i in range(2):
        one = jax.tree.map(lambda x, i=i: x[i], params)["model"]
        one["head"] = jax.tree.map(jnp.zeros_like, one["head"])
        rows = system.gaps.windows(system.gaps.spread(400), 24)
        raw = forward(one, jnp.asarray(rows["gaps"][:, :-1]), jnp.asarray(rows["log_height"]))
        error = np.asarray(raw[:, 2:, 8]) - rows["gaps"][:, 3:]
        # phi = 0.5, -0.3 with innovations of 0.2, from two gaps on.
        assert error.std() == pytest.approx(0.2, rel=0.06)
        scale = np.exp(np.asarray(one["gaps"]["spread"]))
        np.testing.assert_allclose(scale[2:], 0.2, rtol=0.05)
        assert scale[0] > 0.21


def test_kernels_end_inside_the_window_at_every_height():
    # ln(t / 2 pi) is 1 at the first zero: its window is twelve times as long as the others.
    height = np.linspace(1.0, 12.0, 500).astype(np.float32) ** 0.1 * 12 ** 0.9
    starts = np.arange(480)
    held = dict(values=height, source=None, split=None, train=starts, validation=starts)
    near = recipe.Gaps(log_height=height, **held)
    ends = 2 * np.pi * 19 / height[:480]  # the farthest of the 19 gaps before a target
    assert near.reach(20) == pytest.approx(ends.min())
    far = recipe.Gaps(log_height=np.concatenate([[1.0], height[1:]]), **held)
    assert far.reach(20) == pytest.approx(near.reach(20))


def test_a_run_is_read_at_the_distances_that_it_was_trained_at(caplog):
    system = runs.system_class("spacing")(runs.resolve(TINY, {"seeds": 2}))
    variables = system.init({"params": jax.random.key(0)}, {})
    assert jax.tree.structure(system.init_shapes({})) == jax.tree.structure(variables)
    batch = {k: jnp.asarray(v) for k, v in next(iter(system.train_data("main", None))).items()}
    loss = jax.jit(lambda s, v: s(v, {}, batch, {"sample": jax.random.key(0)}, False)[2],
                   static_argnums=0)  # fmt: skip
    known = float(loss(system.loss_terms, variables)["nll_last"].value)
    # The same variables beside data whose heights give other distances.
    other = copy.copy(system)
    other.model = system.model.clone(reach=0.6 * system.model.reach, heights=(5.0, 0.1, 4.0, 6.0))
    assert float(loss(other.loss_terms, variables)["nll_last"].value) == pytest.approx(known)
    fresh = variables | {"distances": other._distances()}
    assert abs(float(loss(other.loss_terms, fresh)["nll_last"].value) - known) > 1e-3
    model = other.as_trained(variables).model
    assert (float(model.reach), float(model.heights[0])) == pytest.approx(
        (system.model.reach, system.model.heights[0])
    )
    assert "from less distance than was trained on" in caplog.text
    with pytest.raises(CheckpointError, match="lack the collection 'distances'.*run again"):
        system.evaluate({"params": variables["params"]}, {})


def test_training_windows_can_be_longer(tmp_path):
    tree = {**TINY, "data": {**TINY["data"], "train_window": 40}}
    with pytest.raises(ConfigError, match="attention_layers=0"):
        runs.resolve(tree)
    with pytest.raises(ConfigError, match="train_window=20 is below"):
        runs.resolve(TINY, {"data.train_window": 20})
    config = runs.resolve(tree, {"model.attention_layers": 0})
    system = runs.system_class("spacing")(config)
    assert next(iter(system.train_data("main", None)))["gaps"].shape == (32, 40)
    assert system.gaps.train.max() + 40 <= system.gaps.validation.min()


@pytest.mark.slow
def test_long_windows_give_the_densities_of_short_ones():
    tree = TINY | {"data": TINY["data"] | {"calibration": 0.1}}
    config = runs.resolve(tree, {"model.attention_layers": 0})
    system = runs.system_class("spacing")(config)
    params = system.init({"params": jax.random.key(0)}, {})["params"]
    made, truth = predict.densities(system.model, config, params, system.gaps, "calibration", 70)
    start = system.gaps.calibration[0]
    np.testing.assert_allclose(truth[:24], system.gaps.values[start + 23 : start + 47])
    rows = system.gaps.windows(np.arange(start, start + 24), 24)
    one = jax.tree.map(lambda x: x[0], params)["model"]
    raw = jax.jit(lambda *inputs: system.model.apply({"params": one}, *inputs).raw)(
        jnp.asarray(rows["gaps"][:, :-1]), jnp.asarray(rows["log_height"])
    )
    np.testing.assert_allclose(made.mean[0, :24], raw[:, -1, 8:16], atol=1e-4)


def test_seeds_differ(done):
    params = load_variables(done.out)[0]["params"]
    kernel = params["model"]["head"]["kernel"]
    assert kernel.shape[0] == 2
    assert float(jnp.abs(kernel[0] - kernel[1]).max()) > 1e-3


def test_seeds_do_not_touch_each_other(done):
    system, (variables, _) = done.system, load_variables(done.out)
    batch = {k: jnp.asarray(v) for k, v in next(iter(system.train_data("main", None))).items()}

    def loss(params, batch):
        terms, _, _ = system.loss_terms(
            variables | {"params": params}, {}, batch, {"sample": jax.random.key(0)}, True
        )
        return terms["nll"].sum

    gradient = jax.jit(jax.grad(loss))
    before = gradient(variables["params"], batch)
    half = batch["gaps"].shape[0] // 2
    other = gradient(variables["params"], batch | {"gaps": batch["gaps"].at[half:].add(0.5)})
    first = [np.asarray(x[0]) for x in jax.tree.leaves(before)]
    again = [np.asarray(x[0]) for x in jax.tree.leaves(other)]
    for a, b in zip(first, again, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert any(
        not np.allclose(x[1], y[1])
        for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(other), strict=True)
    )


@pytest.mark.slow
def test_what_slots_hold_starts_at_the_autoregression():
    memory = {"kind": "postfix", "slots": 3, "read": "claims", "pool": "sum"}
    tree = TINY | {"model": TINY["model"] | {"memory": memory}}
    config = runs.resolve(tree)
    system = runs.system_class("spacing")(config)
    params = system.init({"params": jax.random.key(0)}, {})["params"]
    one = jax.tree.map(lambda x: jnp.asarray(x[0]), params)["model"]
    one["head"] = jax.tree.map(jnp.zeros_like, one["head"])
    rows = system.gaps.windows(system.gaps.spread(400), 24)
    raw = jax.jit(lambda tree, *inputs: system.model.apply({"params": tree}, *inputs).raw)(
        one, jnp.asarray(rows["gaps"][:, :-1]), jnp.asarray(rows["log_height"])
    )
    error = np.asarray(raw[:, -1, 8]) - rows["gaps"][:, -1]
    assert error.std() == pytest.approx(0.2, rel=0.08)


def test_diagnosis_without_slots(done):
    system, variables = runs.load(done.out)
    found = system.diagnose(variables, {})
    assert found["findings"] == ["no slots: only the likelihood by height is diagnosed"]


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        pytest.param("prefix", {}, marks=pytest.mark.slow),
        ("postfix", {}),
        pytest.param(
            "postfix", {"read": "claims", "pool": "sum", "identity": "anonymous"},
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_diagnosis_of_slots(kind, how, tmp_path):
    memory = {"kind": kind, "slots": 3, "cuts": 4, **how}
    tree = {**TINY, "model": {**TINY["model"], "memory": memory}}
    tree["train"] = {**TINY["train"], "steps": 2, "eval_every": 0}
    config = runs.resolve(tree, {"out": str(tmp_path / "run")})
    system, state, _ = runs.train(config)
    found = system.diagnose(state.variables, {}, windows=64)
    deltas = [found[f"slots.ablation_delta.{i}"] for i in range(3)]
    assert np.isfinite(deltas).all()
    assert 0 < found["slots.gradient_rank_ratio"] <= 1
    assert found["findings"]
    assert ("slots.read_out" in found) == (kind == "postfix")
    if how:
        # Each holds a part of the least-squares prediction, and none is known by its place.
        assert min(deltas) > 0.005 and found["slots.permutation_increase.content"] < 1e-4
        assert found["attention.claims.centre_std_within"] > 0.5


def test_bad_input():
    with pytest.raises(ConfigError, match="seeds=3 must divide"):
        runs.resolve(TINY | {"seeds": 3})
    with pytest.raises(ConfigError, match="near=6"):
        runs.resolve(TINY, {"data.window": 6})
    many = {"seeds": 2, "train.accumulate": 2, "clip_norm": None}
    with pytest.raises(ConfigError, match="seeds=2 must divide .*=6 / train.accumulate=2"):
        runs.resolve(TINY, many | {"train.batch_size": 6})
    assert runs.resolve(TINY, many).train.accumulate == 2
    with pytest.raises(ConfigError, match="clip_norm=1.0 with train.accumulate=2 would clip"):
        runs.resolve(TINY, {"train.accumulate": 2})
    with pytest.raises(ConfigError, match="train.optimizer.clip_norm=0.5 with seeds=2 would"):
        runs.resolve(TINY, {"train.optimizer.clip_norm": 0.5, "seeds": 2})
    assert runs.resolve(TINY, {"train.optimizer.clip_norm": 0.5}).seeds == 1
    with pytest.raises(DataError, match="source 'nowhere'"):
        runs.system_class("spacing")(runs.resolve(TINY, {"data.source": "nowhere"}))


SLOTS = {"kind": "prefix", "slots": 2}
STAGED = {"kind": "staged", "stages": [{"begin": 0, "value": 0.1}]}


@pytest.mark.parametrize(
    ("window", "memory", "losses", "says"),
    [
        (80, {}, {"auxiliary": 0.1}, "losses.auxiliary is about slots"),
        (80, {}, {"auxiliary": STAGED}, "losses.auxiliary is about slots"),
        (80, {}, {"orthogonality": 0.1}, "losses.orthogonality is about slots"),
        (64, SLOTS, {"auxiliary": 0.1}, "data.window=64 must be above"),
        (80, SLOTS | {"norm_cap": 1.0}, {}, "norm_cap=1.0 needs .*postfix"),
    ],
)
def test_losses_and_options_of_slots_that_are_not_there(window, memory, losses, says):
    tree = TINY | {"losses": losses, "model": TINY["model"] | {"memory": memory}}
    with pytest.raises(ConfigError, match=says):
        runs.resolve(tree, {"data.window": window})


def test_losses_of_slots_that_are_there():
    model = TINY["model"] | {"memory": SLOTS}
    tree = TINY | {"losses": {"auxiliary": STAGED, "orthogonality": 0.1}, "model": model}
    assert runs.resolve(tree, {"data.window": 65}).losses.orthogonality == 0.1
