"""Preemption: a signal saves at the next step boundary and ends the run so that it can go on.

SIGTERM and SIGUSR1 are what schedulers send; SIGINT (Ctrl-C) does the same for a person.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

import jax

from latent_jax.core.errors import UserError


class Preempted(UserError):
    """Training was asked to stop, has saved, and continues when the command is run again."""

    exit_code = 75  # EX_TEMPFAIL: schedulers requeue on it


class PreemptionWatch:
    """Context manager that turns the signals into a flag; the old handlers come back after it.

    A second signal goes to the handler that was there before, so that a stuck run can be ended.
    """

    def __init__(self) -> None:
        self._flag = threading.Event()
        self._old: dict[int, Any] = {}

    def __enter__(self) -> PreemptionWatch:
        if threading.current_thread() is not threading.main_thread():
            return self
        if jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                self._old[number] = signal.signal(number, self._handle)
        else:
            # SIGTERM belongs to JAX's coordination service, which tells the other hosts.
            self._old[signal.SIGUSR1] = signal.signal(
                signal.SIGUSR1, lambda *_: os.kill(os.getpid(), signal.SIGTERM)
            )
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._flag.is_set():
            signal.signal(number, self._old[number])
            signal.raise_signal(number)
        self._flag.set()
        if number == signal.SIGINT:  # not print: a handler may interrupt a print
            os.write(2, b"\nsaving after this step; press Ctrl-C again to stop at once\n")

    def request(self) -> None:
        """Asks for a stop from inside the program (time is up)."""
        if jax.process_count() == 1:
            self._flag.set()
        elif jax.process_index() == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    def requested(self, step: int) -> bool:
        """True when the run should save and stop; all processes agree on the step."""
        if jax.process_count() == 1:
            return self._flag.is_set()
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)
