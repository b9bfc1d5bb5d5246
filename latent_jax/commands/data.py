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

    info.data(console())


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


@app.command("calibrate-segments")
def calibrate_segments(
    run: Annotated[str, typer.Argument(help="Run with an entropy model or a router.")],
    bytes_per_segment: Annotated[float, typer.Option(min=1.0, help="Wanted mean length.")],
    delta: Annotated[
        bool, typer.Option("--delta", help="Find segments.delta, not segments.threshold.")
    ] = False,
    windows: Annotated[int, typer.Option(min=1, help="Training windows that are measured.")] = 512,
    checkpoint: Annotated[str, typer.Option(help="last, best, peak or a step.")] = "last",
    out: Annotated[str | None, typer.Option(help="JSON file for the result.")] = None,
) -> None:
    """Find the limit that cuts a run's training text, by entropy or learned, to a wanted length."""
    from latent_jax.commands import inspect
    from latent_jax.commands.show import present

    options = {"bytes_per_segment": bytes_per_segment, "delta": delta, "windows": windows}
    found = inspect.call("calibrate_segments", run, options, checkpoint=checkpoint, out=out)
    # The limit in full, as it is to be typed; a table would round it.
    present({k: v for k, v in found.items() if not k.startswith("segments.")})


@app.command()
def zeros(
    t0: Annotated[float, typer.Option(help="Height above which they lie.")] = 0.0,
    count: Annotated[int, typer.Option(min=1, help="How many.")] = 1000,
    out: Annotated[
        str | None, typer.Option(help=".npz (exact far up), .npy or .txt; without it: printed.")
    ] = None,
) -> None:
    """Make consecutive zeros of the Riemann zeta function; none is left out."""
    from latent_jax.data import riemann_siegel, zero_files

    if out is not None:
        zero_files.check_target(out)
    found = riemann_siegel.generate(t0, count)
    if out is None:
        print("\n".join(zero_files.as_text(found.base, found.offset)))
        return
    zero_files.write_zeros(out, found.base, found.offset)
    height = found.base + found.offset[-1]
    print(f"zeros {found.first} to {found.first + count - 1}, up to t = {height:.6f}: {out}")


@app.command()
def cue(
    out: Annotated[str, typer.Option(help=".npz, to be given as a source.")],
    n: Annotated[int, typer.Option("-n", min=2, help="Matrix size: gaps in a row.")] = 256,
    count: Annotated[int, typer.Option(min=1, help="Gaps in all.")] = 100_000,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same gaps.")] = 0,
) -> None:
    """Make eigenvalue gaps of random unitary matrices, whose best possible score is known."""
    from latent_jax.data import random_matrix, zero_files

    zero_files.check_target(out, (".npz",))
    gaps, run = random_matrix.cue(n, count, seed)
    zero_files.write_gaps(out, gaps, run)
    print(f"{count} gaps in runs of {run}, standard deviation {gaps.std():.4f}: {out}")
