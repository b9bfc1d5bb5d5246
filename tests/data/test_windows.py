"""Splits and sliding windows: nothing is shared, nothing is lost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latent_jax.core.errors import DataError
from latent_jax.data.windows import check_disjoint, split_interleaved, split_tail, window_starts


def members(ranges):
    return [i for start, stop in ranges for i in range(start, stop)]


def test_tail_by_whole_windows():
    split = split_tail(2_001_051, 0.1, unit=256)
    assert len(window_starts(split.train, 256, 256)) == 7035
    assert len(window_starts(split.validation, 256, 256)) == 781
    assert split.train[-1, 1] == split.validation[0, 0] and split.validation[-1, 1] == 2_001_051


@given(st.integers(20, 3000), st.floats(0.06, 0.6), st.integers(2, 20))
def test_splits_partition_the_sequence(n, fraction, blocks):
    for make in (lambda: split_tail(n, fraction), lambda: split_interleaved(n, blocks, fraction)):
        try:
            split = make()
        except DataError:
            continue  # one part empty: said so
        assert sorted(members(split.train) + members(split.validation)) == list(range(n))
        share = len(members(split.validation)) / n
        assert abs(share - fraction) < 1 / blocks + 1 / n


def test_interleaved_blocks_are_spread_evenly():
    split = split_interleaved(10_000, 100, 0.1)
    assert len(split.validation) == 10
    assert set(np.diff(split.validation, axis=1).ravel()) == {100}
    assert set(np.diff(split.validation[:, 0])) == {1000}


@given(
    st.integers(40, 400),
    st.integers(1, 12),
    st.integers(1, 12),
    st.sampled_from([0, 17, 30, 1000]),
    st.integers(2, 8),
)
def test_windows_are_exactly_those_that_cross_nothing(n, length, stride, run, blocks):
    split = split_interleaved(n, blocks, 0.3)
    starts = {part: window_starts(getattr(split, part), length, 1, run) for part in split._fields}
    for part, ranges in split._asdict().items():
        inside = set(members(ranges))
        whole = [
            s
            for s in range(n - length + 1)
            if set(range(s, s + length)) <= inside
            # ranges that touch are one stretch; runs break it
            and (not run or s // run == (s + length - 1) // run)
        ]
        assert starts[part].tolist() == whole
        assert set(window_starts(ranges, length, stride, run)) <= set(whole)
    check_disjoint(starts["train"], starts["validation"], length)


@given(st.lists(st.integers(0, 200), min_size=1), st.lists(st.integers(0, 200), min_size=1))
def test_shared_gaps_are_found(train, validation):
    shared = any(abs(a - b) < 5 for a in train for b in validation)
    if shared:
        with pytest.raises(DataError, match="share gaps"):
            check_disjoint(np.array(train), np.array(validation), 5)
    else:
        check_disjoint(np.array(train), np.array(validation), 5)


@pytest.mark.parametrize(
    ("work", "says"),
    [
        (lambda: split_tail(9, 0.1), "leaves one part empty"),
        (lambda: split_tail(1000, 0.1, unit=256), "leaves one part empty"),
        (lambda: split_interleaved(5, 10), "blocks=10 must be between 2 and the 5"),
        (lambda: split_interleaved(50, 10, 1.5), "fraction=1.5"),
        (lambda: split_interleaved(50, 2, 0.01), "leaves one part empty"),
        (lambda: window_starts(np.array([[0, 9]]), 10), "longest unbroken stretch has 9"),
        (lambda: window_starts(np.array([[0, 99]]), 10, run=8), "longest unbroken stretch has 8"),
        (lambda: window_starts(np.array([[0, 99]]), 10, stride=0), "stride=0"),
    ],
)
def test_impossible_sizes_are_refused(work, says):
    with pytest.raises(DataError, match=says):
        work()
