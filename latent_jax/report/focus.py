"""The timeline of a focus as one self-contained HTML page.

The history runs from left to right and the iterations from top to bottom; the colour is the level
of detail at which the working context holds each stretch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int
from markupsafe import Markup

from latent_jax.core.files import write_text
from latent_jax.report import figures, html, tables
from latent_jax.systems.megacontext import telemetry
from latent_jax.systems.megacontext.layout import Layout
from latent_jax.systems.megacontext.telemetry import History

# More cells than a screen has pixels would only make the page heavy.
_COLUMNS, _ROWS = 900, 600


def write_timeline(
    trace: str | Path, page: str | Path, spans: Sequence[tuple[int, int]] = ()
) -> Path:
    """Writes the page of a saved history (`telemetry.save`) and returns its path.

    Args:
      trace: the ``.npz`` file.
      page: the HTML file to write.
      spans: stretches of tokens to mark, such as where an answer lies.

    Raises:
      DataError: there is no focus history in ``trace``.
      RunError: the page cannot be written.
    """
    layout, history, budget = telemetry.load(trace)
    return write_text(page, render(layout, history, budget, Path(trace).stem, spans))


def render(
    layout: Layout,
    history: History,
    budget: int,
    title: str = "focus",
    spans: Sequence[tuple[int, int]] = (),
) -> str:
    """The page as text."""
    found = telemetry.summary(layout, history, budget)
    del found["residency_histogram"]
    timeline, *others = pictures(layout, history, budget, spans)
    return html.templates().get_template("focus.html.j2").render(
        title=title,
        facts=[
            ("iterations", tables.number(len(history.kind))),
            ("history", f"{_tokens(layout, history):,} tokens"),
            ("working context", f"{budget:,} entries"),
            ("protected tail", f"{layout.protected * layout.block:,} tokens"),
            ("entries of a gist, by level", ", ".join(map(str, layout.slots))),
        ],
        timeline=timeline,
        figures=others,
        results=[(name, tables.number(value)) for name, value in found.items()],
    )


def pictures(
    layout: Layout, history: History, budget: int, spans: Sequence[tuple[int, int]] = ()
) -> list[Markup]:
    """The timeline, and how much moved, was in use, and stayed how long."""
    steps = np.arange(1, len(history.kind) + 1)
    total = _tokens(layout, history)
    names = [
        "raw tokens",
        *(f"gist of {layout.block * int(w):,} tokens" for w in layout.widths[1:]),
    ]
    spent = telemetry.summary(layout, history, budget)["residency_histogram"]
    moved = {
        "expanded": (steps, (history.kind > 0).sum(1)),
        "collapsed": (steps, ((history.kind < 0) & ~history.forced).sum(1)),
        "made room": (steps, history.forced.sum(1)),
    }
    used = telemetry.costs(layout, history) / budget
    made = [
        figures.levels(
            "Level of detail", raster(layout, history), names, (0, total, 0.5, len(steps) + 0.5),
            across="history, tokens", down="iteration", spans=spans,
        ),
        figures.curve("Actions per iteration", moved, unit="actions", across="iteration"),
        figures.curve(
            f"In use of {budget:,} entries", {"used": (steps, used)}, unit="share",
            across="iteration",
        ),
        figures.histogram("Completed residencies", spent, "nodes", "iterations in the context"),
    ]  # fmt: skip
    note = f"n = 1 history of {total:,} tokens, {len(steps)} iterations"
    return [figures.captioned(picture, note) for picture in made]


def _tokens(layout: Layout, history: History) -> int:
    return int(_blocks(layout, history)[-1]) * layout.block


def raster(layout: Layout, history: History) -> Int[np.ndarray, "r c"]:
    """Level by stretch of the history and iteration, thinned to a screen; -1 is still to come."""
    rows = np.linspace(0, len(history.kind) - 1, min(len(history.kind), _ROWS)).round().astype(int)
    ends = _blocks(layout, history)
    columns = min(int(ends[-1]), _COLUMNS)
    at = (np.arange(columns) * 2 + 1) * int(ends[-1]) // (2 * columns)
    out = np.full((len(rows), columns), -1)
    for row, t in enumerate(rows):
        level = history.level[t, : history.count[t]]
        node = np.searchsorted(np.cumsum(layout.widths[level]), at, side="right")
        known = at < ends[t]
        out[row, known] = level[node[known]]
    return out


def _blocks(layout: Layout, history: History) -> Int[np.ndarray, " t"]:
    """Length of the history after each iteration."""
    widths = layout.widths[np.maximum(history.level, 0)]
    return np.where(history.level >= 0, widths, 0).sum(1)
