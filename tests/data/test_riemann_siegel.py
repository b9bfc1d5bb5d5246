"""Our own zeros against an independent library, published digits and the table."""

from __future__ import annotations

import numpy as np
import pytest

from latent_jax.cli import main
from latent_jax.core.errors import DataError
from latent_jax.core.fetch import cached
from latent_jax.data import load_spacings
from latent_jax.data import riemann_siegel as rs
from latent_jax.data.zero_files import as_text, read_zeros
from latent_jax.data.zeros import unfold

FIRST = [14.134725142, 21.022039639, 25.010857580, 30.424876126, 32.935061588, 37.586178159]


@pytest.fixture(scope="module")
def mpmath():
    return pytest.importorskip("mpmath")


def test_theta_agrees_with_mpmath(mpmath):
    t = np.array([14.0, 20.0, 100.0, 1e4])
    expected = [float(mpmath.siegeltheta(x)) for x in t]
    np.testing.assert_allclose(rs.theta(t), expected, atol=2e-11)
    near = rs.theta_between(100.0, np.array([0.5, 3.0]))
    np.testing.assert_allclose(
        near, rs.theta(np.array([100.5, 103.0])) - rs.theta(100.0), atol=1e-12
    )


@pytest.mark.parametrize("t", [1650.0, 2000.3, 7005.0, 123456.7])
def test_z_agrees_with_mpmath(mpmath, t):
    step, count = 0.07, int(np.sqrt(t / 2 / np.pi))
    got = rs._siegel(np.longdouble(t), step, 20, count)
    at = [0, 7, 15, 27]  # seven samples lie before the start
    with mpmath.workdps(30):
        expected = [float(mpmath.siegelz(mpmath.mpf(t) + (k - 7) * mpmath.mpf(step))) for k in at]
    np.testing.assert_allclose(got[at], expected, atol=3e-10)


def test_z_low_down_agrees_with_mpmath(mpmath):
    got = rs._euler_maclaurin(np.longdouble(15.0), 0.5, 800)
    at = [7, 20, 107, 400, 807]
    expected = [float(mpmath.siegelz(15 + (k - 7) * 0.5)) for k in at]
    np.testing.assert_allclose(got[at], expected, atol=1e-9)


def test_the_formula_meets_its_neighbour_at_every_border():
    """One term more and other corrections give the same Z: the jumps cancel."""
    for count in (16, 17, 40, 200):
        edge = np.longdouble(2 * np.pi * count**2)
        left, right = (rs._siegel(edge, 0.02, 4, n) for n in (count - 1, count))
        # right at the border; farther off each is outside of where it is meant for
        np.testing.assert_allclose(left[7], right[7], atol=2e-9)


def test_first_zeros_to_nine_digits_and_their_numbers(mpmath):
    got = rs.generate(0.0, 120)
    assert got.first == 1
    np.testing.assert_allclose(got.base + got.offset[:6], FIRST, atol=6e-10)
    for number in (1, 29, 120):
        expected = float(mpmath.zetazero(number).imag)
        assert got.offset[number - 1] == pytest.approx(expected, abs=1e-9)
    later = rs.generate(100.0, 5)
    assert later.first == 30  # 29 zeros lie below 100
    np.testing.assert_allclose(later.base + later.offset, got.offset[29:34], atol=1e-9)


def test_lehmers_pair_is_not_missed():
    """Zeros 6709 and 6710 are 0.0377 apart, a twenty-fifth of the mean gap (Lehmer 1956)."""
    got = rs.generate(7004.0, 6)
    assert (got.first + np.diff(got.offset).argmin(), round(np.diff(got.offset).min(), 4)) == (
        6709,
        0.0377,
    )
    # samples farther apart than the pair: it is the extremum between them that shows it
    coarse = rs.scan(7000.0, 7010.0, oversample=3.0)
    assert np.diff(coarse.offset).min() == pytest.approx(0.0377, abs=1e-3)


def test_turings_count_notices_every_missing_pair():
    found = rs.scan(5000.0, 5300.0)
    assert rs._complete(found, 5300.0) == 4520
    for at in (60, 150, len(found.offset) // 2):
        holed = found._replace(offset=np.delete(found.offset, [at, at + 1]))
        assert rs._complete(holed, 5300.0) is None
        assert rs._complete(found._replace(offset=np.delete(found.offset, at)), 5300.0) is None


def test_far_up_zeros_keep_their_precision(mpmath):
    got = rs.generate(1e9, 40)
    assert got.first == 2846548033  # 2,846,548,032 zeros lie below 1e9
    assert abs(np.diff(unfold(got.offset, got.base)).mean() - 1) < 0.05
    with mpmath.workdps(30):
        for k in (0, 39):
            at, e = mpmath.mpf(got.base) + mpmath.mpf(float(got.offset[k])), mpmath.mpf(1e-8)
            assert mpmath.siegelz(at - e) * mpmath.siegelz(at + e) < 0


@pytest.mark.parametrize("t0", [3000.0, 415_000.0, 1_100_000.0])
def test_agrees_with_the_table(t0):
    path = cached("zeros")
    if path is None:
        pytest.skip("the table is not in the cache: latent-jax fetch zeros")
    _, table = read_zeros(path)
    got, at = rs.generate(t0, 2000), int(np.searchsorted(table, t0))
    assert got.first == at + 1
    # the table has errors of up to 4e-9
    np.testing.assert_allclose(got.base + got.offset, table[at : at + 2000], rtol=0, atol=1e-8)


@pytest.mark.slow
def test_agrees_with_a_long_piece_of_the_table():
    path = cached("zeros")
    if path is None:
        pytest.skip("the table is not in the cache: latent-jax fetch zeros")
    _, table = read_zeros(path)
    got = rs.generate(0.0, 200_000)
    np.testing.assert_allclose(got.offset, table[:200_000], rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("t0", "count", "says"),
    [(-1.0, 5, "t0=-1"), (np.nan, 5, "t0=nan"), (10.0, 0, "count=0"), (1e18, 5, "too high")],
)
def test_refusals(t0, count, says):
    with pytest.raises(DataError, match=says):
        rs.generate(t0, count)


def test_text_keeps_every_digit_far_up():
    assert as_text(1e11, np.array([0.1653441506, 1.99999999996])) == [
        "100000000000.1653441506",
        "100000000002.0000000000",
    ]


def test_the_command_writes_what_the_loader_reads(tmp_path, capsys):
    assert main(["data", "zeros", "--count", "300", "--out", str(tmp_path / "z.npz")]) == 0
    assert "zeros 1 to 300, up to t = 541.847437" in capsys.readouterr().out
    first = load_spacings(str(tmp_path / "z.npz"), window=256)
    for name in ("z.npy", "z.txt"):
        assert main(["data", "zeros", "--count", "300", "--out", str(tmp_path / name)]) == 0
        got = load_spacings(str(tmp_path / name))
        np.testing.assert_allclose(got.values, first.values, atol=1e-8)
    capsys.readouterr()
    assert main(["data", "zeros", "--t0", "20", "--count", "2"]) == 0
    assert capsys.readouterr().out.split() == ["21.0220396388", "25.0108575801"]
    for out, says in (
        (tmp_path / "z.csv", "must end in"),
        (tmp_path / "no" / "z.npy", "no folder"),
    ):
        assert main(["data", "zeros", "--out", str(out)]) == 2
        assert says in " ".join(capsys.readouterr().err.split())
