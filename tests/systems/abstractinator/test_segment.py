"""Segmentation: partition, causality, the budget, and what an expander has to say."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latent_jax.core.errors import ConfigError
from latent_jax.systems.abstractinator import segment, tokenizer
from latent_jax.systems.abstractinator.tokenizer import BOS, EOP, PAD

WINDOW, LONGEST = 24, 6
RULES = ["fixed:5", "space", "space:3"]
# Mostly white space and letters, so that runs of both happen.
texts = st.lists(st.sampled_from(list(b"ab \n\xc3")), min_size=1, max_size=WINDOW)


def cut(raw, rule, budget=WINDOW, window=WINDOW):
    ids = np.full((1, window), PAD, np.int32)
    ids[0, : len(raw)] = list(raw)
    ids = jnp.asarray(ids)
    return ids, segment.segment(ids, ids != PAD, rule, LONGEST, budget)


@pytest.mark.parametrize("rule", RULES)
@given(raw=texts)
def test_segments_partition_the_text(rule, raw):
    _, found = cut(raw, rule)
    length, start = np.asarray(found.length[0]), np.asarray(found.start[0])
    kept = length[length > 0]
    assert int(found.overflow[0]) == 0 and kept.sum() == len(raw) and kept.max() <= LONGEST
    np.testing.assert_array_equal(start[: len(kept)], np.cumsum(kept) - kept)
    number = np.asarray(found.segment[0, : len(raw)])
    np.testing.assert_array_equal(number, np.repeat(np.arange(len(kept)), kept))
    place = np.concatenate([np.arange(n) for n in kept])
    np.testing.assert_array_equal(found.place[0, : len(raw)], place)


@pytest.mark.parametrize("rule", RULES)
@given(raw=texts, seen=st.integers(1, WINDOW))
def test_future_bytes_never_move_past_boundaries(rule, raw, seen):
    # The stream that has seen `seen` bytes is cut as the whole text is.
    seen = min(seen, len(raw))
    whole, _ = cut(raw, rule)
    part, _ = cut(raw[:seen], rule)
    np.testing.assert_array_equal(
        segment.starts(whole, rule, LONGEST)[0, :seen],
        segment.starts(part, rule, LONGEST)[0, :seen],
    )


def test_space_starts_at_the_first_byte_after_white_space():
    raw = b"to  be\nor unstoppable"
    _, found = cut(raw, "space")
    lengths = np.asarray(found.length[0])
    ends = np.cumsum(lengths[lengths > 0])
    pieces = [raw[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    assert pieces == [b"to  ", b"be\n", b"or ", b"unstop", b"pable"]
    assert np.asarray(found.open[0])[:5].tolist() == [False] * 4 + [True]


@given(raw=texts, least=st.integers(1, LONGEST))
def test_only_the_last_segment_is_shorter_than_it_may_be(raw, least):
    _, found = cut(raw, f"space:{least}")
    length, start = np.asarray(found.length[0]), np.asarray(found.start[0])
    count = int((length > 0).sum())
    assert (length[: count - 1] >= least).all()
    white = set(b" \t\n\r\v\f")
    for at, size in zip(start[1:count], length[: count - 1], strict=True):
        ends_word = raw[at - 1] in white and raw[at] not in white
        assert ends_word or size == LONGEST, "cut inside a word that is not too long"


def test_overflow_is_counted_and_nothing_else_is_kept():
    raw = b"a b c d e f"
    _, found = cut(raw, "space", budget=4)
    assert np.asarray(found.length[0]).tolist() == [2, 2, 2, 2]
    assert int(found.overflow[0]) == 3
    assert not np.asarray(found.open[0]).any(), "another segment follows the last one kept"


def test_targets_end_where_somebody_has_to_be_told():
    ids, found = cut(b"a bcdefgh i", "space", budget=5)
    said, counted, is_byte = segment.targets(ids, found, LONGEST, EOP)
    shown = [
        [("." if t == EOP else chr(t)) for t, c in zip(row, keep, strict=True) if c]
        for row, keep in zip(said[0].tolist(), counted[0].tolist(), strict=True)
    ]
    # "bcdefg" has the greatest length and "i" the window's end: neither needs a mark.
    assert ["".join(s) for s in shown] == ["a .", "bcdefg", "h .", "i", ""]
    assert int(is_byte.sum()) == 11


def test_bytes_and_specials():
    assert tokenizer.encode("é\n").tolist() == [195, 169, 10]
    assert len({BOS, EOP, PAD}) == 3 and min(BOS, EOP, PAD) >= 256
    assert tokenizer.decode([BOS, 104, 105, EOP, PAD]) == "hi"


@pytest.mark.parametrize(
    "rule", ["fixed", "fixed:0", "fixed:-3", "words", "space:0", "space:x", "learned:2", ""]
)
def test_bad_rules(rule):
    with pytest.raises(ConfigError, match="no such rule"):
        segment.parse_rule(rule)
