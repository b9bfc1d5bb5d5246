"""Damage for files, and bounds on what reading them may take: shared by the fuzz tests."""

from __future__ import annotations

import collections
import contextlib
import resource
import signal
import struct
import time
from collections.abc import Callable, Iterator

from hypothesis import strategies as st

from latent_jax.core.errors import UserError

# What lengths, counts, types and offsets are replaced by.
LIES = (0, 1, 2, 7, 8, 9, 12, 31, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40,
        2**62, 2**63 - 1, 2**63, 2**64 - 1)  # fmt: skip
SECONDS = 20.0
ROOM = 2 << 30  # bytes of memory that reading a small file may take


class Hang(BaseException):
    """Reading took too long; no `except Exception` may swallow it."""


@contextlib.contextmanager
def bounded(seconds: float = SECONDS, room: int = ROOM) -> Iterator[None]:
    """Raises `Hang` after some seconds, and MemoryError where much more memory is asked for."""

    def late(*_):
        raise Hang(f"still reading after {seconds} s")

    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (now + room, hard))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@st.composite
def damaged(draw, whole: bytes, front: int = 0):
    """`whole` with one to three kinds of damage; most of it in the first ``front`` bytes."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        if not data:
            break
        near = front and draw(st.integers(0, 3))
        at = draw(st.integers(0, (min(front, len(data)) if near else len(data)) - 1))
        kind = draw(st.sampled_from(("bit", "bit", "byte", "lie", "lie", "cut", "drop", "double",
                                     "zeros", "insert")))  # fmt: skip
        length = draw(st.integers(1, 64))
        if kind == "bit":
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "byte":
            data[at] = draw(st.integers(0, 255))
        elif kind == "lie":
            size, code = draw(st.sampled_from(((2, "<H"), (4, "<I"), (8, "<Q"))))
            value = draw(st.sampled_from(LIES)) & (2 ** (8 * size) - 1)
            data[at : at + size] = struct.pack(code, value)
        elif kind == "cut":
            del data[at:]
        elif kind == "drop":
            del data[at : at + length]
        elif kind == "double":
            data[at:at] = data[at : at + length]
        elif kind == "zeros":
            data[at : at + length] = bytes(len(data[at : at + length]))
        else:
            data[at:at] = draw(st.binary(min_size=1, max_size=16))
    return bytes(data)


class Tally:
    """What came of the damaged inputs of one reader."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.counts: collections.Counter[str] = collections.Counter()
        self.slowest = 0.0

    def read(self, read: Callable[[], object], right: Callable[[object], bool]) -> None:
        """Reads; the outcome is a right value or one clear line."""
        began = time.perf_counter()
        try:
            with bounded():
                value = read()
        except UserError as error:
            text = str(error)
            assert text and "\n" not in text and len(text) < 2000, text
            self.counts["refused"] += 1
        else:
            assert right(value), f"{self.name}: damage was read as if nothing were wrong"
            self.counts["read"] += 1
        self.slowest = max(self.slowest, time.perf_counter() - began)

    def __str__(self) -> str:
        total = sum(self.counts.values())
        return (f"{self.name:22} {total:6} damaged: {self.counts['refused']} refused, "
                f"{self.counts['read']} read; slowest {self.slowest:.2f} s")  # fmt: skip
