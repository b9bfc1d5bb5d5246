"""The torch twin is the same network."""

from __future__ import annotations

import pytest

from latent_jax import bench
from latent_jax.core.errors import ConfigError

pytest.importorskip("torch")


def test_the_twin_computes_the_same_loss_and_gradients():
    args = "--layers 2 --width 16 --heads 2 --batch 3 --window 40 --pairs 1".split()
    got = bench.run("mdn", args)
    assert got["parity.loss_difference"] < 1e-5
    assert got["parity.gradient_difference"] < 1e-4
    assert got["throughput.step.ratio"] > 0


def test_bad_options():
    with pytest.raises(ConfigError, match="--width: use at least 1"):
        bench.run("mdn", ["--width", "0"])
