"""One self-contained HTML page per run, made from the files in its directory."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup, escape

from latent_jax.core.files import write_text
from latent_jax.report import calibration, comparisons, figures, samples, scores, tables, units
from latent_jax.report.load import RunFiles, load_run, series
from latent_jax.report.names import ARMS

_GROUPS = {
    "term": "Loss terms",
    "weight": "Weights",
    "share": "Shares of the loss",
    "eval": "Held out, while training",
    "units": "What a step reads",
}
_OPTIMISER = {"grad_norm": "gradient norm", "lr": "learning rate"}
_SHOWN_WARNINGS = 40

Rows = Sequence[Mapping[str, Any]]
Find = Callable[[Mapping[str, Any], Rows, Rows], Sequence[str]]


def write_report(run: str | Path, find: Find | None = None) -> Path:
    """Writes `report.html` into a run directory and returns its path.

    Args:
      run: the directory.
      find: see `render`.

    Raises:
      RunError: there is no run in that directory.
    """
    files = load_run(run)
    path = files.path / "report.html"
    write_text(path, render(files, find))
    return path


def render(files: RunFiles, find: Find | None = None) -> str:
    """The page as text.

    Args:
      files: what the run left behind.
      find: says what is known to be wrong, a line each, given the results, samples and log.
    """
    results = files.results
    known = find is not None and bool(results)
    return templates().get_template("page.html.j2").render(
        title=str(files.config.get("name") or files.path.resolve().name),
        system=str(files.config.get("system", "")),
        seed=files.config.get("seed"),
        hash=files.config_hash,
        made=datetime.datetime.now().astimezone().isoformat(" ", "minutes"),
        headlines=tables.headlines(results),
        facts=facts(files),
        machine=_flat(files.environment),
        config=yaml.safe_dump(files.config, sort_keys=False, allow_unicode=True),
        curves=curves(files.metrics, files.config),
        sections=[
            (section, *pictures(section, files))
            for section in tables.sections(results, files.config)
        ],
        reconstructions=samples.reconstructions(files.samples),
        answers=samples.answers(files.samples),
        others=samples.others(files.samples),
        warnings=[_flat(row) for row in files.warnings[-_SHOWN_WARNINGS:]],
        warning_count=len(files.warnings),
        findings=find(results, files.samples, files.metrics) if known else None,
        notes=files.notes,
    )


def templates() -> jinja2.Environment:
    """The templates of this room."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("latent_jax.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["breakable"] = _breakable
    return environment


def _breakable(name: str) -> Markup:
    """A dotted name that may go on in the next line after any of its parts."""
    return Markup(re.sub(r"([._])", r"\1<wbr>", str(escape(name))))


def pictures(section: tables.Section, files: RunFiles) -> tuple[list[Markup], list[Markup]]:
    """What is drawn of a section: comparisons, and results that are lists."""
    made = _comparisons(section, files.results, _reader(files.config))
    small = [_listed(name, values, files.results) for name, values in section.lists.items()]
    made, small = ([figures.captioned(p, section.note) for p in each] for each in (made, small))
    return made, small


def _listed(name: str, values: list[float], results: Mapping[str, Any]) -> Markup:
    """A result that is a list, in the form that its name asks for."""
    if name.endswith("pit.histogram"):
        count = results.get("windows")
        return calibration.pit(name, values, int(count) if tables.is_number(count) else None)
    across = "index"
    if name.endswith(".usage"):  # large codebooks come with several codes to a bar
        across = f"all codes in {len(values)} bars, most used first"
    if "pair_correlation" in name:
        across = "distance, tenths of a mean gap"
    return figures.histogram(name, values, units.unit(name), across)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            rows += _flat(value, f"{name}.")
        elif isinstance(value, list):
            rows.append((name, ", ".join(map(str, value))))
        elif name.endswith("_bytes") and tables.is_number(value):
            rows.append((name.removesuffix("_bytes"), tables.size(value)))
        elif value is not None:
            rows.append((name, tables.number(value)))
    return rows


def facts(files: RunFiles) -> list[tuple[str, str]]:
    """What was run, in a line each."""
    config, rows = files.config, files.metrics
    facts = [
        ("system", str(config.get("system", "?"))),
        ("configuration hash", files.config_hash or "?"),
        ("seed", str(config.get("seed", "?"))),
    ]
    data = config.get("data")
    if isinstance(data, Mapping):
        plain = [f"{k}: {v}" for k, v in data.items() if isinstance(v, (str, int, float))]
        facts.append(("data", " · ".join(plain)))
    if _reader(config):
        facts.append(("backbone", _reader(config)))
    if files.results.get("reader.frozen") == 0:
        facts.append(("reader", "NOT frozen: deltas of it were trained with the compressor"))
    steps = [row["step"] for row in rows if isinstance(row.get("step"), (int, float))]
    if steps:
        facts.append(("steps trained", tables.number(int(max(steps)))))
    return facts


def _reader(config: Mapping[str, Any]) -> str:
    """Name of the run's frozen model, if it has one."""
    backbone = config.get("backbone")
    name = backbone.get("name") if isinstance(backbone, Mapping) else backbone
    return str(name) if name else ""


def curves(
    rows: list[dict[str, Any]], config: Mapping[str, Any] | None = None
) -> list[tuple[str, list[Markup]]]:
    """Figures of the training log, grouped: one per loss term, shares stacked, the rest each.

    Args:
      rows: of ``metrics.jsonl``.
      config: of the run, for what stands below the figures.
    """
    made = _curves(rows)
    if config is None:
        return made
    own, held = units.trained_on(config), units.trained_on(config, held_out=True)
    return [
        (title, [figures.captioned(p, held if title == _GROUPS["eval"] else own) for p in each])
        for title, each in made
    ]


def _curves(rows: list[dict[str, Any]]) -> list[tuple[str, list[Markup]]]:
    groups: dict[str, dict[str, Any]] = {}
    for name, column in series(rows).items():
        # `term.ae`, `grad_norm.encoder`; a bare `grad_norm` is the whole of its group.
        group, _, rest = name.replace("/", ".", 1).partition(".")
        if rest or group in _OPTIMISER:
            groups.setdefault(group, {})[rest or "all"] = column
        elif group not in ("skipped", "skipped_total") or any(column[1]):
            groups.setdefault("", {})[name] = column
    made: list[tuple[str, list[Markup]]] = []
    # A weight that never moves is stated in the title of its term instead of drawn.
    weights = groups.pop("weight", {})
    fixed = {name: c[1][-1] for name, c in weights.items() if len(set(c[1])) == 1}
    moving = {name: c for name, c in weights.items() if name not in fixed}
    shares = groups.pop("share", {})
    main = groups.pop("", {})
    terms = []
    if "loss" in main:
        terms.append(figures.curve("loss", {"loss": main.pop("loss")}, unit="nats", log=True))
    for name, column in groups.pop("term", {}).items():
        title = f"{name} (weight {fixed[name]:g})" if name in fixed else name
        terms.append(figures.curve(title, {name: column}, unit=units.unit(f"term.{name}")))
    if len(shares) > 1:
        terms.append(figures.stacked("share of the loss", shares))
    if moving:
        title = "weights" if len(moving) > 1 else f"weight of {next(iter(moving))}"
        terms.append(figures.curve(title, moving, unit="weight"))
    if terms:
        made.append(("Loss, and its terms", terms))
    optimiser = [
        figures.curve(title, groups.pop(name), unit=units.unit(name), log=True)
        for name, title in _OPTIMISER.items()
        if name in groups
    ]
    for group, members in groups.items():
        panels = [
            figures.curve(name, lines, unit=units.unit(f"{group}.{name}"))
            for name, lines in _by_stage(members).items()
        ]
        made.append((_GROUPS.get(group, group.replace("_", " ").capitalize()), panels))
    if main:
        panels = [
            figures.curve(name.replace("_", " "), {name: column}, unit=units.unit(name))
            for name, column in main.items()
            if len(set(column[1])) > 1
        ]
        if panels:
            made.append(("What the system watches", panels))
    if optimiser:
        made.append(("Optimiser", optimiser))
    return made


def _by_stage(columns: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Columns as panels: those that differ in the number of a stage alone are lines of one."""
    panels: dict[str, dict[str, Any]] = {}
    for name, column in columns.items():
        stage = re.search(r"(?<![^.])stage\d+\.", name)
        title = name.replace(stage.group(), "") if stage else name
        panels.setdefault(title, {})[stage.group()[:-1] if stage else name] = column
    return panels


def _comparisons(
    section: tables.Section, results: Mapping[str, Any], main_reader: str
) -> list[Markup]:
    """Scores against bits; F1 of every arm against the ratio, or at a single one with intervals."""
    made: list[Markup] = []
    if section.key == "wire":
        names, lines = scores.by_bits(results)
        if len(names) > 1 and lines:
            label = "number format and bytes per token of text"
            made.append(figures.against("Quality against bits", label, names, lines, "share"))
    if section.key == "recovery":
        made += comparisons.recovery(results)
    if section.key == "baseline":
        made += comparisons.likelihoods(results)
    if section.key == "rate_distortion":
        names, lines = scores.by_code_bits(results)
        title = "Right bytes, free-running, by stages kept"
        made.append(figures.against(title, "code bits per byte", names, lines, "share of bytes"))
    for reader, arms in scores.by_ratio(results, section.key, main_reader=main_reader).items():
        title = f"F1, {reader}" if reader else "F1"
        ratios = {ratio for points in arms.values() for ratio in points}
        if len(ratios) > 1:
            single = {"full_text", "full_text_tuned", "no_context", "no_context_tuned"}
            flat = {a: next(iter(p.values()))[0] for a, p in arms.items() if a in single}
            lines = {a: p for a, p in arms.items() if a not in single}
            made.append(figures.against_ratio(f"{title} against the ratio", lines, flat))
        elif len(arms) > 1:
            order = list(ARMS)
            names = sorted(arms, key=lambda a: order.index(a) if a in order else len(order))
            points = {name: next(iter(arms[name].values())) for name in names}
            made.append(
                figures.dots(
                    f"{title} at {next(iter(ratios)):g}× compression",
                    {name: point[0] for name, point in points.items()},
                    {name: point[1] for name, point in points.items() if point[1]},
                    "F1, mean; the bar: its 95 % interval",
                )
            )
    return made
