"""Options and arguments that several commands have in common."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

# Headings of the list of commands.
TRAIN, USE, HERE = "Train and evaluate", "Use what was trained", "What there is"

Config = Annotated[str, typer.Argument(help="A YAML file, or a packaged name: latentwire/tiny.")]
Run = Annotated[str, typer.Argument(help="Directory of a run.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Setting a.b=c; repeatable.")]
Out = Annotated[str | None, typer.Option(help="Where the files go; a run's: runs/NAME.")]
Seed = Annotated[int | None, typer.Option(help="Root of every random stream; the config's.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only the result.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Resolve, validate, plan memory, stop.")]
Profile = Annotated[bool, typer.Option("--profile", help="Trace a few steps, sum them up.")]
Checkpoint = Annotated[str, typer.Option(help="last, best, peak or a step.")]
Reader = Annotated[str, typer.Option(help="Which of the compressor's readers answers.")]
Compressor = Annotated[
    str | None, typer.Option(help="What reads a stored wire; default the one it names.")
]
Text = Annotated[str | None, typer.Option(help="Text file; - for standard input.")]


def overrides(set_: list[str] | None, **options: Any) -> list[str]:
    """Settings of --set, and what options of their own say of the same fields."""
    # JSON is YAML, and keeps a directory a text even where it reads like a number.
    return [*(set_ or []), *(f"{k}={json.dumps(v)}" for k, v in options.items() if v is not None)]
