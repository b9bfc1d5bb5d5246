"""The focus timeline: right cells, one file, nothing from elsewhere."""

from __future__ import annotations

import re

import numpy as np
import pytest

from latent_jax.core.errors import DataError
from latent_jax.report import focus
from latent_jax.systems.megacontext import telemetry
from latent_jax.systems.megacontext.layout import Layout

LAYOUT = Layout(block=4, branching=3, slots=(1, 2), protected=1)


def history() -> telemetry.History:
    """Three iterations over four, then five blocks."""
    level = np.array([[2, 0, -1, -1], [1, 1, 1, 0], [2, 0, 0, -1]])
    index = np.array([[0, 3, 0, 0], [0, 1, 2, 3], [0, 3, 4, 0]])
    kind = np.array([[0], [1], [-1]])
    none = np.zeros((3, 1), int)
    return telemetry.History(
        kind, np.abs(kind) * 2, none, none * 0.0, kind, kind < 0, np.abs(kind[:, 0]),
        level, index, 0 * level, np.array([2, 4, 3]),
    )  # fmt: skip


def test_cells_by_hand():
    assert focus.raster(LAYOUT, history()).tolist() == [
        [2, 2, 2, 0, -1],
        [1, 1, 1, 0, -1],
        [2, 2, 2, 0, 0],
    ]


def test_long_runs_are_thinned():
    one = history()
    long = telemetry.History(*(np.repeat(column, 500, axis=0) for column in one))
    cells = focus.raster(LAYOUT, long)
    assert cells.shape == (600, 5)
    assert cells[0].tolist() == [2, 2, 2, 0, -1] and cells[-1].tolist() == [2, 2, 2, 0, 0]


def test_the_page_stands_alone(tmp_path):
    trace = telemetry.save(tmp_path / "a<b.npz", LAYOUT, history(), 20)
    page = focus.write_timeline(trace, tmp_path / "focus.html", spans=[(12, 16)])
    text = page.read_text()
    assert "a&lt;b" in text and "<b." not in text
    assert "data:image/png;base64," in text and "gist of 12 tokens" in text and "answer" in text
    assert "flip_rate" in text and "20 tokens" in text
    fetched = re.findall(r"(?:href|src)=\"(?!data:|#)([^\"]*)", text)
    assert not fetched and "<script" not in text and "@import" not in text


def test_a_file_that_is_no_history_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        focus.write_timeline(tmp_path / "none.npz", tmp_path / "focus.html")
    assert not (tmp_path / "focus.html").exists()
