"""A run's report in a notebook, part by part: what the page shows, drawn by the same code.

Everything here shows itself as the last expression of a cell.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from markupsafe import Markup

from latent_jax.core.errors import RunError
from latent_jax.core.yamlio import suggest
from latent_jax.report import html, samples, tables
from latent_jax.report.load import RunFiles, load_run

_SHELL = Markup(
    '<div class="latent-jax"><style>.latent-jax {{ {light} padding: .75rem; '
    "background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }}\n"
    "@media (prefers-color-scheme: dark) {{ .latent-jax {{ {dark} }} }}\n"
    ".latent-jax {{ {rules} }}</style>{body}</div>"
)


class View:
    """Some HTML that carries its own looks, for a cell's output.

    Example:
      >>> "latent-jax" in View(Markup("<b>1</b>"))._repr_html_()
      True
    """

    def __init__(self, body: Markup) -> None:
        self.body = body

    def __html__(self) -> str:
        style = html.templates().get_template("style.html.j2").module
        return _SHELL.format(
            light=style.light(), dark=style.dark(), rules=style.rules(), body=self.body
        )

    _repr_html_ = __html__

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.body)} characters of HTML)"


def show(*pictures: Markup, wide: bool = False) -> View:
    """Figures side by side, as many as there is room for; ``wide`` ones get more."""
    return View(Markup(_parts().figures(pictures, wide)))


class RunView(View):
    """What a run left behind: itself shows what was run and its headlines.

    Args:
      run: its directory.

    Raises:
      RunError: there is no run in it.
    """

    def __init__(self, run: str | Path) -> None:
        self.files: RunFiles = load_run(run)
        parts = _parts()
        title = f"{self.files.config.get('name') or self.files.path.resolve().name}"
        body = Markup("<strong>{}</strong>").format(title)
        body += Markup(parts.tiles(tables.headlines(self.files.results)))
        super().__init__(body + Markup(parts.pairs(html.facts(self.files))))

    def section(self, *keys: str) -> View:
        """Sections of the results, by the first part of their names: tables and figures.

        Raises:
          RunError: the run has none of them.
        """
        found = tables.sections(self.files.results, self.files.config)
        chosen = [s for s in found if any(key == s.key or _holds(s, key) for key in keys)]
        if not chosen:
            known = sorted({n.partition(".")[0] for n in self.files.results})
            raise RunError(
                f"{self.files.path}: no results {' or '.join(keys)}{suggest(keys[0], known)}; "
                f"there are: {', '.join(known) or 'none, `latent-jax eval` makes them'}"
            )
        parts = _parts()
        return _joined(parts.titled(s, *html.pictures(s, self.files)) for s in chosen)

    def curves(self, *words: str) -> View:
        """Curves of the training log; with ``words`` of the columns that have one in their name.

        Raises:
          RunError: there is no such column.
        """
        rows = self.files.metrics
        if words:
            kept = lambda name: name == "step" or any(word in name for word in words)  # noqa: E731
            rows = [{k: v for k, v in row.items() if kept(k)} for row in rows]
        groups = html.curves(rows, self.files.config)
        if not groups:
            raise RunError(
                f"{self.files.path}: metrics.jsonl has no column with "
                f"{' or '.join(words) or 'numbers'}"
            )
        return _joined(_parts().group(*group) for group in groups)

    def samples(self, count: int = 3) -> View:
        """Reconstructions with what is wrong marked, and answers of every arm."""
        parts, rows = _parts(), self.files.samples
        rebuilt = [parts.reconstruction(s) for s in samples.reconstructions(rows, count)]
        return _joined(rebuilt + [parts.answer(s) for s in samples.answers(rows, count)])


def _holds(section: tables.Section, key: str) -> bool:
    names = [*(t.title for t in section.tables), *(n for n, _ in section.facts), *section.lists]
    return any(name.partition(".")[0] == key for name in names)


def _joined(pieces: Iterable[str]) -> View:
    return View(Markup("").join(map(Markup, pieces)))


def _parts() -> Any:
    return html.templates().get_template("parts.html.j2").module

