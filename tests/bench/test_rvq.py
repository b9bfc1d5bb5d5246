"""The residual VQ benchmark on tiny shapes, and the bound of its table."""

from __future__ import annotations

import numpy as np
import pytest

from latent_jax import bench
from latent_jax.bench import rvq_table
from latent_jax.core.errors import ConfigError

TINY = ["--rows", "64", "--dim", "8", "--stages", "2", "--codes", "16", "--pairs", "1"]


def test_parity_is_printed_before_any_time(capsys):
    pytest.importorskip("torch")
    pytest.importorskip("vector_quantize_pytorch")
    results = bench.run("rvq", TINY)
    assert results["parity.index_agreement"] == 1.0
    assert results["parity.max_abs_difference"] < 1e-5
    for part in ("step", "encode"):
        assert results[f"throughput.{part}.ratio"] > 0
        assert f"memory.{part}.ratio" in results
    shown = capsys.readouterr().out
    assert shown.index("indices equal") < shown.index("faster")


def test_without_the_peer_it_times_ours_and_its_scaling():
    results = bench.run("rvq", [*TINY, "--no-peer", "--scaling"])
    assert results["throughput.step.ours_per_second"] > 0
    assert results["scaling.half_codes.seconds"] > 0


def test_bad_options():
    with pytest.raises(ConfigError, match="--table-steps: use at least 1"):
        bench.run("rvq", ["--table-steps", "0"])


def test_the_bound_and_a_few_steps_towards_it():
    # 6 bits per stage on 16 dimensions.
    np.testing.assert_allclose(
        [rvq_table.bound(s) for s in (1, 2, 3, 4)], [0.595, 0.354, 0.210, 0.125], atol=5e-4
    )
    variables = rvq_table.train([(rvq_table.settings(False, 0.9, 1), 12, 256)], stages=2)
    error, perplexity = rvq_table.evaluate(variables, 1, vectors=1024, stages=2)
    assert rvq_table.bound(2) < error[1] < 0.54 < error[0] < 0.8
    assert (perplexity > 50).all()
