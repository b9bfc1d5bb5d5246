"""The package's front door: cheap to import, and `run` serves as function and module."""

from __future__ import annotations

import ast
import doctest
import subprocess
import sys
import types
from pathlib import Path

import pytest

import latent_jax


def test_importing_is_lazy() -> None:
    code = "import sys, latent_jax; dir(latent_jax); print('jax' in sys.modules)"
    env_path = str(Path(latent_jax.__file__).parents[1])
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": env_path},
    )
    assert out.stdout.strip() == "False"


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        latent_jax.lode  # noqa: B018
    assert {"load", "run", "LatentWire", "__version__"} <= set(dir(latent_jax))


def test_run_is_callable_in_whichever_order_people_import() -> None:
    module = types.ModuleType("latent_jax.run")
    module.run = lambda config, **overrides: (config, overrides)  # type: ignore[attr-defined]
    kept = latent_jax.__dict__.get("run")
    try:
        latent_jax.run = module  # what the import system does after `import latent_jax.run`
        assert latent_jax.run("c.yaml", seed=1) == ("c.yaml", {"seed": 1})
        assert latent_jax.run.run("c.yaml") == ("c.yaml", {})
    finally:
        del latent_jax.run
        if kept is not None:
            latent_jax.run = kept


def test_every_module_says_what_it_is_for() -> None:
    root = Path(latent_jax.__file__).parent
    bare = [p for p in root.rglob("*.py") if not ast.get_docstring(ast.parse(p.read_text()))]
    assert not bare


def test_examples_run() -> None:
    from latent_jax.backbones import padding
    from latent_jax.core import rng, trees, types, yamlio
    from latent_jax.data import text
    from latent_jax.ops import spectrum

    for module in (padding, rng, spectrum, text, trees, types, yamlio):
        failed, tried = doctest.testmod(module)
        assert tried and not failed, module.__name__
