"""Heat-maps: numbers behind the pieces of a text, and matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib
import numpy as np
from jaxtyping import Float
from markupsafe import Markup, escape

from latent_jax.report.figures import STYLE, captioned, new, svg

# The strongest colour keeps the text on it legible, on a light page and on a dark one.
_DEEPEST = 0.75


def pieces(
    title: str,
    texts: Sequence[str],
    values: Sequence[float],
    unit: str,
    note: str = "",
    *,
    top: float | None = None,
    cuts: Sequence[int] = (),
    hints: Sequence[str] = (),
) -> Markup:
    """A text whose pieces are the redder the greater their number; pointing at one tells it.

    Args:
      title: above the text.
      texts: tokens or bytes.
      values: one each; those that are not finite are left without colour.
      unit: of the values.
      note: what stands below, n and seed.
      top: the value of the deepest colour; the largest by default.
      cuts: pieces at which a segment begins.
      hints: told beside each number.
    """
    known = [v for v in values if math.isfinite(v)]
    top = max(known, default=0.0) if top is None else top
    marked, spans = set(cuts), []
    for i, (text, value) in enumerate(zip(texts, values, strict=True)):
        share = min(max(value / top, 0.0), 1.0) if top > 0 and math.isfinite(value) else 0.0
        kind = ' class="cut"' if i in marked else ""
        told = f"{value:.3g} {unit}" + (f"; {hints[i]}" if hints else "")
        spans.append(
            f'<span{kind} style="--heat:{share * _DEEPEST:.3f}" title="{escape(told)}">'
            f"{escape(_visible(text))}</span>"
        )
    mean = sum(known) / len(known) if known else math.nan
    scale = f"mean {mean:.3g}, deepest colour {top:.3g} {unit}, {len(known)} pieces"
    body = Markup('<div class="label">{}</div><div class="heat">{}</div>').format(
        title, Markup("".join(spans))
    )
    return captioned(body, "; ".join(filter(None, (scale, note))))


def _visible(text: str) -> str:
    """Line ends are shown, and still end lines."""
    return text.replace("\n", "⏎\n")


def matrix(
    title: str,
    values: Float[np.ndarray, "r c"],
    unit: str,
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    *,
    across: str = "",
    down: str = "",
    limits: tuple[float, float] | None = None,
) -> Markup:
    """A matrix as colours with their scale; small ones tell their numbers too.

    Args:
      title: above it.
      values: the matrix.
      unit: of the values.
      rows, columns: names, where there are few.
      across, down: what the axes are.
      limits: ends of the scale; those of the values by default.
    """
    values = np.asarray(values, np.float64)
    low, high = limits or (float(np.nanmin(values)), float(np.nanmax(values)))
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = new(4.6, max(1.6, min(4.6, 1.0 + 3.2 * len(values) / values.shape[1])))
        axes = figure.add_subplot()
        image = axes.pcolormesh(
            values, cmap="viridis", vmin=low, vmax=high, edgecolors="none", rasterized=False
        )
        axes.invert_yaxis()
        if rows:
            axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
        if columns:
            turned = 90 if max(map(len, columns)) > 3 else 0
            axes.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=turned)
        if values.size <= 100:
            for (i, j), value in np.ndenumerate(values):
                # Yellow, the top of the scale, needs dark ink.
                ink = "#111111" if value > low + 0.6 * (high - low) else "#f4f4f4"
                axes.text(
                    j + 0.5, i + 0.5, f"{value:.2f}", ha="center", va="center", color=ink,
                    fontsize=7, url=None,
                )  # fmt: skip
        axes.set_title(title)
        axes.set_xlabel(across)
        axes.set_ylabel(down)
        figure.colorbar(image, ax=axes, label=unit)
        return svg(figure, title)
