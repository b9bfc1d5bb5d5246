"""Preemption: SIGTERM (and SIGUSR1, where schedulers send it) saves at the next step boundary."""

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

    A second signal is left to the old handler's default, so that a stuck run can still be ended.
    """

    def __init__(self) -> None:
        self._flag = threading.Event()
        self._old: dict[int, Any] = {}

    def __enter__(self) -> PreemptionWatch:
        if threading.current_thread() is not threading.main_thread():
            return self
        if jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGUSR1):
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
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._flag.set()

    def requested(self, step: int) -> bool:
        """True when the run should save and stop; all processes agree on the step."""
        if jax.process_count() == 1:
            return self._flag.is_set()
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)
