"""Input pipelines on Grain: shuffled, bucketed, padded, sliced per process, resumable.

A *batch* is a flat dict of numpy arrays with a leading batch axis. Next to every padded field
``x`` it holds ``x_mask`` (True on real entries), unless the records bring an ``x_mask`` of their
own or ``x`` is boolean (a mask itself, padded with False); and always ``valid`` (False on rows
that only fill an evaluation batch up).
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from latent_jax.core.errors import DataError
from latent_jax.data.plan import BatchPlan

Record = Mapping[str, Any]
Batch = dict[str, np.ndarray]
State = dict[str, Any]


class BatchIterator:
    """Iterator over batches whose position is one small JSON-able dict.

    Made by `pipeline`. Grain's read threads run ahead; the state counts what was handed out, so
    nothing is lost or doubled on resume. The state does not depend on the number of processes.

    Attributes:
        plan: the batches of every epoch.
    """

    def __init__(
        self, plan: BatchPlan, fetch: Callable[[int], Batch], fingerprint: str, read_threads: int
    ):
        import grain  # takes seconds, and who only loads examples does not need it

        self.plan = plan
        self.fingerprint = fingerprint
        steps = 2**40 if plan.repeat else len(plan)
        options = grain.ReadOptions(
            num_threads=read_threads, prefetch_buffer_size=max(1, 2 * read_threads)
        )
        if read_threads == 0:
            options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        self._dataset = grain.MapDataset.range(steps).map(fetch).to_iter_dataset(options)
        self._iterator = iter(self._dataset)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    def __len__(self) -> int:
        """Batches of one epoch."""
        return len(self.plan)

    def get_state(self) -> State:
        """Position after the last batch handed out, as plain JSON types."""
        step = int(self._iterator.get_state()["next_index"])
        return {"step": step, "fingerprint": self.fingerprint}

    def set_state(self, state: State | bytes | str) -> None:
        """Continues from a state of `get_state` (a dict, or its JSON).

        Raises:
            DataError: the state is of another source, batch size or seed.
        """
        state = _decode(state, ("step", "fingerprint"))
        if state["fingerprint"] != self.fingerprint:
            raise DataError(
                "data state does not belong to this pipeline: saved with "
                f"{state['fingerprint']}, now {self.fingerprint}"
            )
        self._iterator.set_state({"next_index": int(state["step"])})

    def close(self) -> None:
        """Stops the read threads."""
        self._iterator.close()


def _decode(state: State | bytes | str, keys: Sequence[str]) -> State:
    if isinstance(state, bytes | str):
        try:
            state = json.loads(state)
        except ValueError:
            raise DataError("data state is not JSON; the checkpoint is damaged") from None
    if not isinstance(state, dict) or any(key not in state for key in keys):
        raise DataError(f"data state lacks {list(keys)}; the checkpoint is damaged")
    return state


def pipeline(
    source: Sequence[Record] | Callable[[int], Record],
    batch_size: int,
    *,
    size: int | None = None,
    buckets: Mapping[str, int | Sequence[int]] | None = None,
    lengths: Sequence[int] | None = None,
    pad: Mapping[str, float] | None = None,
    overflow: str = "error",
    seed: int = 0,
    shuffle: bool = True,
    repeat: bool = True,
    remainder: str = "drop",
    process_index: int = 0,
    process_count: int = 1,
    read_threads: int = 1,
) -> BatchIterator:
    """Builds a deterministic, resumable stream of batches.

    Args:
        source: random-access records (dicts of numbers and numpy arrays), or a function of the
            index (give `size`), which is called lazily in a read thread.
        batch_size: rows of a *global* batch; each process gets ``batch_size / process_count``.
        size: number of records, when `source` is a function.
        buckets: variable-length fields (axis 0) and the lengths they are padded to. One field may
            have several lengths: batches are then formed of similarly long records, and each batch
            has one of these static shapes on every process.
        lengths: length of the several-bucket field in each record; computed from `source` when
            left out, which needs one pass over it.
        pad: fill value of a padded field; default 0.
        overflow: a record longer than its longest bucket: ``error``, or ``truncate`` to it.
        seed: of the shuffling.
        shuffle: new order each epoch.
        repeat: endless epochs.
        remainder: incomplete batch of an epoch: ``drop``, ``pad`` (rows marked not `valid`; for
            evaluation) or ``wrap``.
        process_index: which slice of each global batch to read.
        process_count: number of slices.
        read_threads: Grain threads that run ahead; 0 reads in the caller.

    Returns:
        The iterator.

    Raises:
        DataError: no records, a batch size that does not divide, bad buckets, or (while iterating)
            a record that is too long or whose shape differs from its neighbours'.
    """
    if callable(source):
        if size is None:
            raise DataError("pipeline: a function as source needs 'size'")
        get: Callable[[int], Record] = source
    else:
        size, get = len(source), source.__getitem__
    if process_count < 1 or batch_size % process_count:
        raise DataError(
            f"pipeline: batch_size={batch_size} is not a multiple of the {process_count} processes"
        )
    if not 0 <= process_index < process_count:
        raise DataError(f"pipeline: process_index={process_index} is not below {process_count}")
    if overflow not in ("error", "truncate"):
        raise DataError(f"pipeline: overflow='{overflow}' unknown, use 'error' or 'truncate'")
    table = {name: _bucket_lengths(name, value) for name, value in (buckets or {}).items()}
    several = [name for name, value in table.items() if len(value) > 1]
    if len(several) > 1:
        raise DataError(f"pipeline: only one field may have several buckets, not {several}")
    bucket_of = None
    if several:
        (field,) = several
        if lengths is None:
            lengths = [len(get(index)[field]) for index in range(size)]
        # a record past the last bucket is truncated or refused when it is read
        bucket_of = np.searchsorted(table[field], np.asarray(lengths))
        bucket_of = np.minimum(bucket_of, len(table[field]) - 1)
    plan = BatchPlan(
        size,
        batch_size,
        seed=seed,
        shuffle=shuffle,
        repeat=repeat,
        remainder=remainder,
        bucket_of=bucket_of,
    )
    rows = batch_size // process_count
    mine = slice(process_index * rows, (process_index + 1) * rows)
    fills = dict(pad or {})

    def fetch(step: int) -> Batch:
        planned = plan.batch(step)
        widths = {n: v[planned.bucket] if len(v) > 1 else v[0] for n, v in table.items()}
        indices = planned.indices[mine]
        batch = collate([get(int(i)) for i in indices], widths, fills, overflow, indices)
        batch["valid"] = planned.valid[mine].copy()
        return batch

    shapes = zlib.crc32(repr((sorted(table.items()), overflow)).encode())
    order = 0 if bucket_of is None else zlib.crc32(bucket_of.astype(np.int32).tobytes())
    fingerprint = (
        f"size={size} batch_size={batch_size} seed={seed} shuffle={shuffle} repeat={repeat} "
        f"remainder={remainder} buckets={shapes:08x}{order:08x}"
    )
    return BatchIterator(plan, fetch, fingerprint, read_threads)


def _bucket_lengths(name: str, value: int | Sequence[int]) -> tuple[int, ...]:
    lengths = (value,) if isinstance(value, int) else tuple(value)
    if not lengths or any(n < 1 for n in lengths) or list(lengths) != sorted(set(lengths)):
        raise DataError(f"pipeline: buckets of '{name}' are {value}; give increasing lengths >= 1")
    return lengths


def collate(
    records: Sequence[Record],
    widths: Mapping[str, int],
    pad: Mapping[str, float] | None = None,
    overflow: str = "error",
    indices: Sequence[int] | None = None,
) -> Batch:
    """Stacks records, padding the fields in `widths` on the right.

    Args:
        records: dicts with equal keys.
        widths: padded length of axis 0 of each variable-length field.
        pad: fill value per field; default 0.
        overflow: ``error`` or ``truncate``.
        indices: the records' numbers, for error messages.

    Returns:
        Stacked fields, and a ``<field>_mask`` for each field in `widths` that is not boolean and
        has none of its own.

    Raises:
        DataError: a missing field, a record that is too long, or unequal shapes.
    """
    numbers = range(len(records)) if indices is None else indices
    batch: Batch = {}
    for name in records[0]:
        values = []
        for number, record in zip(numbers, records, strict=True):
            if name not in record:
                raise DataError(f"pipeline: record {number} has no field '{name}'")
            values.append(np.asarray(record[name]))
        if name in widths:
            fill = (pad or {}).get(name, 0)
            batch[name], mask = _pad(name, values, widths[name], fill, overflow, numbers)
            if f"{name}_mask" not in records[0] and batch[name].dtype != bool:
                batch[f"{name}_mask"] = mask
            continue
        shapes = {value.shape for value in values}
        if len(shapes) > 1:
            raise DataError(
                f"pipeline: field '{name}' has shapes {sorted(shapes)} in one batch; give it a "
                "bucket"
            )
        batch[name] = np.stack(values)
    for name in widths:
        if name not in batch:
            raise DataError(f"pipeline: bucketed field '{name}' is in no record")
    return batch


def _pad(
    name: str,
    values: list[np.ndarray],
    width: int,
    fill: float,
    overflow: str,
    numbers: Sequence[int],
) -> tuple[np.ndarray, np.ndarray]:
    out = np.full((len(values), width, *values[0].shape[1:]), fill, values[0].dtype)
    mask = np.zeros((len(values), width), bool)
    for row, (number, value) in enumerate(zip(numbers, values, strict=True)):
        if len(value) > width and overflow == "error":
            raise DataError(
                f"pipeline: record {number}: field '{name}' has {len(value)} entries, its longest "
                f"bucket {width}; add a bucket or set overflow 'truncate'"
            )
        count = min(len(value), width)
        out[row, :count] = value[:count]
        mask[row, :count] = True
    return out, mask
