"""Texts to windows of bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np
from jaxtyping import Bool, Int, UInt8

from latent_jax import data
from latent_jax.core.errors import DataError
from latent_jax.systems.abstractinator import tokenizer
from latent_jax.systems.abstractinator.config import AbstractDataConfig, AbstractRun
from latent_jax.train.protocol import BatchSpec


@dataclasses.dataclass(frozen=True)
class Windows:
    """Windows of a part of the text; none crosses a document.

    Attributes:
      text: all documents' bytes, one after the other.
      start: first byte of each window.
      stop: end of each window: ``start + window``, or the document's end before that.
      window: bytes of a whole window.
    """

    text: UInt8[np.ndarray, " n"]
    start: Int[np.ndarray, " w"]
    stop: Int[np.ndarray, " w"]
    window: int

    def __len__(self) -> int:
        return len(self.start)

    def get(self, index: int) -> dict[str, np.ndarray]:
        """``ids`` (padded) and ``there`` (which are bytes) of one window."""
        found = self.text[self.start[index] : self.stop[index]]
        ids = np.full(self.window, tokenizer.PAD, np.int32)
        ids[: len(found)] = found
        return {"ids": ids, "there": np.arange(self.window) < len(found)}

    def batch(self, indices: Int[np.ndarray, " b"]) -> dict[str, np.ndarray]:
        """Several windows, stacked."""
        rows = [self.get(int(i)) for i in indices]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def batches(
        self, indices: Int[np.ndarray, " m"], size: int
    ) -> Iterator[tuple[Int[np.ndarray, "b t"], Bool[np.ndarray, "b t"]]]:
        """Whole batches of ``ids`` and ``there``; windows without a byte fill the last."""
        for at in range(0, len(indices), size):
            batch = self.batch(indices[at : at + size])
            more = ((0, size - len(batch["ids"])), (0, 0))
            ids = np.pad(batch["ids"], more, constant_values=tokenizer.PAD)
            yield ids, np.pad(batch["there"], more, constant_values=False)

    def spread(self, count: int) -> Int[np.ndarray, " m"]:
        """At most ``count`` windows, evenly spaced."""
        return np.unique(np.linspace(0, len(self) - 1, min(count, len(self))).astype(int))


def load(config: AbstractDataConfig, split: str, shortest: int = 1) -> Windows:
    """Loads a split; held-out windows do not overlap.

    Args:
      config: which text.
      split: ``train`` or ``validation``.
      shortest: bytes that at least one document has to have.

    Raises:
      DataError: no such source, no byte in it, or no document of the length asked for.
    """
    texts = data.load_texts(config.text, split, config.root)
    parts = [np.frombuffer(t.encode("utf-8"), np.uint8) for t in texts]
    sizes = np.asarray([len(p) for p in parts])
    if not sizes.sum():
        raise DataError(f"data.text={config.text}: the {split} part is empty")
    if sizes.max() < shortest:
        raise DataError(
            f"data.text={config.text}: the longest document of the {split} part has {sizes.max()} "
            f"bytes, a segment has {shortest} (segments.rule)"
        )
    stride = config.window if split != "train" else config.stride or max(1, config.window // 2)
    ends = np.cumsum(sizes)
    starts, stops = [], []
    for end, size in zip(ends, sizes, strict=True):
        # Where windows overlap, one that only repeats the end of the last says nothing new.
        count = 1 + max(0, -(-(int(size) - config.window) // stride))
        at = end - size + stride * np.arange(count)
        starts.append(at)
        stops.append(np.minimum(at + config.window, end))
    start, stop = np.concatenate(starts), np.concatenate(stops)
    kept = stop > start
    return Windows(np.concatenate(parts), start[kept], stop[kept], config.window)


def batch_specs(config: AbstractRun, phase: str) -> tuple[BatchSpec, ...]:
    """Shapes of the batches of `train_stream`, from the configuration alone."""
    rows, window = config.train.batch_size, config.data.window
    arrays = {
        "ids": jax.ShapeDtypeStruct((rows, window), np.int32),
        "there": jax.ShapeDtypeStruct((rows, window), bool),
    }
    if phase != "main":
        arrays[phase] = jax.ShapeDtypeStruct((rows,), bool)
    return (BatchSpec(phase, 1.0, arrays),)


def train_stream(config: AbstractRun, windows: Windows, phase: str):
    """Endless shuffled windows; the name of the phase's data is a field (see `system`)."""
    mark = {} if phase == "main" else {phase: np.asarray(True)}

    return data.pipeline(
        lambda i: {**windows.get(i), **mark},
        config.train.batch_size,
        size=len(windows),
        seed=config.seed,
        remainder="drop" if len(windows) >= config.train.batch_size else "wrap",
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
