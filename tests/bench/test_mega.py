"""The benchmark of working contexts on the tiny reader: every figure is there, growth is flat."""

from __future__ import annotations

import numpy as np
import pytest

from latent_jax import bench
from latent_jax.core.errors import ConfigError


def test_impossible_options_are_refused():
    with pytest.raises(ConfigError, match="--budget: 64 blocks take 284 entries"):
        bench.run("mega", ["--budget", "300"])
    with pytest.raises(ConfigError, match="--new-tokens: use at least 2"):
        bench.run("mega", ["--new-tokens", "1"])


@pytest.mark.slow
def test_a_whole_run_on_the_tiny_reader(capsys):
    args = {
        "backbone": "tiny", "budget": 64, "blocks": 16, "slots": 2, "block": 8, "new-tokens": 2,
        "pairs": 1, "grow-to": 102_400, "width": 8,
    }  # fmt: skip
    results = bench.run("mega", [f"--{k}={v}" for k, v in args.items()])
    assert all(np.isfinite(value) for value in results.values())
    assert {f"refocus.p{p}.milliseconds" for p in (0, 50, 100)} <= set(results)
    early, late = (results[f"growth.t{t}.bytes_per_token"] for t in (10_240, 102_400))
    # Ids, and a gist of 2 x 8 halves and a head for each 32 tokens and, a little, each 1,024.
    assert late == pytest.approx(early, rel=0.02)
    assert late == pytest.approx(2 + 4 / 32 + 40 / 32 + 40 / 1024, rel=0.03)
    assert "decode" in capsys.readouterr().out
