"""No mode of memory sees ahead, a mask of all ones for its slots does, and the floor tells."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import latent_jax
from latent_jax import run as runs
from latent_jax.core.config import parse
from latent_jax.systems.spacing import model as models
from latent_jax.systems.spacing.config import SpacingModelConfig

MODES = {
    "none": {},
    "prefix": {"kind": "prefix"},
    "postfix": {"kind": "postfix"},
    "claims": {"kind": "postfix", "read": "claims", "pool": "sum"},
    "anonymous": {"kind": "postfix", "read": "claims", "pool": "sum", "identity": "anonymous"},
}
T, EARLY = 12, 5


def all_ones(monkeypatch):
    """The earlier code's mask: slots see all data, and data all slots."""
    prefix, data = models.prefix_mask, models.data_mask
    monkeypatch.setattr(models, "prefix_mask", lambda m, t: prefix(m, t).at[:m].set(True))
    monkeypatch.setattr(models, "data_mask", lambda t, m: data(t, m).at[:, t:].set(True))


def sees_ahead(memory):
    """Greatest change of a prediction after gap ``EARLY`` when later gaps change."""
    # Three layers: slots of a later cut see later data, data sees them, slots of this cut see data.
    config = parse(SpacingModelConfig, {
        "layers": 3, "heads": 2, "width": 8, "ff": 8,
        "embed": {"near": 2, "kernels": 4, "knots": 8}, "memory": {"slots": 2, **memory},
    })  # fmt: skip
    model = models.SpacingModel(config, reach=12.0, context=T)
    key = jax.random.key(0)
    cuts = jnp.asarray([EARLY, T - 1]) if memory.get("kind") == "postfix" else None

    @jax.jit
    def change(gaps, later):
        rngs = {"params": key, "sample": key}
        before, variables = model.init_with_output(rngs, gaps, jnp.ones(1) * 9, cuts)
        after = model.apply(variables, later, jnp.ones(1) * 9, cuts, rngs={"sample": key})
        at = slice(0, 1) if cuts is not None else slice(0, EARLY + 1)
        return jnp.abs(after.raw - before.raw)[:, at].max()

    gaps = 1 + 0.3 * jax.random.normal(key, (1, T))
    return float(change(gaps, gaps.at[:, EARLY + 1 :].add(0.7)))


@pytest.mark.parametrize("mode", ["prefix", pytest.param("postfix", marks=pytest.mark.slow)])
def test_a_mask_of_all_ones_sees_ahead(mode, monkeypatch):
    assert sees_ahead(MODES[mode]) < 1e-6
    all_ones(monkeypatch)
    assert sees_ahead(MODES[mode]) > 1e-5


@pytest.fixture
def trained(tmp_path):
    """Trains on random-matrix gaps, whose floor is exact."""

    def train(memory, steps=400):
        return latent_jax.run(
            {
                "system": "spacing", "mesh": {"data": 1},
                "data": {"source": "cue:n=64,count=60000,seed=0", "window": 18},
                "model": {
                    "layers": 2, "heads": 2, "width": 32, "ff": 64,
                    "embed": {"near": 4, "kernels": 8, "knots": 24, "height": False},
                    "positions": {"kind": "index"},
                    "memory": {"slots": 4, **memory},
                },
                "train": {
                    "steps": steps, "batch_size": 128, "log": {"tensorboard": False},
                    "optimizer": {"lr": 0.003, "warmup_steps": 40, "clip_norm": None},
                },
                "eval": {"windows": 2000, "rollouts": 0, "baselines": False},
            },
            out=str(tmp_path / "run"),
        )  # fmt: skip

    return train


def told(name, done):
    """Says it (``-rP`` shows it): nats above the exact floor, paired, with 95 % intervals."""
    for key in ("nll.minus_floor", "nll.minus_floor.inner"):
        low, high = done[f"{key}.ci95"]
        print(f"{name}: {key} {done[key]:+.4f} ({low:+.4f} to {high:+.4f})")


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_random_matrices_are_not_predicted_below_their_floor(mode, trained):
    done = trained(MODES[mode])
    told(mode, done)
    for name in ("nll.minus_floor", "nll.minus_floor.inner"):
        low, high = done[f"{name}.ci95"]
        assert high > 0 and done[name] > -0.01, (name, low, high)
    assert done["nll.minus_floor"] < 0.08, "it has learned what there is to learn"


@pytest.mark.slow
def test_the_floor_finds_a_mask_of_all_ones(trained, monkeypatch):
    all_ones(monkeypatch)
    done = trained(MODES["prefix"], steps=800)
    told("prefix behind a mask of all ones", done)
    # The last target is in nobody's input: only a position inside the window can tell.
    assert done["nll.minus_floor.inner.ci95"][1] < 0
    assert done["nll.minus_floor"] > -0.02


@pytest.mark.slow
def test_the_tiny_configuration_lands_at_the_floor(tmp_path):
    done = runs.run("spacing/tiny", out=str(tmp_path / "tiny"))
    assert abs(done["nll.minus_floor"]) < 0.02
    assert done["nll.minus_floor.ci95"][1] > 0
    assert done["pit.ks_p"] > 0.01
