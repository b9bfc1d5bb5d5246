"""Pages that mkdocs makes from the checkout: the README, its neighbours, one page per module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_ROOT = Path(__file__).resolve().parents[2]
_TEXTS = {
    "index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md",
    "launch.md": "launch/README.md", "benchmarks.md": "latent_jax/bench/RESULTS.md",
    # Under their own paths, as the README links to them.
    **{
        page: page
        for name in ("latentwire", "megacontext", "spacing", "abstractinator")
        for page in [f"configs/{name}/README.md"]
    },
}  # fmt: skip


def modules() -> list[str]:
    """Dotted names of the package's modules, packages before what they hold."""
    paths = (path.relative_to(_ROOT).with_suffix("") for path in _ROOT.glob("latent_jax/**/*.py"))
    names = (p.parent if p.name == "__init__" else p for p in paths)
    return sorted(".".join(n.parts) for n in names if not n.name.startswith("_"))


def on_files(files: Files, config: Any) -> Files:
    """Adds the generated pages."""
    for page, source in _TEXTS.items():
        text = (_ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    every = set(modules())
    for name in every:
        package = any(other.startswith(f"{name}.") for other in every)
        path = "/".join(["api", *name.split(".")[1:], *["index"] * package]) + ".md"
        content = f"# {name.rpartition('.')[2]}\n\n`{name}`\n\n::: {name}\n"
        files.append(File.generated(config, path, content=content))
    return files
