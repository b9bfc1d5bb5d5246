"""Pictures of what systems let one look at (their ``look.py``), for notebooks and reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from markupsafe import Markup

from latent_jax.report import calibration, figures, heat
from latent_jax.report.figures import PALETTE, STYLE, captioned, new, svg
from latent_jax.systems.abstractinator.look import Window
from latent_jax.systems.latentwire.look import Read, Rebuilt
from latent_jax.systems.spacing.look import Looked

# A token that costs this much is a surprise in any text: maps of different arms share the scale.
_TOKEN_NATS, _BYTE_NATS = 8.0, 4.0


def tokens(title: str, found: Sequence[Rebuilt], note: str = "") -> list[Markup]:
    """Texts as heat-maps of nats per token under teacher forcing."""
    return [
        heat.pieces(
            f"{title}, text {i}", one.tokens, one.nats, "nats per token", note, top=_TOKEN_NATS,
            hints=[f"likeliest: {token!r}" for token in one.likeliest],
        )
        for i, one in enumerate(found)
    ]  # fmt: skip


def bytes_of_windows(found: Sequence[Window], note: str = "") -> list[Markup]:
    """Windows as heat-maps of nats per byte given its row; a line where a segment begins."""
    return [
        heat.pieces(
            f"window {i}: {len(one.starts)} segments, codes of the first "
            f"{'-'.join(map(str, one.digits[0].tolist()))}",
            one.pieces, one.nats, "nats per byte", note, top=_BYTE_NATS, cuts=one.starts,
        )
        for i, one in enumerate(found)
    ]  # fmt: skip


def nearest(found: Sequence[Read], note: str = "") -> Markup:
    """A table of latents: what each stands for, and its nearest tokens with their cosine."""
    row = Markup("<tr><td class=name>{}</td><td class=name>{}</td><td>{}</td></tr>")
    body = Markup("").join(
        row.format(
            i, one.span.replace("\n", "⏎"),
            "  ".join(f"{token!r} {cosine:.2f}" for token, cosine in one.nearest),
        )
        for i, one in enumerate(found)
    )  # fmt: skip
    head = Markup("<tr><th>latent</th><th>stands for</th><th>nearest tokens (cosine)</th></tr>")
    table = Markup('<div class="scroll"><table>{}{}</table></div>').format(head, body)
    return captioned(table, note)


def similarity(values: Float[np.ndarray, "n n"], note: str = "") -> Markup:
    """Cosine between the latents of texts."""
    names = [str(i) for i in range(len(values))]
    picture = heat.matrix(
        "Likeness of texts in their latents", values, "cosine", names, names,
        across="text", down="text", limits=(min(0.0, float(values.min())), 1.0),
    )  # fmt: skip
    return captioned(picture, note)


def predictions(found: Looked, note: str = "") -> list[Markup]:
    """Densities beside the truth, the likelihood along a window, and ranks of the truth."""
    with matplotlib.rc_context(STYLE):
        figure = new(3.5, 2.3)
        axes = figure.add_subplot()
        for i, (density, truth) in enumerate(zip(found.density, found.truth, strict=True)):
            colour = PALETTE[i % len(PALETTE)]
            axes.plot(found.grid, density, color=colour, linewidth=1.2)
            axes.axvline(truth, color=colour, linestyle=":", linewidth=1)
        title = "Predicted densities; dotted: the gap that came"
        axes.set_title(title)
        axes.set_xlabel("next gap, mean gaps")
        axes.set_ylabel("density")
        drawn = svg(figure, title)
    order = np.argsort(found.position)
    along = figures.curve(
        "Likelihood along a window", {"nll": (found.position[order] + 1, found.nll[order])},
        unit="nats", across="gaps before the predicted one",
    )  # fmt: skip
    histogram = np.histogram(found.pit, bins=20, range=(0, 1), density=True)[0]
    count = len(found.pit)
    return [
        captioned(drawn, "; ".join(filter(None, (f"n = {len(found.truth)} gaps", note)))),
        *(
            captioned(picture, "; ".join(filter(None, (f"n = {count} windows", note))))
            for picture in (
                along,
                calibration.pit("Where the truth falls (band: 95 %)", histogram, count),
                calibration.ranks("Ranks of the truth (band: 95 %)", found.pit),
            )
        ),
    ]


def slots(found: Mapping[str, Any], note: str = "") -> list[Markup]:
    """What `diagnose` says of each memory slot; empty for a model without."""
    wanted = {
        "slots.ablation_delta": ("Lost when a slot is overwritten or hidden", "nats"),
        "slots.norm": ("Size of a slot's content", "norm"),
        "slots.read_out": ("How much a slot is read", "weight"),
        "attention.last.centre": ("Where a slot looks, last layer", "gaps before the end"),
        "attention.claims.centre": ("What a slot claims", "gaps before the end"),
    }
    made = []
    for name, (title, unit) in wanted.items():
        values = found.get(name)
        if values is None:
            numbers = [key for key in found if key.rpartition(".")[0] == name]
            values = [found[key] for key in numbers if key.rpartition(".")[2].isdigit()]
        if len(values):
            made.append(captioned(figures.histogram(title, values, unit, "slot"), note))
    return made


def histories(losses: Mapping[str, Float[np.ndarray, " n"]], note: str = "") -> Markup:
    """What each history loses in each arm, above the full text."""
    arms = [arm for arm in losses if arm != "full"]
    values = np.stack([losses[arm] - losses["full"] for arm in arms])
    order = np.argsort(values[arms.index("dropped")])[::-1] if "dropped" in arms else slice(None)
    picture = heat.matrix(
        "Loss above the full text's", values[:, order], "nats per token", arms,
        across="histories, those that need it most first",
    )  # fmt: skip
    return captioned(picture, "; ".join(filter(None, (f"n = {values.shape[1]} histories", note))))
