"""Configurations side by side: tables of means and standard deviations as one page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from latent_jax.report import html, tables

Row = Mapping[str, Sequence[float | None]]


def columns(rows: Mapping[str, Row]) -> list[str]:
    """All columns that some row has, in order."""
    return list(dict.fromkeys(column for row in rows.values() for column in row))


def text(cell: Sequence[float | None] | None) -> str:
    """A mean with its standard deviation, where it has one, to the latter's two first digits.

    Example:
      >>> text((-0.68675, 0.0105)), text((0.0645, 1e-5)), text((0.5, None)), text(None)
      ('-0.687 ± 0.011', '0.0645 ± 0.0000', '0.5', '')
    """
    if cell is None or cell[0] is None:
        return ""
    mean, std = float(cell[0]), cell[1]
    if std is None or not math.isfinite(std):
        return tables.number(mean)
    # Four decimals are as many as any of these numbers mean.
    places = min(4, max(0, 1 - math.floor(math.log10(std)))) if std > 0 else 3
    return f"{mean:.{places}f} ± {std:.{places}f}"


def render(
    title: str, made: str, found: Mapping[str, Mapping[str, Row]], findings: Iterable[str]
) -> str:
    """The page.

    Args:
      title: what is compared.
      made: when.
      found: table → row → column → (mean, standard deviation or None).
      findings: what the numbers say, a line each.
    """
    shown = {
        name: (columns(rows), {r: [text(row.get(c)) for c in columns(rows)]
                               for r, row in rows.items()})
        for name, rows in found.items()
    }
    return html.templates().get_template("side_by_side.html.j2").render(
        title=title, made=made, tables=shown, findings=list(findings)
    )
