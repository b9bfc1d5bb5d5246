"""Every size is doubled; devices where there are several."""

from __future__ import annotations

import jax
import pytest

from latent_jax import bench
from latent_jax.core.errors import ConfigError


def test_each_size_is_doubled(capsys):
    args = "--model tiny --batch 1 --tokens 8 --rows 32 --dim 4 --codes 8 --stages 1"
    got = bench.run("scaling", [*args.split(), "--doublings", "1", "--repeats", "1"])
    sizes = {
        "reader.batch": (1, 2), "reader.tokens": (8, 16), "rvq.rows": (32, 64),
        "rvq.codes": (8, 16), "rvq.stages": (1, 2),
    }  # fmt: skip
    if len(jax.devices()) > 1:
        sizes["reader.devices"] = (1, 2)
    for name, (small, large) in sizes.items():
        ratio = got[f"scaling.{name}.{large}.seconds"] / got[f"scaling.{name}.{small}.seconds"]
        assert got[f"scaling.{name}.per_doubling"] == pytest.approx(ratio)
    assert "a doubling costs" in capsys.readouterr().out


def test_bad_options():
    with pytest.raises(ConfigError, match="--doublings: use at least 1"):
        bench.run("scaling", ["--doublings", "0"])
