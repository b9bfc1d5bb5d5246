"""The torch peer is the same autoencoder."""

from __future__ import annotations

import pytest

from latent_jax import bench
from latent_jax.core.errors import ConfigError

pytest.importorskip("torch")
pytest.importorskip("transformers")


def test_the_peer_computes_the_same_loss_and_gradients():
    args = "--model tiny --batch 2 --tokens 12 --rank 3 --pairs 1".split()
    got = bench.run("wire", args)
    assert got["parity.loss_difference"] < 1e-4
    assert got["parity.gradient_difference"] < 1e-3
    assert got["throughput.step.ratio"] > 0 and got["throughput.own.ratio"] > 0
    assert got["memory.own.ratio"] >= 0


def test_bad_options():
    with pytest.raises(ConfigError, match="--rank: use at least 1"):
        bench.run("wire", ["--rank", "0"])
    with pytest.raises(ConfigError, match="--tokens 10 is no multiple of --ratio 4"):
        bench.run("wire", ["--tokens", "10"])
