"""Batches: each example once per epoch, static shapes, exact resume, any process count."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_jax.core.errors import DataError
from latent_jax.data import mix, pack, pipeline
from latent_jax.data.plan import BatchPlan

BUCKETS = {"x": (8, 16, 40)}


def records(n=53):
    return [{"x": np.arange(i % 37 + 1, dtype=np.int32), "number": i} for i in range(n)]


def make(n=53, batch_size=8, **options):
    return pipeline(records(n), batch_size, **({"buckets": BUCKETS} | options))


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_equal(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])
            assert a[key].dtype == b[key].dtype


@settings(max_examples=60)
@given(
    size=st.integers(1, 60),
    batch_size=st.integers(1, 12),
    seed=st.integers(0, 9),
    shuffle=st.booleans(),
    remainder=st.sampled_from(["drop", "pad", "wrap"]),
    buckets=st.integers(1, 4),
)
def test_an_epoch_holds_each_example_once(size, batch_size, seed, shuffle, remainder, buckets):
    bucket_of = np.random.default_rng(seed).integers(buckets, size=size)
    options = dict(seed=seed, shuffle=shuffle, remainder=remainder, bucket_of=bucket_of)
    if remainder == "drop" and size < batch_size:
        with pytest.raises(DataError, match="do not fill one batch"):
            BatchPlan(size, batch_size, **options)
        return
    plan = BatchPlan(size, batch_size, **options)
    for epoch in range(2):
        batches = [plan.batch(epoch * len(plan) + k) for k in range(len(plan))]
        seen = np.concatenate([b.indices[b.valid] for b in batches])
        assert all(len(b.indices) == batch_size for b in batches)
        assert all((bucket_of[b.indices] <= b.bucket).all() for b in batches)
        if remainder == "wrap":
            assert set(seen) == set(range(size)) and all(b.valid.all() for b in batches)
        else:
            lost = size % batch_size if remainder == "drop" else 0
            assert len(seen) == len(set(seen.tolist())) == size - lost


def test_epochs_are_shuffled_differently_and_file_order_is_kept_without():
    orders = [np.concatenate([b["number"] for b in take(make(48), 6)])]
    iterator = make(48)
    first, second = (np.concatenate([b["number"] for b in take(iterator, 6)]) for _ in range(2))
    np.testing.assert_array_equal(first, orders[0])
    assert not np.array_equal(first, second)
    plain = pipeline(records(48), 8, buckets={"x": 40}, shuffle=False)
    np.testing.assert_array_equal(
        np.concatenate([b["number"] for b in take(plain, 6)]), np.arange(48)
    )


def test_few_static_shapes_with_masks():
    batches = take(make(200, pad={"x": -1}), 50)
    assert {b["x"].shape for b in batches} == {(8, 8), (8, 16), (8, 40)}
    for batch in batches:
        for row, mask, number in zip(batch["x"], batch["x_mask"], batch["number"], strict=True):
            length = number % 37 + 1
            np.testing.assert_array_equal(row[mask], np.arange(length))
            assert (row[~mask] == -1).all()
    assert batches[0]["x"].dtype == np.int32


def test_records_may_bring_their_own_masks():
    def get(i):
        return {"x": np.arange(1, 4), "x_mask": np.array([True, False, True]),
                "keep": np.ones(3, bool)}

    batch = next(pipeline(get, 2, size=4, buckets=dict.fromkeys(("x", "x_mask", "keep"), 5)))
    assert set(batch) == {"x", "x_mask", "keep", "valid"}
    assert batch["x_mask"].tolist() == [[True, False, True, False, False]] * 2


def test_evaluation_pads_the_last_batch_and_stops():
    batches = list(make(21, shuffle=False, repeat=False, remainder="pad"))
    assert len(batches) == 3
    kept = np.concatenate([b["number"][b["valid"]] for b in batches])
    assert sorted(kept) == list(range(21))
    assert sum(b["valid"].sum() for b in batches) == 21


@pytest.mark.parametrize("read_threads", [0, 2])
@pytest.mark.parametrize("at", [0, 1, 7, 13])
def test_resume_equals_uninterrupted(at, read_threads):
    through = take(make(seed=5), 25)
    first = make(seed=5, read_threads=read_threads)
    assert_equal(take(first, at), through[:at])
    state = json.loads(json.dumps(first.get_state()))
    take(first, 3)  # going on must not change a saved state
    fresh = make(seed=5, read_threads=read_threads)
    fresh.set_state(state)
    assert fresh.get_state() == state
    assert_equal(take(fresh, 25 - at), through[at:])
    used = first
    used.set_state(json.dumps(state).encode())
    assert_equal(take(used, 5), through[at : at + 5])


def test_processes_slice_the_same_batches():
    whole = take(make(), 12)
    parts = [make(process_index=i, process_count=4) for i in range(4)]
    for batch in whole:
        slices = [next(part) for part in parts]
        joined = {key: np.concatenate([s[key] for s in slices]) for key in batch}
        assert_equal([joined], [batch])
    # a state saved by one process of four continues on one of one
    alone = make()
    alone.set_state(parts[2].get_state())
    assert_equal([next(alone)], [take(make(), 13)[-1]])


def test_a_function_as_source_is_read_lazily():
    asked = []

    def get(index):
        asked.append(index)
        return {"x": np.full(3, index)}

    iterator = pipeline(get, 4, size=1000, read_threads=0)
    next(iterator)
    assert len(asked) == 4


def test_state_of_another_pipeline_is_refused():
    state = make(seed=1).get_state()
    for other in (make(seed=2), make(n=54, seed=1), make(batch_size=4, seed=1)):
        with pytest.raises(DataError, match="does not belong to this pipeline"):
            other.set_state(state)
    for broken in (b"{", {"step": 1}, "[]"):
        with pytest.raises(DataError, match="damaged"):
            make().set_state(broken)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"n": 0}, "no examples"),
        ({"n": 5}, "5 examples do not fill one batch of 8"),
        ({"process_count": 3}, "not a multiple of the 3 processes"),
        ({"process_count": 2, "process_index": 2}, "process_index=2"),
        ({"remainder": "keep"}, "remainder='keep'"),
        ({"overflow": "ignore"}, "overflow='ignore'"),
        ({"buckets": {"x": (16, 8)}}, "increasing lengths"),
        ({"buckets": {"x": (8, 40), "number": (1, 2)}}, "only one field"),
    ],
)
def test_bad_options(options, says):
    with pytest.raises(DataError, match=says):
        make(**options)


@pytest.mark.parametrize("read_threads", [0, 1])
def test_bad_records_are_named(read_threads):
    with pytest.raises(DataError, match=r"record \d+: field 'x' has .* longest bucket 16"):
        take(make(buckets={"x": (8, 16)}, read_threads=read_threads), 10)
    short = take(make(buckets={"x": (8, 16)}, overflow="truncate"), 10)
    assert max(b["x"].shape[1] for b in short) == 16
    with pytest.raises(DataError, match="give it a bucket"):
        next(make(buckets={}, read_threads=read_threads))
    with pytest.raises(DataError, match="'y' is in no record"):
        next(make(buckets={"x": 40, "y": 3}, read_threads=read_threads))


def streams(seed=0):
    return {
        "ae": pipeline(lambda i: {"v": i}, 2, size=30, seed=seed),
        "qa": pipeline(lambda i: {"v": 100 + i}, 2, size=50, seed=seed),
        "cont": pipeline(lambda i: {"v": 200 + i}, 2, size=40, seed=seed),
    }


SHARES = {"ae": 0.5, "qa": 0.3, "cont": 0.2}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_mixture_keeps_its_shares_at_any_time(seed):
    mixture = mix(streams(), SHARES, seed)
    tasks = np.array([next(mixture)["task"][0] for _ in range(200)])
    for task, share in enumerate(SHARES.values()):
        counts = np.cumsum(tasks == task)
        assert np.abs(counts - share * np.arange(1, 201)).max() < 5


def test_mixture_labels_and_resumes():
    through = take(mix(streams(), SHARES, seed=3), 60)
    assert all((b["v"] // 100 == np.array([0, 1, 2])[b["task"]]).all() for b in through)
    first = mix(streams(), SHARES, seed=3)
    take(first, 23)
    fresh = mix(streams(), SHARES, seed=3)
    fresh.set_state(json.dumps(first.get_state()))
    assert_equal(take(fresh, 37), through[23:])


def test_mixture_weights_may_be_schedules():
    ramp = {"ae": lambda step: 1.0 if step < 10 else 0.0, "qa": 0.0,
            "cont": lambda step: float(step >= 10)}
    tasks = [next_batch["task"][0] for next_batch in take(mix(streams(), ramp), 20)]
    assert tasks == [0] * 10 + [2] * 10


def test_mixture_refuses():
    with pytest.raises(DataError, match="no streams"):
        mix({}, {})
    with pytest.raises(DataError, match="weights for"):
        mix(streams(), {"ae": 1.0})
    with pytest.raises(DataError, match="not all zero"):
        mix(streams(), dict.fromkeys(SHARES, 0.0))
    with pytest.raises(DataError, match="does not belong to this mixture"):
        mix(streams(), SHARES, seed=1).set_state(mix(streams(), SHARES, seed=2).get_state())


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 25), min_size=1, max_size=40).filter(any),
    length=st.integers(1, 12),
)
def test_packing_loses_nothing_and_never_mixes(lengths, length):
    tokens = iter(range(1, 10_000))
    documents = [[next(tokens) for _ in range(n)] for n in lengths]
    packed = pack(documents, length, pad_id=-1)
    used = packed["segment_ids"] > 0
    assert sorted(packed["tokens"][used]) == sorted(t for d in documents for t in d)
    assert (packed["tokens"][~used] == -1).all() and (packed["positions"][~used] == 0).all()
    pieces = {tuple(d[s : s + length]) for d in documents for s in range(0, len(d), length)}
    for row, ids, positions in zip(*packed.values(), strict=True):
        for number in range(1, ids.max() + 1):
            inside = ids == number
            assert tuple(row[inside]) in pieces
            np.testing.assert_array_equal(positions[inside], np.arange(inside.sum()))


def test_packing_fills_rows_and_stops():
    documents = [[1] * n for n in np.random.default_rng(0).integers(2, 30, size=300)]
    packed = pack(documents, 64)
    assert (packed["segment_ids"] > 0).mean() > 0.93
    assert pack(documents, 64, max_rows=5)["tokens"].shape == (5, 64)
    with pytest.raises(DataError, match="no tokens"):
        pack([[], []], 8)
    with pytest.raises(DataError, match="length=0"):
        pack([[1]], 0)
