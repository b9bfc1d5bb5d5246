"""Figures as inline SVG: text and axes take the page's colour, so they read in light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullFormatter

# Mid-tones that keep contrast on white and on near-black.
PALETTE = (
    "#3b82c4", "#d9822b", "#3d9a50", "#c4504b", "#8a6fc2",
    "#2fa8b5", "#d06fb0", "#9a8a2c", "#8c6d5a", "#808890",
)  # fmt: skip
# matplotlib writes fixed colours; this one is replaced by currentColor in the SVG.
_INK = "#010203"
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _INK,
    "grid.alpha": 0.13,
    "grid.linewidth": 0.6,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.1,  # the reader's font may be wider than matplotlib's
}
_MAX_POINTS, _STRIPES = 500, 50


def svg(figure: Figure, label: str) -> Markup:
    """Serialises a figure; `label` is its text for screen readers and makes its ids unique."""
    buffer = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": label}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", text))
    text = re.sub(
        r' id="([^"]*)"', lambda match: match.group(0) if match.group(1) in used else "", text
    )
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    head = Markup('<svg role="img" aria-label="{}" ').format(label)
    return Markup(text.replace("<svg ", head, 1))


def captioned(picture: Markup, text: str) -> Markup:
    """A figure with a line below: what its points are, how many, and the seed."""
    return picture + Markup("<figcaption>{}</figcaption>").format(text) if text else picture


def new(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    return Figure(figsize=(width, height))


def _thin(steps: Sequence[float], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """At most _MAX_POINTS bucket means, so that a long run's report stays small."""
    x, y = np.asarray(steps, float), np.asarray(values, float)
    if x.size <= _MAX_POINTS:
        return x, y
    parts = np.array_split(np.arange(x.size), _MAX_POINTS)
    return np.array([x[p].mean() for p in parts]), np.array([y[p].mean() for p in parts])


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred mean over about a twentieth of the curve, shorter at its ends: no lag, no bias."""
    half = max(len(values) // 40, 1)
    total = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    reach = np.minimum(np.minimum(at, len(values) - 1 - at), half)
    return (total[at + reach + 1] - total[at - reach]) / (2 * reach + 1)


def curve(
    title: str,
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    unit: str = "",
    across: str = "step",
    log: bool = False,
) -> Markup:
    """Lines over steps; a single noisy line is drawn faint with its running mean on top.

    Args:
      title: above the lines.
      lines: name → steps and values.
      unit: of the values.
      across: what the horizontal axis counts.
      log: draw a wide range on a logarithmic axis.
    """
    with matplotlib.rc_context(STYLE):
        figure = new(3.5, 2.3)
        axes = figure.add_subplot()
        for i, (name, (steps, values)) in enumerate(lines.items()):
            x, y = _thin(steps, values)
            colour = PALETTE[i % len(PALETTE)]
            marker = "o" if len(x) < 3 else None
            if len(lines) == 1 and len(x) >= 40:
                axes.plot(x, y, color=colour, alpha=0.3, linewidth=0.7)
                y = _smooth(y)
            axes.plot(x, y, color=colour, linewidth=1.4, label=name, marker=marker, markersize=3)
        every = [value for _, values in lines.values() for value in values]
        if log and min(every) > 0 and max(every) > 10 * min(every):  # else a log axis has no ticks
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_title(title)
        axes.set_xlabel(across)
        axes.set_ylabel(unit)
        if len(lines) > 1:
            axes.legend(loc="best")
        return svg(figure, title)


def stacked(title: str, lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> Markup:
    """Shares that add up, as stacked areas, each the mean over a fiftieth of the steps.

    A line without a value at a step has no share there: tasks that alternate batch by batch are
    seldom in the log together.
    """
    at = [dict(zip(steps, values, strict=True)) for steps, values in lines.values()]
    steps = sorted(set().union(*at))
    parts = np.array_split(np.arange(len(steps)), min(len(steps), _STRIPES))
    share = np.array([[row.get(step, 0.0) for step in steps] for row in at])
    with matplotlib.rc_context(STYLE):
        figure = new(3.5, 2.3)
        axes = figure.add_subplot()
        colours = [PALETTE[i % len(PALETTE)] for i in range(len(at))]
        axes.stackplot(
            [np.mean([steps[i] for i in part]) for part in parts],
            np.array([share[:, part].mean(1) for part in parts]).T,
            labels=list(lines), colors=colours, alpha=0.75,
        )  # fmt: skip
        axes.legend(loc="best")
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.set_ylabel("share")
        return svg(figure, title)


def dots(
    title: str,
    values: Mapping[str, float],
    intervals: Mapping[str, tuple[float, float]],
    unit: str = "",
) -> Markup:
    """One horizontal dot per row with its confidence interval, first row on top."""
    with matplotlib.rc_context(STYLE):
        figure = new(5.6, 0.8 + 0.26 * len(values))
        axes = figure.add_subplot()
        names = list(values)
        for y, name in enumerate(names):
            own = name.startswith(("latent", "gist", "this run"))
            colour = PALETTE[0] if own else PALETTE[-1]
            if name in intervals:
                axes.plot(intervals[name], [y, y], color=colour, linewidth=2, alpha=0.55)
            axes.plot([values[name]], [y], "o", color=colour, markersize=5)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        if min([*values.values(), *(low for low, _ in intervals.values())]) >= 0:
            axes.set_xlim(left=0.0)
        axes.set_xlabel(unit)
        axes.set_title(title)
        return svg(figure, title)


def against_ratio(
    title: str,
    arms: Mapping[str, Mapping[float, tuple[float, tuple[float, float] | None]]],
    flat: Mapping[str, float],
) -> Markup:
    """A score over compression ratios, one line per arm; `flat` arms do not depend on the ratio."""
    with matplotlib.rc_context(STYLE):
        figure = new(5.6, 3.4)
        axes = figure.add_subplot()
        for i, (arm, points) in enumerate(arms.items()):
            ratios = sorted(points)
            y = [points[ratio][0] for ratio in ratios]
            colour = PALETTE[i % len(PALETTE)]
            width = 2.2 if arm.startswith("latent") else 1.2
            axes.plot(ratios, y, "o-", color=colour, linewidth=width, markersize=4, label=arm)
            for ratio in ratios:
                if points[ratio][1] is not None:
                    axes.plot([ratio] * 2, points[ratio][1], color=colour, alpha=0.5)
        for i, (arm, value) in enumerate(flat.items()):
            style = ("--", ":", "-.")[i % 3]
            axes.axhline(value, color=PALETTE[-1], linestyle=style, linewidth=1.2, label=arm)
        axes.set_xscale("log", base=2)
        ratios = sorted({ratio for points in arms.values() for ratio in points})
        axes.set_xticks(ratios, [f"{ratio:g}×" for ratio in ratios])
        axes.minorticks_off()
        axes.set_xlabel("context tokens ÷ latents")
        axes.set_ylim(bottom=0)
        axes.set_ylabel("share")
        axes.set_title(title)
        figure.legend(loc="outside right upper")
        return svg(figure, title)


def against(
    title: str,
    label: str,
    names: Sequence[str],
    lines: Mapping[str, Mapping[str, tuple[float, tuple[float, float] | None]]],
    unit: str = "",
) -> Markup:
    """A score over settings that are named, evenly spaced, one line per entry of ``lines``."""
    with matplotlib.rc_context(STYLE):
        figure = new(5.6, 3.0)
        axes = figure.add_subplot()
        for i, (line, points) in enumerate(lines.items()):
            found = [(x, *points[name]) for x, name in enumerate(names) if name in points]
            colour = PALETTE[i % len(PALETTE)]
            axes.plot(
                [x for x, _, _ in found], [y for _, y, _ in found], "o-",
                color=colour, linewidth=1.4, markersize=4, label=line,
            )  # fmt: skip
            for x, _, bounds in found:
                if bounds is not None:
                    axes.plot([x, x], bounds, color=colour, alpha=0.5)
        axes.set_xticks(range(len(names)), names)
        axes.set_xlim(-0.3, len(names) - 0.7)
        axes.set_xlabel(label)
        axes.set_ylabel(unit)
        axes.set_title(title)
        if len(lines) > 1:
            figure.legend(loc="outside right upper")
        return svg(figure, title)


def histogram(
    title: str, values: Sequence[float], unit: str = "", across: str = "index"
) -> Markup:
    """A list-valued result (a spectrum, counts per code) as bars by index."""
    with matplotlib.rc_context(STYLE):
        figure = new(3.5, 2.3)
        axes = figure.add_subplot()
        axes.bar(range(len(values)), values, color=PALETTE[0], width=0.9)
        axes.set_title(title)
        axes.set_xlabel(across)
        axes.set_ylabel(unit)
        return svg(figure, title)


def levels(
    title: str,
    values: np.ndarray,
    names: Sequence[str],
    extent: tuple[float, float, float, float],
    *,
    across: str,
    down: str,
    spans: Sequence[tuple[float, float]] = (),
) -> Markup:
    """A map of categories, one row per step from the top down, -1 empty; ``spans`` are marked.

    Args:
      title: above the map.
      values: place in ``names`` of each cell.
      names: the categories, for the legend.
      extent: left, right, top and bottom edge in the units of the axes.
      across, down: what the axes are.
      spans: stretches of the horizontal axis to point at, each as start and stop.
    """
    with matplotlib.rc_context(STYLE):
        figure = new(9.0, 5.0)
        axes = figure.add_subplot()
        colours = [PALETTE[i % len(PALETTE)] for i in range(len(names))]
        image = ListedColormap(colours)(np.maximum(values, 0))
        image[values < 0, 3] = 0.0
        left, right, top, bottom = extent
        axes.imshow(
            image, extent=(left, right, bottom, top), aspect="auto", interpolation="nearest"
        )
        for start, stop in spans:
            # Only its edges: what the span holds is what one wants to see.
            axes.axvspan(start, stop, facecolor="none", edgecolor=_INK, linewidth=1)
        axes.grid(False)
        shown = [Patch(color=c, label=n) for c, n in zip(colours, names, strict=True)]
        if spans:
            shown.append(Patch(facecolor="none", edgecolor=_INK, label="answer"))
        figure.legend(handles=shown, loc="outside right upper")
        axes.set_title(title)
        axes.set_xlabel(across)
        axes.set_ylabel(down)
        return svg(figure, title)
