"""The verdict on annealing, from logs of which it is known."""

from __future__ import annotations

import functools
import json

import pytest

from latent_jax.report.names import TITLES
from latent_jax.systems.latentwire.annealing import FLOOR, VERDICTS, verdict
from latent_jax.systems.latentwire.system import LatentWireSystem


def log(cosines, losses, weights):
    rows = zip(cosines, losses, weights, strict=True)
    return [
        {"step": i, "embedding_cosine": c, "term.answer": x, "weight.answer": w, "loss": x}
        for i, (c, x, w) in enumerate(rows, 1)
    ]


OFF, ON = [0.0] * 10, [0.1] * 10
WARM = [0.7] * 5 + [0.9] * 5


@pytest.mark.parametrize(
    "cosines, losses, expected",
    [
        (WARM + [0.9] * 10, [5.0] * 15 + [2.0] * 5, "improved"),
        (WARM + [0.9] * 10, [5.0] * 20, "stable"),
        (WARM + [0.85] * 10, [5.0] * 15 + [2.0] * 5, "degraded"),
        (WARM + [0.55] * 10, [5.0] * 15 + [2.0] * 5, "collapsed"),
        # A run that was stopped at the floor has few rows below it.
        (WARM + [0.9] * 7 + [0.5] * 3, [5.0] * 20, "collapsed"),
    ],
)
def test_the_verdict_follows_from_cosine_and_loss(cosines, losses, expected):
    found = verdict(log(cosines, losses, OFF + ON))
    assert found.name == expected
    # The warm-up counts from where it ended, not from its mean.
    assert found.cosine[0] == pytest.approx(0.9) and found.loss[0] == pytest.approx(5.0)
    assert found.numbers()["annealing.verdict"] == 1 - VERDICTS.index(expected)
    assert found.line().startswith(expected) and f"{cosines[-1]:.2f}" in found.line()
    json.dumps(found.numbers())
    assert "annealing" in TITLES


def test_without_a_warm_up_the_first_steps_are_before():
    found = verdict(log([0.7] * 10 + [0.9] * 10, [4.0] * 10 + [1.0] * 10, ON + ON))
    assert (found.name, found.cosine[0], found.loss) == ("improved", pytest.approx(0.7), (4.0, 1.0))


def test_a_cosine_that_is_not_a_number_is_a_collapse():
    assert verdict(log([0.9] * 17 + [float("nan")] * 3, [1.0] * 20, OFF + ON)).name == "collapsed"
    assert FLOOR == 0.60


def test_other_runs_have_no_verdict():
    rows = log([0.9] * 20, [1.0] * 20, OFF + ON)
    others = [{k: v for k, v in row.items() if k != "embedding_cosine"} for row in rows]
    assert verdict(others) is None
    assert verdict(log([0.9] * 20, [1.0] * 20, OFF + OFF)) is None
    assert verdict(rows[:4]) is None


def test_results_hold_the_verdict_of_a_run_s_log(tmp_path):
    judge = functools.partial(LatentWireSystem.judge, None)
    assert judge(tmp_path) == {}
    rows = log(WARM + [0.55] * 10, [5.0] * 20, OFF + ON)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = judge(tmp_path)
    assert found["annealing.verdict"] == -2 and found["annealing.cosine"] == pytest.approx(0.55)
