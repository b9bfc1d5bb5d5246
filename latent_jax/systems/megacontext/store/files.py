"""Files of fixed-size records: preallocated, written and read by position, one writer.

Nothing is written through a memory map: on a full disk a store into a mapped hole kills the process
(SIGBUS), while ``pwrite`` raises an error that can be told. Checked reads go through ``pread`` for
the same reason, a bad sector or a file cut short by somebody else; they copy in any case, since a
record may be rewritten while it is being used.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from latent_jax.core.errors import RunError, StoreError

_SMALLEST = 64 << 10
_LARGEST = 64 << 20
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
# Filesystems that cannot preallocate say so in one of these ways.
_NO_PREALLOCATION = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENODEV)


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns the operating system's refusal into one clear line.

    Raises:
      StoreError: naming the file, the reason and what to do.
    """
    try:
        yield
    except (OSError, RunError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        reason = getattr(cause, "strerror", None) or str(cause)
        room = getattr(cause, "errno", None) in _NO_ROOM
        raise StoreError(
            f"cannot write {path}: {reason}; {'make room and try again, ' if room else ''}"
            "the store stays as last flushed"
        ) from error


def write_at(handle: int, data: bytes | memoryview, offset: int) -> None:
    """Writes all of `data` at a byte offset (a nearly full disk takes part of it first)."""
    data = memoryview(data).cast("B")
    while len(data):
        done = os.pwrite(handle, data, offset)
        data, offset = data[done:], offset + done


def read_at(handle: int, size: int, offset: int) -> np.ndarray:
    """Reads bytes; what lies beyond the end of the file reads as zeros."""
    found = np.zeros(size, np.uint8)
    view, done = memoryview(found), 0
    while done < size:
        got = os.preadv(handle, [view[done:]], offset + done)
        if not got:
            break
        done += got
    return found


def make_durable(handle: int) -> None:
    """Waits until what was written to a file is on the disk."""
    getattr(os, "fdatasync", os.fsync)(handle)  # macOS has the second only


def sync_directory(path: Path) -> None:
    """Makes new names in a directory durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class RecordFile:
    """Records of one size, by number. The file appears with the first write.

    Args:
      path: the file.
      stride: bytes of a record.
      writable: whether `write` and what belongs to it may be called.
    """

    def __init__(self, path: Path, stride: int, writable: bool):
        self.path = path
        self.stride = stride
        self.created = False  # its name is not durable yet
        self._writable = writable
        self._handle: int | None = None
        self._allocated = 0
        self._dirty = False
        self._closed = False

    def read(self, first: int, count: int) -> np.ndarray:
        """Bytes ``[count, stride]``; records that the file does not hold are zeros."""
        size = max(count, 0) * self.stride
        if size == 0 or self._open(create=False) is None:
            return np.zeros((max(count, 0), self.stride), np.uint8)
        try:
            return read_at(self._handle, size, first * self.stride).reshape(-1, self.stride)
        except OSError as error:
            raise StoreError(
                f"{self.path}: records {first} to {first + count - 1} cannot be read "
                f"({error.strerror})"
            ) from error

    def write(self, first: int, data: bytes | np.ndarray) -> None:
        """Writes records from number `first` on, growing the file.

        Raises:
          StoreError: the disk is full or refuses.
        """
        data = memoryview(data).cast("B")
        offset = first * self.stride
        with writing(self.path):
            self._open(create=True)
            self._reserve(offset + len(data))
            self._dirty = True
            write_at(self._handle, data, offset)

    def keep(self, count: int) -> None:
        """Cuts off everything after the first `count` records."""
        if self._open(create=False) is None:
            return
        size = count * self.stride
        with writing(self.path):
            if os.fstat(self._handle).st_size > size:
                os.ftruncate(self._handle, size)
                self._dirty = True
            self._allocated = min(self._allocated, size)

    def records(self) -> int:
        """Whole records that the file could hold at its present size."""
        if self._open(create=False) is None:
            return 0
        return os.fstat(self._handle).st_size // self.stride

    def sync(self) -> None:
        """Makes everything written durable; a plain OSError when that fails."""
        if self._dirty:
            make_durable(self._handle)
            self._dirty = False

    def close(self) -> None:
        """Lets go of the file, without syncing."""
        self._closed = True
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _open(self, create: bool) -> int | None:
        if self._closed:
            raise StoreError(f"{self.path}: the store is closed; open it again")
        if self._handle is None:
            mode = os.O_RDWR if self._writable else os.O_RDONLY
            with contextlib.suppress(FileNotFoundError):
                self._handle = os.open(self.path, mode)
            if self._handle is None and create:
                self._handle = os.open(self.path, mode | os.O_CREAT, 0o644)
                self.created = True
            if self._handle is not None:
                self._allocated = os.fstat(self._handle).st_size
        return self._handle

    def _reserve(self, end: int) -> None:
        if end <= self._allocated or not hasattr(os, "posix_fallocate"):
            return
        # An eighth more than needed keeps both the waste and the number of calls small.
        chunk = min(max(end // 8, _SMALLEST), _LARGEST)
        for wanted in (end + chunk, end):
            try:
                os.posix_fallocate(self._handle, self._allocated, wanted - self._allocated)
            except OSError as error:
                if error.errno in _NO_PREALLOCATION:
                    return
                if wanted == end or error.errno not in _NO_ROOM:
                    raise
            else:
                self._allocated = wanted
                return
