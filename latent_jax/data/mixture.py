"""A resumable mixture of batch streams, e.g. autoencoding, continuation and answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from latent_jax.core.errors import DataError
from latent_jax.data.pipeline import Batch, BatchIterator, State, _decode

Weight = float | Callable[[int], float]

# Fractional part of the golden ratio: the multiples of it, modulo one, are the most evenly spread.
_GOLDEN = 0.6180339887498949


class Mixture:
    """Iterator that takes each batch from one of several streams. Made by `mix`."""

    def __init__(
        self,
        iterators: Mapping[str, BatchIterator | Mixture],
        weights: Mapping[str, Weight],
        seed: int,
        task_field: str | None,
    ):
        self.iterators = dict(iterators)
        self.names = tuple(self.iterators)
        self.weights = dict(weights)
        self.seed = seed
        self.task_field = task_field
        self._step = 0
        self._start = float(np.random.default_rng([seed, 0x6D6978]).random())

    def choice(self, step: int) -> str:
        """Name of the stream that batch number `step` is taken from.

        Raises:
            DataError: a weight schedule is negative or all are zero at this step.
        """
        values = []
        for name in self.names:
            weight = self.weights[name]
            values.append(float(weight(step)) if callable(weight) else float(weight))
        total = sum(values)
        if not np.isfinite(total) or min(values) < 0 or total <= 0:
            shown = dict(zip(self.names, values, strict=True))
            raise DataError(f"mix: weights {shown} at step {step}: none negative, not all zero")
        # A low-discrepancy point instead of an independent draw: shares are exact to one or two
        # batches at any time, which matters in runs of a hundred steps.
        point = (self._start + step * _GOLDEN) % 1.0
        index = int(np.searchsorted(np.cumsum(values) / total, point, side="right"))
        index = min(index, len(values) - 1)
        while values[index] == 0:  # rounding of the cumulative sum at its upper end
            index -= 1
        return self.names[index]

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        name = self.choice(self._step)
        batch = next(self.iterators[name])
        self._step += 1
        if self.task_field is not None:
            rows = len(next(iter(batch.values())))
            batch = {**batch, self.task_field: np.full(rows, self.names.index(name), np.int32)}
        return batch

    def get_state(self) -> State:
        """Own step and the state of every stream, as plain JSON types."""
        children = {name: it.get_state() for name, it in self.iterators.items()}
        return {"step": self._step, "seed": self.seed, "children": children}

    def set_state(self, state: State | bytes | str) -> None:
        """Continues from a state of `get_state` (a dict, or its JSON).

        Raises:
            DataError: other streams or another seed than when it was saved.
        """
        state = _decode(state, ("step", "seed", "children"))
        if set(state["children"]) != set(self.names) or state["seed"] != self.seed:
            raise DataError(
                f"data state does not belong to this mixture: saved with seed {state['seed']} and "
                f"streams {sorted(state['children'])}, now {self.seed} and {sorted(self.names)}"
            )
        for name, child in state["children"].items():
            self.iterators[name].set_state(child)
        self._step = int(state["step"])

    def close(self) -> None:
        """Stops the read threads of all streams."""
        for iterator in self.iterators.values():
            iterator.close()


def mix(
    iterators: Mapping[str, BatchIterator | Mixture],
    weights: Mapping[str, Weight],
    seed: int = 0,
    task_field: str | None = "task",
) -> Mixture:
    """Mixes streams of batches; every batch comes whole from one of them.

    Which stream is a pure function of (seed, step): deterministic, resumable, and the same on
    every process.

    Args:
        iterators: streams by name; their order defines the task numbers.
        weights: share of each stream, a number or a schedule of the step.
        seed: of the choice.
        task_field: int32 ``[b]`` field added to each batch, the index of its stream; None for none.

    Returns:
        The mixture, an iterator with the same state interface as its parts.

    Raises:
        DataError: no streams, or weights for other names.
    """
    if not iterators:
        raise DataError("mix: no streams")
    if set(iterators) != set(weights):
        raise DataError(f"mix: streams {sorted(iterators)} but weights for {sorted(weights)}")
    mixture = Mixture(iterators, weights, seed, task_field)
    mixture.choice(0)
    return mixture
