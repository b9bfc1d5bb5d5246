"""The rooms' import direction: a room may import only the rooms before it.

Read from the source with `ast`, so imports inside functions and under TYPE_CHECKING count too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import latent_jax

ROOT = Path(latent_jax.__file__).parent
# Later may import earlier. `commands` holds the command line's pieces, `cli` puts them together.
ORDER = (
    *("core", "ops", "nn", "sharding", "backbones", "data", "train"),
    *("systems", "report", "bench", "run", "commands", "cli"),
)
FILES = sorted(ROOT.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = ("latent_jax", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> Iterator[tuple[str, int]]:
    """Yields (absolute dotted name, line) of every import, ``from a import b`` as ``a.b``."""
    package = name_of(path) if path.name == "__init__.py" else name_of(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base]).rstrip(".")
            for alias in node.names:
                yield f"{base}.{alias.name}", node.lineno


def room_of(name: str) -> str | None:
    parts = name.split(".")
    if parts[0] != "latent_jax" or len(parts) < 2:
        return None
    return parts[1]


def forbidden(path: Path) -> list[str]:
    """Lists what a file imports and must not."""
    source = room_of(name_of(path))
    if source is None:
        return []  # latent_jax/__init__.py names its modules lazily
    problems = []
    for name, line in imports_of(path):
        target = room_of(name)
        reason = _reason(source, name, target)
        if reason:
            problems.append(f"{path.relative_to(ROOT.parent)}:{line}: imports {name}: {reason}")
    return problems


def _reason(source: str, name: str, target: str | None) -> str | None:
    if source == "ops" and name.split(".")[0] == "flax":
        return "ops never imports flax"
    if source == "train" and ".systems" in name:
        return "train never names a system"
    if source == "systems" and name.startswith("latent_jax.train.loop"):
        return "a system never imports the training loop"
    if target is None or target == source or target in ("__version__", "__main__"):
        return None
    if target == "bench" and source not in ("commands", "cli"):
        return "only the command line imports bench"
    if target == "assets":
        return None  # data files and where they lie: below every room
    if source == "assets":
        return "assets imports no room"
    if target not in ORDER:
        return None if name.count(".") == 1 else f"{target} is no room; the rooms are {ORDER}"
    if ORDER.index(target) > ORDER.index(source):
        return f"{source} comes before {target}"
    return None


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_only_earlier_rooms(path: Path) -> None:
    assert not forbidden(path), "\n".join(forbidden(path))


def test_every_python_file_lies_in_a_room() -> None:
    rooms = {room_of(name_of(p)) for p in FILES} - {None, "__main__", "assets", "testing"}
    assert rooms <= set(ORDER)


def test_no_utils_module() -> None:
    assert not [p for p in FILES if p.stem in ("utils", "util", "helpers", "common", "misc")]


def test_the_check_sees_what_it_should() -> None:
    assert _reason("core", "latent_jax.ops.x", "ops")
    assert _reason("ops", "flax.linen", None)
    assert _reason("train", "latent_jax.systems.latentwire", "systems")
    assert _reason("systems", "latent_jax.train.loop.fit", "train")
    assert _reason("run", "latent_jax.bench", "bench")
    assert _reason("systems", "latent_jax.train.config", "train") is None
    assert _reason("cli", "latent_jax.bench", "bench") is None
