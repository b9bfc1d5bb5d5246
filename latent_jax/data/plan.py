"""Which examples form batch number k: a pure function of (seed, k), the same on every process.

That makes an input pipeline resumable from one integer and lets the number of processes change
between save and restore.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from latent_jax.core.errors import DataError

REMAINDERS = ("drop", "pad", "wrap")


@dataclasses.dataclass(frozen=True)
class PlannedBatch:
    """One global batch.

    Attributes:
        indices: examples of the batch, all `batch_size` rows of it.
        valid: False where a row only fills the batch up.
        bucket: which length bucket the batch is padded to.
    """

    indices: np.ndarray
    valid: np.ndarray
    bucket: int


class BatchPlan:
    """Partitions every epoch into batches of one length bucket each.

    Examples are shuffled, sorted into buckets, and cut into batches; what is left of a bucket
    moves on to the next longer one, so that at most one batch per epoch is incomplete. The
    batches of an epoch are then shuffled as well.

    Args:
        size: number of examples.
        batch_size: rows of a global batch, over all processes.
        seed: same seed, same batches.
        shuffle: new order each epoch; else file order.
        repeat: endless epochs; else one.
        remainder: the incomplete batch of an epoch: ``drop`` it, ``pad`` it with repeats of its
            first row marked invalid, or ``wrap`` around with valid rows from the same epoch.
        bucket_of: bucket of each example; None for a single bucket.

    Raises:
        DataError: no examples, an impossible batch size, or nothing left after dropping.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        repeat: bool = True,
        remainder: str = "drop",
        bucket_of: Sequence[int] | np.ndarray | None = None,
    ):
        if size < 1:
            raise DataError("pipeline: the source has no examples")
        if batch_size < 1:
            raise DataError(f"pipeline: batch_size={batch_size} must be at least 1")
        if remainder not in REMAINDERS:
            raise DataError(f"pipeline: remainder='{remainder}' unknown, use one of {REMAINDERS}")
        if remainder == "drop" and size < batch_size:
            raise DataError(
                f"pipeline: {size} examples do not fill one batch of {batch_size}; use a smaller "
                "batch_size or remainder 'wrap' or 'pad'"
            )
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.shuffle, self.repeat, self.remainder = shuffle, repeat, remainder
        self.bucket_of = np.zeros(size, int) if bucket_of is None else np.asarray(bucket_of)
        if self.bucket_of.shape != (size,):
            raise DataError(f"pipeline: {len(self.bucket_of)} lengths for {size} examples")
        whole, rest = divmod(size, batch_size)
        self.batches_per_epoch = whole + (1 if rest and remainder != "drop" else 0)
        self._epochs: dict[int, list[PlannedBatch]] = {}

    def __len__(self) -> int:
        """Batches of one epoch."""
        return self.batches_per_epoch

    def batch(self, step: int) -> PlannedBatch:
        """Batch number `step`, counted through all epochs.

        Raises:
            IndexError: past the only epoch of a plan that does not repeat.
        """
        epoch, within = divmod(step, self.batches_per_epoch)
        if step < 0 or (epoch and not self.repeat):
            raise IndexError(step)
        # Read threads run ahead of the consumer across an epoch border, hence two epochs. Two
        # threads may make the same epoch twice; both results are equal.
        batches = self._epochs.get(epoch)
        if batches is None:
            batches = self._make_epoch(epoch)
            self._epochs = {k: v for k, v in list(self._epochs.items()) if k >= epoch - 1}
            self._epochs[epoch] = batches
        return batches[within]

    def _make_epoch(self, epoch: int) -> list[PlannedBatch]:
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(self.size) if self.shuffle else np.arange(self.size)
        buckets = self.bucket_of[order]
        batches: list[PlannedBatch] = []
        carried = np.empty(0, order.dtype)
        full = np.ones(self.batch_size, bool)
        last = 0
        for bucket in np.unique(buckets):
            last = int(bucket)
            members = np.concatenate([carried, order[buckets == bucket]])
            cut = len(members) - len(members) % self.batch_size
            for row in members[:cut].reshape(-1, self.batch_size):
                batches.append(PlannedBatch(row, full, last))
            carried = members[cut:]
        if len(carried) and self.remainder != "drop":
            missing = self.batch_size - len(carried)
            if self.remainder == "pad":
                fill, valid = np.repeat(carried[:1], missing), np.arange(self.batch_size)
                valid = valid < len(carried)
            else:
                # only examples that fit the last bucket, which all do
                fill, valid = np.resize(order, missing), full
            batches.append(PlannedBatch(np.concatenate([carried, fill]), valid, last))
        if self.shuffle:
            batches = [batches[i] for i in rng.permutation(len(batches))]
        return batches
