"""Notebooks import and look: no outputs in git, nothing defined, and every cell runs."""

from __future__ import annotations

import ast
import importlib
import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
BOOKS = sorted(FOLDER.glob("*.ipynb"))
# What makes the trainings of the notebooks small; everything else in them is run as it stands.
_FEW = {"train.batch_size": 8, "train.log_every": 2, "train.eval_every": 4}
SMALL: dict[str, dict[str, Any]] = {
    "latentwire/tiny": {
        "train.steps": 4, "data.segments": 64, "eval.segments": 8, "eval.questions": 8,
        "eval.batch_size": 8, "eval.quick_segments": 4, "eval.arms": ["latent", "shuffled"],
    },
    "abstractinator/tiny": {
        "train.steps": 8, "eval.windows": 8, "eval.batch_size": 8,
        "train.phases": [
            {"name": "level0", "steps": 4, "data": "level0", "train": ["compressor", "expander"]},
            {"name": "top", "steps": 0, "data": "top", "train": ["top"]},
        ],
    },
    "spacing/tiny": {
        "train.steps": 6, "data.source": "cue:n=64,count=20000,seed=0", "eval.windows": 64,
        "eval.batch_size": 64, "eval.baselines": False,
    },
    "megacontext/tiny": {
        "train.steps": 6, "eval.rows": 8, "eval.upper_rows": 4, "eval.quick_rows": 4,
        "eval.batch_size": 4,
        "train.phases": [
            {"name": "level 1", "steps": 4, "train": ["queries", "maps"]},
            {"name": "level 2", "data": "upper2", "train": ["upper_queries", "upper_maps"]},
        ],
    },
}  # fmt: skip


def cells(book: Path, kind: str = "code") -> list[str]:
    """Sources of the cells of a kind, in order."""
    read = json.loads(book.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in read if cell["cell_type"] == kind]


def execute(book: Path, namespace: dict[str, Any], first: int | None = None) -> list[str]:
    """Runs code cells as a kernel would; returns the HTML that they end with."""
    shown = []
    for number, source in enumerate(cells(book)[:first]):
        tree = ast.parse(source)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        where = f"{book.name}, code cell {number}"
        exec(compile(tree, where, "exec"), namespace)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), where, "eval"), namespace)
            if hasattr(value, "_repr_html_"):
                shown.append(value._repr_html_())
    return shown


def test_there_is_a_tour_and_one_for_each_system():
    assert [book.stem for book in BOOKS] == [
        "00_tour", "01_latentwire", "02_residual_vq_abstractinator", "03_spacing_memory",
        "04_megacontext",
    ]  # fmt: skip


@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.stem)
def test_outputs_are_stripped(book):
    read = json.loads(book.read_text(encoding="utf-8"))
    for cell in read["cells"]:
        assert cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None, cell["id"]
    ids = [cell["id"] for cell in read["cells"]]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.stem)
def test_they_define_no_logic(book):
    kinds = (
        ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.For, ast.While,
        ast.ListComp, ast.DictComp, ast.GeneratorExp,
    )  # fmt: skip
    allowed = {"[example.context for example in load_squad('lookup', 'validation')[:4]]"}
    for source in cells(book):
        found = [n for n in ast.walk(ast.parse(source)) if isinstance(n, kinds)]
        assert {ast.unparse(n) for n in found} <= allowed, source


@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.stem)
def test_what_they_import_is_there(book):
    """Cheap enough for every run of the suite: a name that moved breaks a notebook."""
    for source in cells(book):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("latent_jax"):
                module = importlib.import_module(node.module)
                for name in (alias.name for alias in node.names):
                    there = hasattr(module, name) or find_spec(f"{node.module}.{name}")
                    assert there, f"{node.module} has no {name}"


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Trains little, in a folder of its own."""
    runs = importlib.import_module("latent_jax.run")
    whole = runs.run

    def less(config: str, **overrides: Any) -> Any:
        return whole(config, **{**overrides, **_FEW, **SMALL[config]})

    monkeypatch.setattr(runs, "run", less)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LATENT_JAX_RUN", raising=False)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.stem)
def test_every_cell_runs(book, small, monkeypatch):
    shown = execute(book, {})
    assert len(shown) >= 3
    for html in shown:
        assert "<script" not in html and 'src="http' not in html
        for figure in re.findall(r"<figure>.*?</figure>", html, flags=re.S):
            assert "<figcaption>" in figure
    if book.stem != "00_tour":  # and looks at a run that is there already
        out = next(p.parent for p in (small / "runs").glob("*/config.yaml"))
        monkeypatch.setenv("LATENT_JAX_RUN", str(out))
        monkeypatch.setattr(importlib.import_module("latent_jax.run"), "run", None)
        (page,) = execute(book, {}, first=2)
        assert "seed" in page
