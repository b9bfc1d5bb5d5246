"""The table of zeros: reading it safely, unfolding, and what is refused."""

from __future__ import annotations

import gzip
import lzma
import os
import pickle
import zlib

import numpy as np
import pytest

from latent_jax.core.errors import DataError
from latent_jax.core.fetch import cached
from latent_jax.data import load_spacings
from latent_jax.data.zero_files import read_table, read_zeros
from latent_jax.data.zeros import unfold, zero_spacings

# Odlyzko's first zeros, to his nine digits.
FIRST = [14.134725142, 21.022039639, 25.010857580, 30.424876126, 32.935061588, 37.586178159]


@pytest.fixture
def gamma():
    """Made-up zeros of the right density: unfolding has to give gaps of mean 1."""
    u = np.arange(1000.0) + 100 + np.random.default_rng(0).uniform(0, 0.8, 1000)
    t = np.linspace(100, 5000, 100_000)
    return np.interp(u, unfold(t), t)


def packed(thing, protocol=2):
    return zlib.compress(pickle.dumps(thing, protocol=protocol))


def test_reads_a_list_of_floats_bit_for_bit(tmp_path):
    path = tmp_path / "zeros.sobj"
    for protocol in (0, 2, 5):
        path.write_bytes(packed(FIRST, protocol))
        assert read_table(path).tolist() == FIRST


class Payload:
    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_a_pickle_that_would_run_something_runs_nothing(tmp_path):
    path, target = tmp_path / "zeros.sobj", tmp_path / "made"
    for protocol in (0, 2, 5):
        path.write_bytes(packed([14.1, Payload(target)], protocol))
        with pytest.raises(DataError, match=r"it names \w+\.mkdir.*nothing of it was executed"):
            read_table(path)
        assert not target.exists()
    pickle.loads(pickle.dumps(Payload(target)))  # the payload does work elsewhere
    assert target.exists()


@pytest.mark.parametrize(
    "thing", [{"a": 1.0}, [1.0, 2], [1.0, "2"], [], (1.0, 2.0), [[1.0]], [True, 1.0], 3.0]
)
def test_a_pickle_of_anything_else_is_refused(tmp_path, thing):
    (tmp_path / "zeros.sobj").write_bytes(packed(thing))
    with pytest.raises(DataError, match="plain list of floats"):
        read_table(tmp_path / "zeros.sobj")


def test_damaged_tables_are_refused(tmp_path):
    path, good = tmp_path / "zeros.sobj", packed(FIRST)
    cases = {good[:-6]: "truncated", b"hello": "damaged", b"": "truncated"}
    cases[zlib.compress(pickle.dumps(FIRST)[:-8])] = "plain list of floats"
    cases[zlib.compress(b"")] = "plain list of floats"
    for data, says in cases.items():
        path.write_bytes(data)
        with pytest.raises(DataError, match=says):
            read_table(path)


def test_unfold_is_the_main_term_and_agrees_with_its_stable_form():
    t = np.array([20.0, 1e3, 1e6])
    np.testing.assert_allclose(unfold(t), t / (2 * np.pi) * (np.log(t / (2 * np.pi)) - 1))
    # du/dt is the density ln(t / 2 pi) / 2 pi
    slope = (unfold(t + 1e-3) - unfold(t - 1e-3)) / 2e-3
    np.testing.assert_allclose(slope, np.log(t / (2 * np.pi)) / (2 * np.pi), rtol=1e-6)
    offset = np.array([0.0, 0.5, 3.0, 40.0])
    direct = unfold(1000.0 + offset) - unfold(np.array([1000.0]))
    np.testing.assert_allclose(unfold(offset, 1000.0), direct, atol=1e-10)


def test_spacings_have_mean_one_and_carry_the_height(gamma):
    got = zero_spacings(gamma)
    assert got.values.dtype == got.log_height.dtype == np.float64
    assert len(got.values) == len(got.log_height) == got.run == 999
    assert abs(got.values.mean() - 1) < 1e-3
    np.testing.assert_allclose(got.log_height, np.log((gamma[1:] + gamma[:-1]) / 4 / np.pi))


def test_every_file_format_gives_the_same_zeros(tmp_path, gamma):
    text = "# zeros\n" + "\n".join(map(repr, gamma.tolist())) + "\n"
    np.save(tmp_path / "z.npy", gamma)
    np.savez(tmp_path / "z.npz", base=gamma[0], offset=gamma - gamma[0])
    (tmp_path / "z.txt").write_text(text)
    (tmp_path / "z.txt.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "z.txt.xz").write_bytes(lzma.compress(text.encode()))
    (tmp_path / "z.sobj").write_bytes(packed(gamma.tolist()))
    expected = zero_spacings(gamma).values
    for name in ("z.npy", "z.npz", "z.txt", "z.txt.gz", "z.txt.xz", "z.sobj"):
        got = load_spacings(name, root=tmp_path).values
        np.testing.assert_allclose(got, expected, atol=1e-9, err_msg=name)


def change(index, value):
    def apply(gamma):
        gamma = gamma.copy()
        gamma[index] = value if value is not None else gamma[index - 1]
        return gamma

    return apply


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (change(7, np.nan), "zero 7 is nan"),
        (change(9, np.inf), "zero 9 is inf"),
        (change(5, None), "not increasing: zero 4, .* is twice in a row"),
        (change(3, 1e4), "not increasing: zero 3, 10000.0, is followed by"),
        (lambda g: g[:256], "256 zeros are too few: one window of 256 gaps needs 257"),
        (lambda g: g[::2], "wrong unfolding"),
        (lambda g: g * 1.1, "wrong unfolding"),
        (lambda g: np.diff(g).cumsum(), "first zero is 14.1347"),
    ],
)
def test_what_is_no_run_of_zeros_is_refused(tmp_path, gamma, spoil, says):
    np.save(tmp_path / "z.npy", spoil(gamma))
    with pytest.raises(DataError, match=says) as caught:
        load_spacings(str(tmp_path / "z.npy"), window=256)
    assert "z.npy" in str(caught.value) and "\n" not in str(caught.value)


def test_files_of_another_kind_are_refused(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([1.0, None]), allow_pickle=True)
    np.save(tmp_path / "square.npy", np.ones((3, 3)))
    np.save(tmp_path / "whole.npy", np.arange(3))
    np.savez(tmp_path / "other.npz", zeros=np.ones(3))
    (tmp_path / "words.txt").write_text("fourteen\n")
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04")
    (tmp_path / "zeros.csv").write_text("1\n")
    names = {"objects.npy": "not a file", "square.npy": "shape", "whole.npy": "int64"}
    names |= {"other.npz": "not a file", "words.txt": "not a file", "cut.npy": "not a file"}
    names |= {"cut.npz": "not a file", "zeros.csv": "are read from", "none.npy": "no such file"}
    for name, says in names.items():
        with pytest.raises(DataError, match=says):
            read_zeros(tmp_path / name)
    with pytest.raises(DataError, match="is a folder"):
        read_zeros(tmp_path)


@pytest.mark.usefixtures("cache")
def test_without_the_table_the_error_says_how_to_get_it():
    with pytest.raises(DataError, match="latent-jax fetch zeros"):
        load_spacings("zeta")
    with pytest.raises(DataError, match="sources are zeta, cue:"):
        load_spacings("zata")


def test_the_table_itself():
    path = cached("zeros")
    if path is None:
        pytest.skip("the table is not in the cache: latent-jax fetch zeros")
    _, gamma = read_zeros(path)
    assert gamma[:6].tolist() == FIRST and len(gamma) == 2_001_052
    got = load_spacings("zeta", window=256)
    assert len(got.values) == 2_001_051
    assert abs(got.values.mean() - 1) < 1e-6 and abs(got.values.std() - 0.4075) < 1e-4
