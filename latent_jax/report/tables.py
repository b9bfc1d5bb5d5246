"""Results as tables: the layout follows the dotted names, so any system's results show."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from latent_jax.report import units
from latent_jax.report.load import is_number
from latent_jax.report.names import ARMS, FIRST, HEADLINES, TITLES, place, rank

# What a result is called in the table of its own controls, by the first part of its name.
_MAIN_ROWS = {"ae": "latent", "recovery": "gist"}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One number with its interval, as text, and its size relative to its column for a bar."""

    text: str = ""
    interval: str = ""
    share: float = 0.0
    unit: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows × measures. `rows` holds (name, meaning, cells)."""

    title: str
    columns: list[str]
    rows: list[tuple[str, str, list[Cell]]]
    units: tuple[str, ...] = ()

    @property
    def heads(self) -> list[tuple[str, str]]:
        """Columns with their units."""
        return list(zip(self.columns, self.units, strict=True))


@dataclasses.dataclass(frozen=True)
class Section:
    """All results that share a topic: tables, single numbers, and list-valued results; ``note``
    says on what they were measured."""

    key: str
    title: str
    tables: list[Table]
    facts: list[tuple[str, Cell]]
    lists: dict[str, list[float]]
    note: str = ""


def number(value: Any) -> str:
    """A number as a person wants to read it.

    Example:
      >>> number(0.81234), number(1234567), number(0.0000123), number(3), number(True)
      ('0.812', '1,234,567', '1.23e-05', '3', 'yes')
      >>> number(0.99999)
      '1'
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):
            return str(value)
        size = abs(value)
        if value == int(value) and size < 1e15:
            return f"{int(value):,}"
        if size >= 1000:
            return f"{value:,.0f}"
        if size >= 100:
            return f"{value:.1f}"
        return f"{value:.3g}" if size < 0.01 else f"{value:.3f}".rstrip("0").rstrip(".")
    return str(value)


def size(count: float) -> str:
    """A byte count in the unit a person would use.

    Example:
      >>> size(640), size(3_812_345_678)
      ('640 B', '3.81 GB')
    """
    for unit, power in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= power:
            return f"{count / power:.3g} {unit}"
    return f"{count:g} B"


def interval_of(results: Mapping[str, Any], name: str) -> tuple[float, float] | None:
    """The confidence interval beside a result, where it has one."""
    bounds = results.get(f"{name}.ci95")
    if isinstance(bounds, (list, tuple)) and len(bounds) == 2 and all(map(is_number, bounds)):
        return float(bounds[0]), float(bounds[1])
    return None


def _spread(name: str, results: Mapping[str, Any]) -> bool:
    """Whether a result is the standard deviation of another, beside which it is shown."""
    return name.endswith(".std") and is_number(results.get(name.removesuffix(".std")))


def cell(results: Mapping[str, Any], name: str, top: float = 0.0) -> Cell:
    """One result, with its confidence interval or else its standard deviation."""
    value = results[name]
    if name.endswith("bytes") and is_number(value):
        return Cell(size(value))
    bounds = interval_of(results, name)
    spread = results.get(f"{name}.std")
    beside = _between(*bounds) if bounds else f"± {number(spread)}" if is_number(spread) else ""
    share = max(0.0, min(1.0, value / top)) if is_number(value) and top > 0 else 0.0
    return Cell(
        number(value),
        beside,
        share if share == share else 0.0,
        units.unit(name),
    )


def _between(low: float, high: float) -> str:
    """Two bounds; a dash between them would read as another minus."""
    return f"{number(low)} {'to' if min(low, high) < 0 else '–'} {number(high)}"


def sections(
    results: Mapping[str, Any], config: Mapping[str, Any] | None = None
) -> list[Section]:
    """Groups results into the sections of a page; a run's ``config`` says what is not in them."""
    scalars = {
        name: value
        for name, value in results.items()
        if not name.endswith(".ci95") and not isinstance(value, (list, dict, tuple))
        and not _spread(name, results)
    }
    # `ae.token_accuracy` is the main row of the table that `ae.token_accuracy.shuffled` makes.
    measured = {(where[0], where[2]) for name in scalars if (where := place(name))}
    tables: dict[str, dict[str, dict[str, str]]] = {}
    facts: list[str] = []
    for name in scalars:
        table, _, measure = name.rpartition(".")
        where = place(name)
        if (table, measure) in measured:
            where = table, _MAIN_ROWS.get(name.partition(".")[0], "this run"), measure
        if where is None:
            facts.append(name)
        else:
            table, row, measure = where
            tables.setdefault(table, {}).setdefault(row, {})[measure] = name

    order = list(TITLES)
    keys: dict[str, list[str]] = {}
    for key in [*(t.split(".")[0] for t in tables), *(f.split(".")[0] for f in facts)]:
        keys.setdefault(TITLES.get(key, key.replace("_", " ").capitalize()), []).append(key)
    lists = {
        name: [float(v) for v in value]
        for name, value in results.items()
        if isinstance(value, list) and not name.endswith(".ci95") and all(map(is_number, value))
    }
    for name in lists:
        key = name.split(".")[0]
        keys.setdefault(TITLES.get(key, key.replace("_", " ").capitalize()), []).append(key)

    found = []
    for title, members in keys.items():
        mine = set(members)
        first = min((order.index(m) for m in mine if m in order), default=len(order))
        section = Section(
            key=sorted(mine)[0],
            title=_asked(title, config or {}),
            tables=[
                _table(results, name, rows)
                for name, rows in tables.items()
                if name.split(".")[0] in mine
            ],
            facts=[(f, cell(results, f)) for f in facts if f.split(".")[0] in mine],
            lists={n: v for n, v in lists.items() if n.split(".")[0] in mine and v},
            note=units.measured_on(members[0], results, config or {}),
        )
        found.append((first, section))
    return [section for _, section in sorted(found, key=lambda pair: pair[0])]


def _asked(title: str, config: Mapping[str, Any]) -> str:
    """A title that says which questions were asked, where they are not SQuAD's."""
    data = config.get("data")
    source = data.get("qa") if isinstance(data, Mapping) else None
    if title != TITLES["squad"] or source in (None, "squad"):
        return title
    # `auto` is SQuAD only where the data root has it: the run does not say which it was.
    return f"Question answering ({'SQuAD format' if source == 'auto' else source})"


def _table(results: Mapping[str, Any], title: str, rows: dict[str, dict[str, str]]) -> Table:
    columns = list(dict.fromkeys(measure for row in rows.values() for measure in row))
    columns.sort(key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    heads = [units.unit(next(r[m] for r in rows.values() if m in r)) for m in columns]
    top = {}
    for measure in columns:
        values = [results[row[measure]] for row in rows.values() if measure in row]
        numbers = [v for v in values if is_number(v) and v == v and abs(v) != float("inf")]
        # A bar for a share is drawn against 1, so that tables can be compared by eye.
        unit = numbers and min(numbers) >= 0 and max(numbers) <= 1
        top[measure] = 1.0 if unit else max(numbers, default=0.0)
    return Table(
        title=title,
        columns=columns,
        units=tuple(heads),
        rows=[
            (
                row,
                ARMS.get(row, ""),
                [
                    cell(results, rows[row][m], top[m]) if m in rows[row] else Cell()
                    for m in columns
                ],
            )
            for row in sorted(rows, key=rank)
        ],
    )


def headlines(results: Mapping[str, Any], limit: int = 5) -> list[tuple[str, Cell]]:
    """The few numbers that stand on top of the page."""
    chosen = [name for name in HEADLINES if is_number(results.get(name))]
    chosen += [name for name in results if re.fullmatch(r"recovery\.lod\d+\.slots\d+", name)]
    if not chosen:
        chosen = [name for name, value in results.items() if is_number(value)]
    return [(name, cell(results, name)) for name in chosen[:limit]]
