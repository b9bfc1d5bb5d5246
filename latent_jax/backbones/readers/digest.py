"""Content digests that identify a frozen model in checkpoints and reports."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path

# Above this, a directory's digest samples its files: a full pass would read every byte on every
# host.
_FULL_LIMIT = 4 << 30
_BLOCK = 1 << 20


def file_sha256(path: str | Path) -> str:
    """sha256 of a file, remembered in this process while its size and time stay the same."""
    path = Path(path).resolve()
    stat = path.stat()
    return _file_sha256(str(path), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _file_sha256(path: str, size: int, mtime_ns: int) -> str:
    del mtime_ns
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def files_sha256(paths: Iterable[str | Path]) -> str:
    """One sha256 over several files (names and contents).

    Files of more than 4 GiB together are sampled: size, first MiB, last MiB and 64 MiB spread
    between them.
    """
    paths = sorted(Path(p) for p in paths)
    sampled = sum(p.stat().st_size for p in paths) > _FULL_LIMIT
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        digest.update((_sampled if sampled else file_sha256)(path).encode())
    return digest.hexdigest()


def _sampled(path: Path) -> str:
    size = path.stat().st_size
    step = max((size - _BLOCK) // 65, 1)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for offset in range(0, max(size - _BLOCK, 0) + 1, step):
            file.seek(offset)
            digest.update(file.read(_BLOCK))
    return digest.hexdigest()
