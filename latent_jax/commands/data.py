"""`latent-jax data …`: what a data source holds, and whether a file is well-formed."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from latent_jax.commands.show import console

app = typer.Typer(no_args_is_help=True, help="Look at data sources and check your own files.")

Root = Annotated[str | None, typer.Option(help="Data folder; default LATENT_JAX_DATA.")]
Split = Annotated[str, typer.Option(help="train, validation or all.")]


@app.command("list")
def list_() -> None:
    """Which sources are at hand."""
    from latent_jax.commands import info

    info._data(console())


@app.command()
def check(
    path: Annotated[str, typer.Argument(help="SQuAD-format JSON file, or a source's name.")],
    split: Split = "all",
    root: Root = None,
) -> None:
    """Read a question-answering file as a run would, and say what is wrong or what it holds."""
    from latent_jax.data import load_squad

    examples = load_squad(path, split, root)
    passages = {example.context for example in examples}
    titles = {example.title for example in examples}
    words = sorted(len(passage.split()) for passage in passages)
    middle = words[len(words) // 2] if words else 0
    console().print(
        f"{path}: {len(examples)} questions on {len(passages)} passages of {len(titles)} articles; "
        f"a passage has {middle} words (median), {words[-1] if words else 0} at most",
        markup=False,
    )


@app.command()
def show(
    source: Annotated[str, typer.Argument(help="Source or file, as in a config.")],
    split: Split = "validation",
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many.")] = 3,
    text: Annotated[bool, typer.Option("--text", help="Plain text, not questions.")] = False,
    root: Root = None,
) -> None:
    """Print the first examples of a source."""
    from latent_jax.data import load_squad, load_texts

    out = console()
    if text:
        for document in load_texts(source, split, root)[:count]:
            out.print(document[:1200] + ("…" if len(document) > 1200 else ""), markup=False)
            out.rule()
        return
    for example in load_squad(source, split, root)[:count]:
        out.print(f"[bold]{escape(example.title)}[/bold] ({escape(example.id)})")
        out.print(example.context, markup=False)
        out.print(f"[bold]{escape(example.question)}[/bold] {escape(' / '.join(example.answers))}")
        out.rule()
