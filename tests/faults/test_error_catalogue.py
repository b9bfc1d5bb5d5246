"""Every setting of every system given what it cannot be, and files that are damaged: one line, exit
code 2, nothing written. ``-rP`` shows how many.

The cases are made from the dataclasses themselves, so a new setting is covered when it is written.
"""

from __future__ import annotations

import dataclasses
import random
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import pytest

from latent_jax import cli, run
from latent_jax.core.fields import hints, join
from tests.faults import test_fuzz_readers as fuzz
from tests.faults.test_fuzz_lies import a_store

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


def one_line(code: int, out: str, err: str) -> bool:
    """Whether a command was refused as it should be."""
    return (
        code == 2 and not out and err.startswith("latent-jax: ") and err.count("\n") == 1
        and "Traceback" not in err
    )  # fmt: skip


def check(name: str, overrides: list[str], capsys: Any) -> None:
    for override in overrides:
        code = cli.main(["config", name, "--set", override])
        out, err = capsys.readouterr()
        assert one_line(code, out, err), (override, code, out, err)
        assert override.partition("=")[0].rpartition(".")[2] in err, err
    paths = {o.partition("=")[0].removesuffix("x") for o in overrides}
    print(f"{name}: {len(overrides)} bad inputs to {len(paths)} settings, each one line, exit 2")


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


# ---- damaged files, through the commands that read them ------------------------------------------


def a_config(folder: Path) -> None:
    text = (Path(__file__).parents[2] / "configs" / "spacing" / "tiny.yaml").read_text()
    (folder / "c.yaml").write_text(text)


DRY = ("--dry-run", "--set")
# Kind: file, what writes it, the command that reads it.
DAMAGED = {
    "config": ("c.yaml", a_config, ("config", "c.yaml")),
    "SQuAD": ("qa.json", fuzz.KINDS["SQuAD"].write, ("data", "check", "qa.json")),
    "SQuAD .gz": ("qa.json.gz", fuzz.KINDS["SQuAD .gz"].write, ("data", "check", "qa.json.gz")),
    "SQuAD .xz": ("qa.json.xz", fuzz.KINDS["SQuAD .xz"].write, ("data", "check", "qa.json.xz")),
    "wire": ("some.wire", fuzz.a_wire, ("reconstruct", "some.wire")),
    "zeros .sobj": (
        "z.sobj", fuzz.KINDS["zeros .sobj"].write,
        ("run", "spacing/tiny", *DRY, "data.source=z.sobj"),
    ),
    "zeros .npz": (
        "z.npz", fuzz.KINDS["zeros .npz"].write, ("run", "spacing/tiny", *DRY, "data.source=z.npz"),
    ),
    "GGUF": (
        "m.gguf", fuzz.write_gguf_model,
        ("run", "latentwire/tiny", *DRY, "backbone.name=m.gguf"),
    ),
    "llama2.c": (
        "model.bin", fuzz.write_llama2c,
        ("run", "latentwire/tiny", *DRY, "backbone.name=model.bin"),
    ),
    "safetensors": (
        "model.safetensors", fuzz.write_hf_model,
        ("run", "latentwire/tiny", *DRY, "backbone.name=."),
    ),
    "gist store": (
        "store/commit.bin", lambda folder: a_store(folder / "store") and None,
        ("mega", "info", "store"),
    ),
}  # fmt: skip


def damages(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Cut off, overwritten or flipped at random offsets."""
    chance = random.Random(seed)
    for n in range(count):
        at, changed = chance.randrange(len(data)), bytearray(data)
        if n % 3 == 0:
            del changed[at:]
        elif n % 3 == 1:
            changed[at : at + 16] = chance.randbytes(len(changed[at : at + 16]))
        else:
            changed[at] ^= 1 << chance.randrange(8)
        yield bytes(changed)


def walk(kind: str, count: int, capsys: Any, folder: Path) -> None:
    """Damages a file and gives it to its command: one line, or it was harmless."""
    name, write, command = DAMAGED[kind]
    write(folder)
    data = (folder / name).read_bytes()
    before = {p.relative_to(folder) for p in folder.rglob("*")}
    refused = 0
    for changed in damages(data, count, seed=len(kind)):
        (folder / name).unlink()
        (folder / name).write_bytes(changed)
        capsys.readouterr()
        code = cli.main(list(command))
        out, err = capsys.readouterr()
        assert code == 0 or one_line(code, out, err), (kind, code, out, err)
        refused += code == 2
        assert {p.relative_to(folder) for p in folder.rglob("*")} == before, kind
    print(f"{kind}: {count} damaged files, {refused} refused in one line, the others harmless")
    assert refused or kind == "gist store"  # its commit record lies there twice


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_few_damaged_files(kind, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    walk(kind, 3, capsys, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", DAMAGED)
def test_many_damaged_files(kind, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    walk(kind, 60, capsys, tmp_path)
