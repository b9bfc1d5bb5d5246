"""Answer and reconstruction scores against hand-computed values."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax.systems.latentwire import metrics


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Cat!", "cat"),
        ("an apple a day", "apple day"),
        ("U.S.A.", "usa"),
        ("theory of  anything", "theory of anything"),
        ("$1,000.50", "100050"),
        ("", ""),
    ],
)
def test_normalise_follows_the_official_script(text, expected):
    assert metrics.normalise(text) == expected


def test_f1_and_em_take_the_best_answer():
    assert metrics.exact_match("the Eiffel Tower.", ["tower", "Eiffel tower"]) == 1.0
    assert metrics.exact_match("Eiffel", ["Eiffel Tower"]) == 0.0
    # guess {big, red, dog}, gold {red, dog}: p = 2/3, r = 1 -> 0.8
    assert metrics.f1("a big red dog", ["cat", "red dog"]) == pytest.approx(0.8)
    # repeated words count once per occurrence: p = 1/3, r = 1/2
    assert metrics.f1("dog dog dog", ["red dog"]) == pytest.approx(0.4)
    assert metrics.f1("", ["dog"]) == 0.0 and metrics.f1("dog", []) == 0.0


def test_nll_is_masked_and_counts_tokens():
    logits = jnp.log(jnp.array([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [1.0, 1.0, 1.0]]]))
    mean = metrics.nll(logits, jnp.array([[0, 2, 0]]), jnp.array([[True, True, False]]))
    assert float(mean.count) == 2
    assert float(mean.sum) == pytest.approx(-math.log(0.5) - math.log(0.8), rel=1e-5)


def test_in_top_k():
    logits = jnp.array([[3.0, 2.0, 1.0, 0.0]])
    hits = [bool(metrics.in_top_k(logits, jnp.array([2]), k)[0]) for k in (1, 2, 3)]
    assert hits == [False, False, True]


def test_agreement():
    gold = np.array([[1, 2, 3, 4], [5, 6, 0, 0], [7, 8, 9, 0]])
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]], bool)
    guess = np.array([[1, 2, 9, 4, 1], [5, 6, 6, 6, 1], [0, 8, 9, 0, 1]])
    got = metrics.agreement(guess, gold, mask)
    np.testing.assert_array_equal(got["correct"], [3, 2, 2])
    np.testing.assert_array_equal(got["count"], [4, 2, 3])
    np.testing.assert_array_equal(got["prefix"], [2, 2, 0])
    np.testing.assert_array_equal(got["exact"], [False, True, False])


def test_bleu_against_hand_values():
    assert metrics.bleu([1, 2, 3, 4, 5], [1, 2, 3, 4, 5]) == pytest.approx(1.0)
    # 3 of 4 unigrams, then (1+1)/(3+1), (0+1)/(2+1), (0+1)/(1+1)
    expected = (0.75 * 0.5 * (1 / 3) * 0.5) ** 0.25
    assert metrics.bleu([1, 2, 9, 4], [1, 2, 3, 4]) == pytest.approx(expected)
    short = metrics.bleu([1, 2], [1, 2, 3, 4])
    assert short == pytest.approx(math.exp(1 - 2) * 1.0)
    assert metrics.bleu([], [1]) == 0.0
