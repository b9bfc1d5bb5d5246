"""The training data of a run: an iterator for each kind that its phases name, and its position."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from latent_jax.core.errors import ConfigError, RunError
from latent_jax.train.protocol import System


class Feeds:
    """Iterators of a system's data, opened when a phase first asks for them.

    Args:
      system: whose ``train_data`` they are.
    """

    def __init__(self, system: System):
        self._system = system
        self._open: dict[str, Any] = {}
        self._states: dict[str, Any] = {}

    def sample(self, name: str) -> Mapping[str, Any]:
        """One batch for its shapes; the iterator goes back to where it was.

        Raises:
          ConfigError: there is none.
        """
        data = self._open[name] = self._system.train_data(name, None)
        start = data.get_state()
        try:
            found = next(data)
        except StopIteration:
            raise ConfigError(f"train_data({name!r}) gave no batch") from None
        data.set_state(start)
        return found

    def next(self, name: str, step: int) -> Mapping[str, Any]:
        """The next batch of a kind.

        Raises:
          RunError: the data ended.
        """
        if name not in self._open:
            self._open[name] = self._system.train_data(name, self._states.get(name))
        try:
            return next(self._open[name])
        except StopIteration:
            raise RunError(
                f"the training data {name!r} ended at step {step}; it must repeat"
            ) from None

    def renew(self, name: str, forget: bool) -> None:
        """What was read of a kind has been made anew.

        Args:
          name: of the kind.
          forget: the position was in what is not there any more.
        """
        self._open.pop(name, None)
        if forget:
            self._states.pop(name, None)

    def get_state(self) -> dict[str, Any]:
        """Positions by kind; those of later phases are as they were restored."""
        self._states |= {name: data.get_state() for name, data in self._open.items()}
        return self._states

    def set_state(self, states: dict[str, Any]) -> None:
        """Goes to stored positions."""
        self._states = states
        for name in self._open.keys() & states.keys():
            self._open[name].set_state(states[name])

    def close(self) -> None:
        """Closes all that can be closed, though one fails."""
        with contextlib.ExitStack() as stack:
            for data in self._open.values():
                if hasattr(data, "close"):
                    stack.callback(data.close)
