"""The pages of the documentation: every module has one, and docstrings parse without a warning."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CONFIG = yaml.safe_load((ROOT / "launch" / "docs" / "mkdocs.yml").read_text(encoding="utf-8"))


def test_every_module_has_a_page():
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "launch" / "docs" / "hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    names = hooks.modules()
    assert "latent_jax" in names and "latent_jax.core.trees" in names
    assert len(names) == len(set(names)) > 200


def test_docstrings_parse(caplog):
    griffe = pytest.importorskip("griffe")
    (options,) = (p["mkdocstrings"] for p in CONFIG["plugins"] if isinstance(p, dict))
    parsing = options["handlers"]["python"]["options"]["docstring_options"]

    def read(thing) -> None:
        if not thing.is_alias:
            if thing.docstring:
                assert thing.docstring.parse("google", **parsing) is not None
            for member in thing.members.values():
                read(member)

    with caplog.at_level(logging.WARNING):
        read(griffe.load("latent_jax", search_paths=[str(ROOT)]))
    assert caplog.messages == []


def test_the_pages_load_nothing_from_elsewhere():
    assert CONFIG["theme"]["font"] is False
    assert CONFIG["use_directory_urls"] is False
