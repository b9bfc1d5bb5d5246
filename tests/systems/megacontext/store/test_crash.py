"""Crashes: kill -9, a crash at every single write, power loss, a full disk, two writers."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import latent_jax
from latent_jax.core.errors import StoreError
from latent_jax.systems.megacontext.store import GistTree, PendingGists, State, build
from tests.systems.megacontext.store.gist_store import SMALL, assert_holds, gists_of, stream

ROOT = Path(latent_jax.__file__).parents[1]


@pytest.fixture(scope="module")
def writers():
    """Starts writers, each a process of its own; see `writer`."""
    command = [sys.executable, "-m", "tests.systems.megacontext.store.writer"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as parent:

        def start(path: Path, seed: int) -> int:
            parent.stdin.write(f"{path} {seed}\n")
            parent.stdin.flush()
            said = parent.stdout.readline().split()
            assert said[0] == "pid" and parent.stdout.readline() == "open\n"
            return int(said[1])

        start.says = parent.stdout.readline
        yield start
        parent.stdin.close()


def kill_again_and_again(writers, path: Path, kills: int, seed: int) -> list[int]:
    """Kills writers of one store at random moments; returns the tokens each of them added.

    Every writer appends other tokens, so that gists of lost tokens cannot pass for right.
    """
    GistTree.create(path, SMALL).close()
    rng = np.random.default_rng(seed)
    history = np.zeros(0, np.int32)
    added = []
    for number in range(1, kills + 1):
        pid = writers(path, number)
        said = [writers.says() for _ in range(int(rng.integers(0, 4)))]
        time.sleep(rng.uniform(0, 0.02))
        os.kill(pid, signal.SIGKILL)
        while (line := writers.says()) != "dead\n":
            said.append(line)
        assert all(line.startswith("flushed ") for line in said), said
        with GistTree.open(path) as tree:
            flushed = int(said[-1].split()[1]) if said else len(history)
            assert len(tree) >= flushed, f"kill {number}: flushed tokens lost"
            added.append(len(tree) - len(history))
            history = np.concatenate([history, stream(len(history), len(tree), number)])
            assert_holds(tree, history, tree.version)
            report = tree.verify()
            assert report.ok, f"kill {number}: {report.lines()}"
            for document in tree.documents:
                assert 0 <= document.start < document.stop <= len(tree)
                assert document.path == f"{document.sha256}/{document.start}"
        if len(history) > 4000:  # a new store keeps the check quick
            shutil.rmtree(path)
            GistTree.create(path, SMALL).close()
            history = history[:0]
    return added


def test_kill_9_loses_nothing_that_was_flushed(writers, tmp_path):
    assert sum(kill_again_and_again(writers, tmp_path / "store", 6, seed=0)) > 0


@pytest.mark.slow
def test_200_kills(writers, tmp_path):
    added = kill_again_and_again(writers, tmp_path / "store", 200, seed=1)
    assert len(added) == 200 and np.count_nonzero(added) > 100


class Crash(BaseException):
    """Ends the process in the tests' imagination."""


class Disk:
    """Stands between a store and the disk: counts writes, and can fail or crash in one.

    Args:
      directory: the store.
      crash_at: which write, counted from 0, stops after `part` of its bytes.
      part: 1 is a crash right after that write, which is right before the next.
    """

    def __init__(self, directory: Path, crash_at: int | None = None, part: float = 0.5):
        self.directory = directory
        self.crash_at, self.part = crash_at, part
        self.writes = 0
        self.dead = False
        self.durable: dict[str, bytes] = {}  # what an fsync has promised
        self.fail: OSError | None = None

    @contextlib.contextmanager
    def installed(self):
        real = {name: getattr(os, name) for name in ("pwrite", "fsync", "fdatasync", "ftruncate")}

        def pwrite(handle, data, offset):
            self._step()
            if self.crash_at is not None and self.writes == self.crash_at + 1:
                real["pwrite"](handle, data[: int(len(data) * self.part)], offset)
                if self.fail:
                    self.crash_at += 1  # the disk stays full
                    raise self.fail
                self.dead = True
                raise Crash
            return real["pwrite"](handle, data, offset)

        def sync(handle):
            self._alive()
            path = Path(os.readlink(f"/proc/self/fd/{handle}"))
            if path.is_file():
                self.durable[path.name] = path.read_bytes()

        def ftruncate(handle, size):
            self._alive()
            real["ftruncate"](handle, size)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "pwrite", pwrite)
            patch.setattr(os, "fsync", sync)
            patch.setattr(os, "fdatasync", sync)
            patch.setattr(os, "ftruncate", ftruncate)
            yield self

    def _step(self) -> None:
        self._alive()
        self.writes += 1

    def _alive(self) -> None:
        if self.dead:  # clean-up code runs in the test, not after a real crash
            raise Crash


def script(path: Path, flushed: list[int]) -> None:
    """A short life of a store: two documents, two gist versions, five flushes."""
    with GistTree.create(path, SMALL) as tree:
        flushed.append(0)
        tree.set_version("v1")
        tree.add_document("a", "1", stream(0, 22))
        build(tree, gists_of(SMALL))
        tree.flush()
        flushed.append(22)
        tree.append(stream(22, 41))
        build(tree, gists_of(SMALL))
        tree.add_document("b", "2", stream(41, 60))
        tree.flush()
        flushed.append(60)
        tree.set_version("v2")
        build(tree, gists_of(SMALL, "v2"), batch=4)
        tree.append(stream(60, 77))
        build(tree, gists_of(SMALL, "v2"), batch=4)
    flushed.append(77)


def crash(path: Path, at: int, part: float) -> tuple[Disk, list[int]]:
    """Runs the script up to a crash in write `at`; returns the disk and what had been flushed."""
    flushed: list[int] = []
    disk = Disk(path, at, part)
    with disk.installed(), contextlib.suppress(Crash):
        script(path, flushed)
    return disk, flushed


def only_gists_in_the_writing(tree: GistTree) -> None:
    """A gist that was being written over is at worst damaged, and then pending; nothing else is."""
    report = tree.verify()
    assert not report.tokens and not report.problems, report.lines()
    for level, nodes in report.nodes.items():
        assert set(nodes) <= set(tree.pending(level).tolist())


def goes_on(path: Path) -> None:
    """Other tokens after the crash: no gist of lost ones may pass for theirs."""
    with GistTree.open(path, writable=True) as tree:
        only_gists_in_the_writing(tree)
        kept = len(tree)
        tree.append(stream(kept, kept + 90, seed=5))
        ids = np.concatenate([stream(0, kept), stream(kept, kept + 90, seed=5)])
        assert_holds(tree, ids, tree.version)
        tree.set_version("v2")
        assert_holds(tree, ids, "v2")
        build(tree, gists_of(SMALL, "v2"))
        assert all((tree.state(k) == State.CURRENT).all() for k in range(1, tree.levels + 1))
        assert_holds(tree, ids, "v2")
        assert tree.verify().ok


@pytest.fixture(scope="module")
def writes(tmp_path_factory) -> int:
    """How many writes the script makes."""
    disk, flushed = crash(tmp_path_factory.mktemp("all") / "store", 10**9, 0)
    assert flushed == [0, 22, 60, 77]
    return disk.writes


@pytest.mark.parametrize("part", [0.37, 1.0])
def test_a_crash_in_every_single_write(tmp_path, writes, part):
    for at in range(writes):
        path = tmp_path / f"store{at}"
        _, flushed = crash(path, at, part)
        if not (path / "commit.bin").exists():
            GistTree.create(path, SMALL).close()  # what is left is no obstacle
            continue
        with GistTree.open(path) as tree:
            assert len(tree) >= max(flushed, default=0)
            assert len(tree) in (0, 22, 60, 77)
            assert_holds(tree, stream(0, len(tree)), tree.version)
            assert [d.path for d in tree.documents] == ["a", "b"][: len(tree) // 22]
            only_gists_in_the_writing(tree)
        goes_on(path)


@settings(max_examples=20)
@given(at=st.integers(0, 10**6), part=st.floats(0, 1), seed=st.integers(0, 2**32 - 1))
def test_power_loss(tmp_path_factory, writes, at, part, seed):
    power_loss(tmp_path_factory.mktemp("power"), writes, at, part, seed)


@pytest.mark.slow
@settings(max_examples=400, phases=[Phase.generate])
@given(at=st.integers(0, 10**6), part=st.floats(0, 1), seed=st.integers(0, 2**32 - 1))
def test_400_power_losses(tmp_path_factory, writes, at, part, seed):
    power_loss(tmp_path_factory.mktemp("power"), writes, at, part, seed)


def power_loss(folder: Path, writes: int, at: int, part: float, seed: int) -> None:
    """Whatever was not synced is on the disk or is not, page by page."""
    at = 4 + at % (writes - 4)  # the first writes make the store
    disk, flushed = crash(folder / "live", at, part)
    after = folder / "after"
    shutil.copytree(folder / "live", after)
    rng = np.random.default_rng(seed)
    page = 64  # finer than any disk's, for the files are small
    for path in after.iterdir():
        if path.name in ("lock", "meta.json") or path.name.startswith("."):
            continue
        new, old = path.read_bytes(), disk.durable.get(path.name)
        if old is None:
            if rng.random() < 0.5 and path.name != "commit.bin":
                path.unlink()
            continue
        # The new size may have been kept without the new bytes, or not even that.
        size = int(rng.choice([len(old), len(new)]))
        old, new = old.ljust(size, b"\0")[:size], new.ljust(size, b"\0")[:size]
        step = 4096 if path.name == "commit.bin" else page
        pieces = [(new if rng.random() < 0.5 else old)[i : i + step] for i in range(0, size, step)]
        path.write_bytes(b"".join(pieces))
    with GistTree.open(after) as tree:
        assert len(tree) >= max(flushed, default=0)
        only_gists_in_the_writing(tree)
        assert_holds(tree, stream(0, len(tree)), tree.version)
    goes_on(after)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_is_one_line_and_the_store_as_last_flushed(tmp_path, writes, number):
    for at in range(2, writes, 1 if number == errno.ENOSPC else 7):
        path = tmp_path / f"store{number}-{at}"
        flushed: list[int] = []
        disk = Disk(path, at, part=0.5)
        disk.fail = OSError(number, os.strerror(number))
        with disk.installed():
            with pytest.raises(StoreError) as caught:
                script(path, flushed)
        message = str(caught.value)
        assert "\n" not in message and os.strerror(number) in message and str(path) in message
        assert ("make room" in message) == (number != errno.EIO)
        if not flushed:
            continue
        with GistTree.open(path) as tree:
            assert len(tree) >= flushed[-1]
            assert_holds(tree, stream(0, len(tree)), tree.version)
            only_gists_in_the_writing(tree)
    goes_on(path)


def test_after_room_was_made_the_same_tree_goes_on(tmp_path):
    path = tmp_path / "store"
    with GistTree.create(path, SMALL) as tree:
        tree.append(stream(0, 30))
        disk = Disk(path, 0)
        disk.fail = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with disk.installed(), pytest.raises(StoreError, match="No space left"):
            tree.append(stream(30, 60))
        assert len(tree) == 30
        tree.append(stream(30, 60))
    with GistTree.open(path) as tree:
        assert_holds(tree, stream(0, 60))


def test_a_failed_sync_is_not_tried_again(tmp_path, monkeypatch):
    def fail(handle):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    tree = GistTree.create(tmp_path / "store", SMALL)
    tree.append(stream(0, 30))
    tree.flush()
    tree.append(stream(30, 60))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(StoreError, match="Input/output error"):
            tree.flush()
    with pytest.raises(StoreError, match="open it again"):
        tree.flush()
    tree.close(discard=True)
    with GistTree.open(tmp_path / "store", writable=True) as tree:
        assert len(tree) == 30


def test_a_really_full_disk(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mounted = os.geteuid() == 0 and not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)], capture_output=True
    ).returncode  # fmt: skip
    if not mounted:
        pytest.skip("a small file system cannot be mounted here")
    try:
        tree = GistTree.create(small / "store", SMALL)
        with pytest.raises(StoreError, match="No space left on device; make room"):
            for start in range(0, 10**6, 5000):
                tree.append(stream(start, start + 5000))
                tree.flush()
        tree.close(discard=True)
        with GistTree.open(small / "store") as tree:
            assert 5000 <= len(tree) < 200_000
            np.testing.assert_array_equal(tree.tokens(), stream(0, len(tree)))
            assert tree.verify().ok
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_second_writer_is_refused_and_a_reader_is_not(writers, tmp_path):
    path = tmp_path / "store"
    GistTree.create(path, SMALL).close()
    pid = writers(path, 3)
    try:
        with pytest.raises(StoreError, match=f"process {pid} is writing to this store"):
            GistTree.open(path, writable=True)
        assert writers.says().startswith("flushed")
        with GistTree.open(path) as reader:
            for _ in range(20):  # beside a writer at full speed
                reader.refresh()
                np.testing.assert_array_equal(reader.tokens(), stream(0, len(reader), 3))
                with contextlib.suppress(PendingGists):  # or being written over
                    assert len(reader.gists(1, 0, 1, stale=True)) == 1
            assert len(reader) > 0
    finally:
        os.kill(pid, signal.SIGKILL)
        while writers.says() != "dead\n":
            pass
    with GistTree.open(path, writable=True) as tree:  # the lock went with its process
        with pytest.raises(StoreError, match=f"process {os.getpid()} is writing"):
            GistTree.open(path, writable=True)
        assert tree.verify().ok
