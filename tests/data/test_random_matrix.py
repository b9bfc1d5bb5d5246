"""Generated sequences have the laws that they claim."""

from __future__ import annotations

import numpy as np
import pytest

from latent_jax.cli import main
from latent_jax.core.errors import DataError
from latent_jax.data import load_spacings
from latent_jax.data import random_matrix as rm
from latent_jax.data.synthetic import optimum


def test_cue_angles_are_those_of_the_matrix():
    unitary = rm._haar(np.random.default_rng(7), 40)
    np.testing.assert_allclose(unitary @ unitary.conj().T, np.eye(40), atol=1e-12)
    direct = np.sort(np.angle(np.linalg.eigvals(unitary)) % (2 * np.pi))
    np.testing.assert_allclose(rm.cue_angles(np.random.default_rng(7), 40), direct, atol=1e-10)


def test_haar_traces_have_their_known_moments():
    """E |tr U^k|^2 = k up to n, then n (Diaconis & Shahshahani 1994)."""
    rng = np.random.default_rng(1)
    angles = np.stack([rm.cue_angles(rng, 8) for _ in range(3000)])
    for k, expected in ((1, 1), (2, 2), (5, 5), (12, 8)):
        power = np.abs(np.exp(1j * k * angles).sum(axis=1)) ** 2
        assert power.mean() == pytest.approx(expected, abs=4 * power.std() / np.sqrt(3000))


def test_semicircle_count_is_the_integral_of_the_density():
    x = np.linspace(-2, 2, 4001)
    density = np.sqrt(4 - x**2) / (2 * np.pi)
    cumulative = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(x))])
    np.testing.assert_allclose(rm.semicircle_count(x), cumulative, atol=1e-5)


def test_gue_eigenvalues_have_the_ensembles_moments():
    rng = np.random.default_rng(2)
    values = np.stack([rm.gue_eigenvalues(rng, 30) for _ in range(2000)])
    # E tr H^2 / n = 1 and E tr H^4 / n = 2 + 1 / n^2
    for power, expected in ((2, 1), (4, 2 + 1 / 900)):
        found = (values**power).mean(axis=1)
        assert found.mean() == pytest.approx(expected, abs=4 * found.std() / np.sqrt(2000))


@pytest.mark.parametrize(
    ("source", "std", "neighbours"),
    [
        ("cue:n=64,count=12800", 0.4243, -0.308),
        ("gue:n=256,count=15200", 0.4243, -0.308),
        ("poisson:count=40000", 1.0, 0.0),
        ("picket:count=40000,sigma=0.1", 0.1, 0.0),
        ("ar:count=40000,phi=0.6,sigma=0.1", 0.125, 0.6),
    ],
)
def test_gaps_have_mean_one_and_the_known_spread(source, std, neighbours):
    got = load_spacings(source)
    assert got.values.dtype == np.float64 and not got.log_height.any()
    assert abs(got.values.mean() - 1) < 0.015
    assert got.values.std() == pytest.approx(std, rel=0.03)
    rows = got.values[: len(got.values) // got.run * got.run].reshape(-1, got.run)
    found = np.corrcoef(rows[:, :-1].ravel(), rows[:, 1:].ravel())[0, 1]
    assert found == pytest.approx(neighbours, abs=0.03)


def test_a_matrix_is_one_run_and_the_seed_decides():
    got = load_spacings("cue:n=32,count=100,seed=4")
    assert got.run == 32 and len(got.values) == 100
    # once around the circle
    np.testing.assert_allclose(got.values[:96].reshape(3, 32).sum(axis=1), 32)
    again = load_spacings("cue: seed=4, n=32, count=100").values
    np.testing.assert_array_equal(got.values, again)
    assert not np.array_equal(got.values, load_spacings("cue:n=32,count=100,seed=5").values)


def test_known_optima():
    half = 0.5 * np.log(2 * np.pi * np.e)
    assert optimum("poisson:") == 1.0
    assert optimum("picket:sigma=0.1") == pytest.approx(half + np.log(0.1))
    assert optimum("ar:") == pytest.approx(half + np.log(0.2))
    assert optimum("picket:sigma=0") == -np.inf and optimum("cue:") is None
    s = load_spacings("poisson:count=50000").values
    assert s.mean() == pytest.approx(optimum("poisson:"), abs=0.02)  # -ln p(s) = s
    assert set(load_spacings("picket:sigma=0,count=9").values) == {1.0}


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("cue:m=5", "'m=5' is not one of n=256, count=100000, seed=0"),
        ("cue:n=big", "'n=big' is not one of"),
        ("cue:n=1", "n=1 must be at least 2"),
        ("poisson:count=0", "count=0 must be at least 1"),
        ("picket:sigma=-1", "sigma=-1 must be at least 0"),
        ("picket:sigma=nan", "sigma=nan must be"),
        ("gue:n=4", "leaves no bulk"),
        ("ar:phi=1.1", "not stationary"),
        ("ar:phi=0.5/x", "is not one of"),
        ("cue:n=64,count=640", "runs of 64 gaps are too few for one window of 256"),
    ],
)
def test_bad_options_are_refused(source, says):
    with pytest.raises(DataError, match=says):
        load_spacings(source, window=256)


def test_the_command_writes_what_the_loader_reads(tmp_path, capsys):
    path = tmp_path / "gaps.npz"
    assert main(["data", "cue", "-n", "40", "--count", "90", "--out", str(path)]) == 0
    assert "90 gaps in runs of 40" in capsys.readouterr().out
    got = load_spacings(str(path))
    assert got.run == 40
    np.testing.assert_array_equal(got.values, load_spacings("cue:n=40,count=90").values)
    assert main(["data", "cue", "--out", str(tmp_path / "gaps.npy")]) == 2
    np.savez(path, gaps=np.full(9, 3.0), run=np.int64(9))
    with pytest.raises(DataError, match="mean 1"):
        load_spacings(str(path))
