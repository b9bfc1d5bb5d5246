"""Every example in a docstring does what it says. Those that compile something are slow."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Rooms and modules whose examples need no compiler.
CHEAP = (
    "latent_jax.core", "latent_jax.report", "latent_jax.commands", "latent_jax.data",
    "latent_jax.backbones.padding", "latent_jax.backbones.tokenizer", "latent_jax.ops.wire",
    "latent_jax.systems.abstractinator.config", "latent_jax.systems.abstractinator.tokenizer",
    "latent_jax.systems.latentwire.diagnose", "latent_jax.systems.latentwire.metrics",
)  # fmt: skip


def _with_examples() -> list:
    found = []
    for path in sorted(ROOT.glob("latent_jax/**/*.py")):
        if re.search(r"^\s+>>> ", path.read_text(encoding="utf-8"), flags=re.M):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            marks = [] if name.startswith(CHEAP) else [pytest.mark.slow]
            found.append(pytest.param(name, marks=marks))
    return found


@pytest.mark.parametrize("name", _with_examples())
def test_examples(name):
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert failed == 0 and tried > 0
