"""One writer at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from latent_jax.core.errors import StoreError


class WriterLock:
    """Held until `release`, or until the process ends in whatever way.

    Raises:
      StoreError: another writer holds it, or the directory refuses.
    """

    def __init__(self, directory: Path):
        path = directory / "lock"
        try:
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise StoreError(
                f"{directory}: cannot be opened for writing ({error.strerror}); reading works "
                "without it"
            ) from error
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(self._handle, 32, 0).decode("ascii", "replace").strip()
            os.close(self._handle)
            raise StoreError(
                f"{directory}: process {owner or '?'} is writing to this store; wait for it to "
                "end, or open the store for reading"
            ) from error
        except OSError as error:
            os.close(self._handle)
            raise StoreError(f"{path}: cannot be locked ({error.strerror})") from error
        try:
            # On a full disk the lock holds as well; only its owner's number is missing.
            with contextlib.suppress(OSError):
                os.ftruncate(self._handle, 0)
                os.pwrite(self._handle, f"{os.getpid()}\n".encode(), 0)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Lets the next writer in."""
        os.close(self._handle)
