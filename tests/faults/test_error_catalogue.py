"""Every setting of every system, given what it cannot be: one line, exit code 2, nothing written.

The cases are made from the dataclasses themselves, so a new setting is covered when it is written.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import pytest

from latent_jax import cli, run
from latent_jax.core.fields import hints, join

CONFIGS = (
    "latentwire/tiny", "abstractinator/tiny", "spacing/tiny", "megacontext/tiny", "lm/tiny_reader",
)  # fmt: skip
# Walked once: all systems have them, from the same classes.
SHARED = ("train", "mesh")


def settings(config: Any, path: str = "") -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """Path, type and metadata of every setting of a filled config."""
    for spec in dataclasses.fields(config):
        value, at = getattr(config, spec.name), join(path, spec.name)
        if dataclasses.is_dataclass(value):
            yield from settings(value, at)
        elif spec.init:
            yield at, hints(type(config))[spec.name], spec.metadata


def refused(path: str, tp: Any, meta: Mapping[str, Any]) -> Iterator[str]:
    """Overrides that no setting of this type takes: other types, beyond a bound, a near name."""
    whole = typing.get_origin(tp) in (Literal, tuple, list, dict)
    members = (tp,) if whole else typing.get_args(tp) or (tp,)
    if not {str, Path, Any, object} & set(members):
        yield f"{path}=nonsense"
    yield f"{path}=[[{{a: 1}}]]"
    yield f"{path}={{zzz: [1]}}"
    for name, bound in (meta.get("bounds") or {}).items():
        beyond = bound + {"ge": -1, "le": 1, "gt": 0, "lt": 0}[name]
        beyond = int(beyond) if float(beyond).is_integer() else beyond
        many = any(typing.get_origin(member) is tuple for member in members)
        yield f"{path}={[beyond] if many else beyond}"
    yield f"{path}x=1"


def catalogue(name: str) -> list[str]:
    """All of a packaged configuration."""
    every = settings(run.resolve(name))
    first = name == CONFIGS[0]
    return [
        override for path, tp, meta in every if first or path.partition(".")[0] not in SHARED
        for override in refused(path, tp, meta)
    ]  # fmt: skip


def check(name: str, overrides: list[str], capsys: Any) -> None:
    for override in overrides:
        code = cli.main(["config", name, "--set", override])
        out, err = capsys.readouterr()
        setting = override.partition("=")[0].rpartition(".")[2]
        assert code == 2 and not out, override
        assert err.startswith("latent-jax: ") and err.count("\n") == 1, err
        assert setting in err and "Traceback" not in err, err


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tenth(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overrides = catalogue(name)
    assert len(overrides) > 100
    check(name, overrides[::10], capsys)
    assert not list(tmp_path.iterdir()), "a refused command left something behind"


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_all(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check(name, catalogue(name), capsys)
    assert not list(tmp_path.iterdir())
