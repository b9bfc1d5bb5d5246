"""Results as tables: the layout follows the dotted names, so any system's results show."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from operator import itemgetter
from typing import Any

from latent_jax.report.load import is_number

# First part of a name → the title of its section; others are titled by their own name. The order
# here is the order on the page.
TITLES = {
    "squad": "Question answering (SQuAD)",
    "qed": "Question answering (QED, out of distribution)",
    "lookup": "Key lookup",
    "qa": "Question answering",
    "ae": "Reconstruction",
    "continuation": "Continuation",
    "reconstruction": "Reconstruction",
    "bpb": "Bits per byte",
    "token_lm": "Bits per byte",
    "rate_distortion": "Reconstruction against code bits",
    "nll": "Negative log-likelihood",
    "recovery": "Recovery (0: nothing of the history, 1: all of it)",
    "nll_at_h": "Loss over the horizon, nats per token",
    "regret": "Loss above the measured oracle's, nats per token",
    "gain": "Share of the measured oracle's gain on recency",
    "task": "Facts hidden in a history: answers",
    "reach": "Facts that the allocator alone brings to level of detail 0",
    "baseline": "Baselines",
    "floor": "Exact floors of random-matrix gaps (nats)",
    "pit": "Calibration: probability integral transform",
    "coverage": "Calibration: coverage of central intervals",
    "slots": "Memory slots",
    "rollout": "Rollouts: error growth, and statistics beside the truth's",
    "rvq": "Residual quantiser",
    "latent": "Latent statistics",
    "latents": "Latent statistics",
    "telemetry": "Latent statistics",
    "diagnostics": "Diagnostics",
    "throughput": "Cost",
    "memory": "Cost",
    "cost": "Cost",
    "flops": "Cost",
    "parameters": "Cost",
    "ratio": "Cost",
    "wire": "The wire: numbers, bytes, and what they hold",
    "train": "Training",
}

# What each arm of a comparison is. Rows of a table follow this order.
ARMS = {
    "latent": "the compressed text",
    "cramming": "latents optimised per text (upper bound)",
    "full_text": "the whole text, as a prompt",
    "full_text_tuned": "the whole text with a tuned soft prompt",
    "embedding_replay": "the whole text through the embedding input",
    "embedding_replay_anchor": "the same, with the anchor text",
    "token_budget_head": "the first M tokens of the text",
    "token_budget_head_tuned": "the first M tokens with a tuned soft prompt",
    "token_budget_tail": "the last M tokens of the text",
    "token_budget_tail_tuned": "the last M tokens with a tuned soft prompt",
    "stride_tokens": "every n-th token",
    "mean_pool": "mean-pooled embeddings",
    "pca": "PCA of embeddings",
    "kv_stride": "every n-th key/value of a prefill",
    "kv_topk": "keys/values with most attention",
    "kv_question": "keys/values nearest the question",
    "full": "the whole history as raw text",
    "windowed": "raw keys/values, encoded in windows of their own",
    "lod0": "the fact raw, all else gists",
    "gist": "gists",
    "recency": "as many of the newest raw keys/values",
    "scrambled": "control: own latents in random order",
    "shuffled": "control: another text's latents or gists",
    "zero": "control: latents set to zero",
    "dropped": "control: no history",
    "no_context": "control: the question alone",
    "no_context_tuned": "control: the question with a tuned soft prompt",
}

# Last parts that are measures rather than rows.
_MEASURES = frozenset(
    "f1 em nll accuracy loss token_accuracy exact_prefix exact bleu crps perplexity entropy_ratio "
    "live found top5 top10 mean std".split()
)
# Columns that come first.
_FIRST = ("f1", "em", "f1_share", "f1_gain", "token_accuracy", "exact_match", "exact_prefix")
# What stands on top of a page, where the run has it.
HEADLINES = (
    "squad.f1.latent",
    "squad.f1.full_text",
    "squad.f1.no_context",
    "lookup.f1.latent",
    "qa.f1.latent",
    "ae.token_accuracy",
    "reconstruction.byte_accuracy",
    "bpb.total",
    "top.accuracy",
    "nll.last",
    "nll.position_averaged",
    "crps",
    "ratio",
)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One number with its interval, as text, and its size relative to its column for a bar."""

    text: str = ""
    interval: str = ""
    share: float = 0.0


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows × measures. `rows` holds (name, meaning, cells)."""

    title: str
    columns: list[str]
    rows: list[tuple[str, str, list[Cell]]]


@dataclasses.dataclass(frozen=True)
class Section:
    """All results that share a topic: tables, single numbers, and list-valued results."""

    key: str
    title: str
    tables: list[Table]
    facts: list[tuple[str, Cell]]
    lists: dict[str, list[float]]


def number(value: Any) -> str:
    """A number as a person wants to read it.

    Example:
      >>> number(0.81234), number(1234567), number(0.0000123), number(3), number(True)
      ('0.812', '1,234,567', '1.23e-05', '3', 'yes')
      >>> number(0.99983)
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


def place(name: str) -> tuple[str, str, str] | None:
    """Splits a dotted name into (table, row, measure), or None where it is a single number.

    Example:
      >>> place("squad.f1.latent")
      ('squad', 'latent', 'f1')
      >>> place("squad.first_top1.shuffled")
      ('squad', 'shuffled', 'first_top1')
      >>> place("squad.qwen.x8.f1.shuffled")
      ('squad.qwen.x8', 'shuffled', 'f1')
      >>> place("rvq.level0.stage2.live"), place("baseline.unigram.nll")
      (('rvq.level0', 'stage2', 'live'), ('baseline', 'unigram', 'nll'))
      >>> place("ae.token_accuracy") is None
      True
    """
    parts = name.split(".")
    if len(parts) < 3:
        return None
    *head, second, last = parts
    if last in ARMS or last.removesuffix("_tuned") in ARMS:
        return ".".join(head), last, second
    indexed = re.fullmatch(r"[a-z_]+\d+", second) and not re.fullmatch(r"[a-z_]+\d+", last)
    if second not in _MEASURES and (last in _MEASURES or indexed):
        return ".".join(head), second, last
    return ".".join(head), last, second


def cell(results: Mapping[str, Any], name: str, top: float = 0.0) -> Cell:
    value = results[name]
    if name.endswith("bytes") and is_number(value):
        return Cell(size(value))
    bounds = interval_of(results, name)
    share = max(0.0, min(1.0, value / top)) if is_number(value) and top > 0 else 0.0
    return Cell(
        number(value),
        f"{number(bounds[0])} – {number(bounds[1])}" if bounds else "",
        share if share == share else 0.0,
    )


def _rank(row: str) -> tuple[int, str]:
    names = list(ARMS)
    return (names.index(row), row) if row in ARMS else (len(names), row)


def sections(results: Mapping[str, Any]) -> list[Section]:
    """Groups results into the sections of a page."""
    scalars = {
        name: value
        for name, value in results.items()
        if not name.endswith(".ci95") and not isinstance(value, (list, dict, tuple))
    }
    tables: dict[str, dict[str, dict[str, str]]] = {}
    alone: list[str] = []
    for name in scalars:
        where = place(name)
        if where is None:
            alone.append(name)
        else:
            table, row, measure = where
            tables.setdefault(table, {}).setdefault(row, {})[measure] = name
    # `ae.token_accuracy` is the main row of the table that `ae.token_accuracy.shuffled` makes.
    facts: list[str] = []
    for name in alone:
        table, _, measure = name.rpartition(".")
        if any(measure in row for row in tables.get(table, {}).values()):
            tables[table].setdefault("latent" if table == "ae" else "this run", {})[measure] = name
        else:
            facts.append(name)

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
        rank = min((order.index(m) for m in mine if m in order), default=len(order))
        section = Section(
            key=sorted(mine)[0],
            title=title,
            tables=[
                _table(results, name, rows)
                for name, rows in tables.items()
                if name.split(".")[0] in mine
            ],
            facts=[(f, cell(results, f)) for f in facts if f.split(".")[0] in mine],
            lists={n: v for n, v in lists.items() if n.split(".")[0] in mine and v},
        )
        found.append((rank, section))
    return [section for _, section in sorted(found, key=lambda pair: pair[0])]


def _table(results: Mapping[str, Any], title: str, rows: dict[str, dict[str, str]]) -> Table:
    columns = list(dict.fromkeys(measure for row in rows.values() for measure in row))
    columns.sort(key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST))
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
        rows=[
            (
                row,
                ARMS.get(row, ""),
                [
                    cell(results, rows[row][m], top[m]) if m in rows[row] else Cell()
                    for m in columns
                ],
            )
            for row in sorted(rows, key=_rank)
        ],
    )


def headlines(results: Mapping[str, Any], limit: int = 5) -> list[tuple[str, Cell]]:
    """The few numbers that stand on top of the page."""
    chosen = [name for name in HEADLINES if is_number(results.get(name))]
    if not chosen:
        chosen = [name for name, value in results.items() if is_number(value)]
    return [(name, cell(results, name)) for name in chosen[:limit]]


def by_bits(
    results: Mapping[str, Any], measures: tuple[str, ...] = ("f1", "token_accuracy")
) -> tuple[list[str], dict[str, dict[str, tuple[float, tuple[float, float] | None]]]]:
    """Scores over the number formats of a wire: ("format, bytes per token", ascending) and
    measure → that → (score, interval).
    """
    found = {
        match.group(1): float(value)
        for name, value in results.items()
        if (match := re.fullmatch(r"wire\.([a-z0-9]+)\.bytes_per_token", name)) and is_number(value)
    }
    ordered = sorted(found.items(), key=itemgetter(1))
    names = {form: f"{form}\n{size(round(count))}" for form, count in ordered}
    lines = {
        measure: {
            label: (float(results[name]), interval_of(results, name))
            for form, label in names.items()
            if is_number(results.get(name := f"wire.{form}.{measure}"))
        }
        for measure in measures
    }
    return list(names.values()), {m: points for m, points in lines.items() if points}


def by_code_bits(
    results: Mapping[str, Any],
) -> tuple[list[str], dict[str, dict[str, tuple[float, tuple[float, float] | None]]]]:
    """Byte accuracy over the code bits that are kept: bits per byte, ascending, and level → that →
    (score, no interval).
    """
    points = []
    wanted = re.compile(r"rate_distortion\.(?:(level\d+)\.)?stages\d+\.code_bits_per_byte")
    for name, bits in results.items():
        match = wanted.fullmatch(name)
        score = results.get(name.replace("code_bits_per_byte", "byte_accuracy"))
        if match and is_number(bits) and is_number(score):
            points.append((float(bits), match.group(1) or "level0", float(score)))
    lines: dict[str, dict[str, tuple[float, None]]] = {}
    for bits, level, score in sorted(points):
        lines.setdefault(level, {})[f"{bits:.3g}"] = (score, None)
    return list(dict.fromkeys(f"{bits:.3g}" for bits, _, _ in sorted(points))), lines


def by_ratio(
    results: Mapping[str, Any], task: str = "squad", measure: str = "f1", main_reader: str = ""
) -> dict[str, dict[str, dict[float, tuple[float, tuple[float, float] | None]]]]:
    """Scores of every arm over compression ratios: reader → arm → ratio → (score, interval).

    The names `<task>.<measure>.<arm>` are of `main_reader`, at the ratio `<task>.ratio` or `ratio`.
    """
    found: dict[str, dict[str, dict[float, Any]]] = {}
    main = re.compile(rf"{re.escape(task)}\.{measure}\.([^.]+)")
    other = re.compile(rf"{re.escape(task)}\.(.+)\.x([0-9.]+?)\.{measure}\.([^.]+)")
    for name, value in results.items():
        if not is_number(value):
            continue
        if match := main.fullmatch(name):
            reader, arm = main_reader, match.group(1)
            ratio = results.get(f"{task}.ratio", results.get("ratio", 1.0))
        elif match := other.fullmatch(name):
            reader, ratio, arm = match.group(1), float(match.group(2)), match.group(3)
        else:
            continue
        # A measured ratio of 3.98 and one of the config's 4 are the same point of a plot.
        ratio = round(float(ratio), 1) if is_number(ratio) else 1.0
        point = (float(value), interval_of(results, name))
        found.setdefault(reader, {}).setdefault(arm, {})[ratio] = point
    return found
