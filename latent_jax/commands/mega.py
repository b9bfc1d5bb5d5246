"""`latent-jax mega …`: text files into a store of gists, and what a store holds."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from latent_jax.commands.show import console, present
from latent_jax.core.errors import ConfigError, StoreError

app = typer.Typer(no_args_is_help=True, help="A working context over unbounded history.")

_LISTED = 20  # skipped files that are named
_INTERVAL = 10.0  # seconds between lines of progress in a pipe

Store = Annotated[str, typer.Argument(help="Directory of a store.")]
Backbone = Annotated[
    str | None, typer.Option(help="Model whose tokens these are, without its weights; smollm2.")
]


@app.command()
def ingest(
    directory: Annotated[str, typer.Argument(help="Directory of text files, or one file.")],
    store: Annotated[str, typer.Option(help="Directory of the store; made if need be.")],
    backbone: Backbone = None,
    slots: Annotated[
        str | None, typer.Option(help="New store: vectors per gist at level 1,2,…: 1 or 4,16.")
    ] = None,
    width: Annotated[
        int | None, typer.Option(help="New store: numbers per vector; default the model's width.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="New store: float16, bfloat16, float32 or int8.")
    ] = None,
    run: Annotated[
        str | None, typer.Option(help="Trained run whose GistNet makes the gists, too.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only the result.")] = False,
) -> None:
    """Append the text files of a directory to a store; the same command continues.

    Each file is taken once (by path and content), in the order of its path; hidden files are left
    out. Without a run only the tokens are stored; with one, all gists that are missing or were
    made by another GistNet are made (a new store takes its layout from the run).
    """
    from latent_jax.systems.megacontext.store import GistTree, TreeSpec
    from latent_jax.systems.megacontext.store.ingest import find_files
    from latent_jax.systems.megacontext.store.ingest import ingest as append

    find_files(directory)  # says what is wrong before a store is made
    layout = {"slots": _slots(slots), "width": width, "dtype": dtype, "backbone": backbone}
    layout = {name: value for name, value in layout.items() if value is not None}
    if run is not None and layout:
        raise ConfigError(f"--{next(iter(layout))}: a run brings its own; leave it out")
    spec, tokenizer = _spec(layout) if run is None else _spec_of(run)
    if GistTree.exists(store):
        tree = GistTree.open(store, writable=True, **spec)
    else:
        tree = GistTree.create(store, TreeSpec(**spec))
    started = time.monotonic()
    with tree, _progress(quiet) as progress:
        done = append(tree, tokenizer, directory, progress)
        total = len(tree)
    seconds = time.monotonic() - started
    out = console()
    for name, reason in done.skipped[:_LISTED]:
        out.print(f"skipped {name}: {reason}", markup=False)
    if len(done.skipped) > _LISTED:
        out.print(f"skipped {len(done.skipped) - _LISTED} more")
    rate = f", {done.tokens / seconds:,.0f} tokens/s" if done.tokens else ""
    out.print(
        f"{store}: {done.added} files added ({done.tokens:,} tokens{rate}), {done.unchanged} "
        f"already there, {len(done.skipped)} skipped; the history has {total:,} tokens",
        markup=False,
    )
    if run is not None:
        from latent_jax.commands import inspect

        made = inspect.call("build_gists", run, {"store": store, "progress": _gist_progress(quiet)})
        out.print(made, markup=False)


@app.command()
def ask(
    store: Store,
    prompt: Annotated[str, typer.Argument(help="Text that follows the history, to be continued.")],
    run: Annotated[str, typer.Option(help="Trained run whose GistNet made the gists.")],
    budget: Annotated[int, typer.Option(help="Entries of the working context.")] = 512,
    policy: Annotated[str, typer.Option(help="What scores the nodes: bm25, attention, …")] = "bm25",
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, tokens.")] = 32,
    trace: Annotated[str | None, typer.Option(help="Keep the focus here (.npz).")] = None,
    append: Annotated[
        bool, typer.Option("--append", help="Add prompt and answer to the store, with gists.")
    ] = False,
) -> None:
    """Continue a prompt behind a working context that was focused for it.

    The context keeps its size however long the answer is: block by block what was said joins the
    history, and the focus moves.
    """
    from latent_jax.commands import inspect

    options = {
        "store": store, "prompt": prompt, "budget": budget, "policy": policy,
        "max_new_tokens": max_new_tokens, "trace": trace, "append": append,
    }  # fmt: skip
    present(inspect.call("recall", run, options))


@app.command()
def label(
    store: Store,
    run: Annotated[str, typer.Option(help="Trained run whose GistNet made the gists.")],
    out: Annotated[
        str | None, typer.Option(help="Parquet file; default STORE.labels.parquet.")
    ] = None,
    budget: Annotated[int, typer.Option(help="Entries of the working context.")] = 512,
    places: Annotated[int, typer.Option(help="Contexts that are labelled.")] = 64,
    horizon: Annotated[int, typer.Option(help="Blocks that are predicted.")] = 2,
    history: Annotated[
        int | None,
        typer.Option(help="Most blocks of history; default what half of the budget can hold."),
    ] = None,
    policies: Annotated[
        str, typer.Option(help="What moves the focus there, in turn.")
    ] = "recency,bm25,random",
    actions: Annotated[
        int | None, typer.Option(help="Actions measured per context; all by default.")
    ] = None,
    drops: Annotated[
        bool, typer.Option(help="Also measure leaving each span out altogether.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Draws the places and actions.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only the result.")] = False,
) -> None:
    """Measure what every focus action would be worth: tables that a lens is trained on.

    The table belongs to the run's gists; after they have been trained on, label again.
    """
    from latent_jax.commands import inspect
    from latent_jax.core import config as configs
    from latent_jax.systems.megacontext.label_config import LabelConfig

    options = configs.parse(LabelConfig, {
        "budget": budget, "places": places, "horizon": horizon, "drops": drops, "seed": seed,
        "policies": [name.strip() for name in policies.split(",")], "actions": actions,
        "history": history,
    })  # fmt: skip
    to = f"{store.rstrip('/')}.labels.parquet" if out is None else out
    present(inspect.call("label", run, {
        "store": store, "to": to, "options": options, "progress": _label_progress(quiet),
    }))  # fmt: skip


@app.command()
def trace(
    saved: Annotated[str, typer.Argument(help="Focus kept by `mega ask --trace`.")],
    html: Annotated[str, typer.Option(help="Page to write.")] = "focus.html",
) -> None:
    """Draw how the focus moved: history from left to right, iterations downwards."""
    from latent_jax.report.focus import write_timeline

    console().print(f"{write_timeline(saved, html)}", markup=False)


@app.command()
def info(
    store: Store,
    verify: Annotated[bool, typer.Option(help="Read everything against its checksums.")] = False,
) -> None:
    """Print what a store holds; with --verify, look for damage (exit code 2 where there is any)."""
    from latent_jax.systems.megacontext.store import GistTree

    with GistTree.open(store) as tree:
        out = console()
        _describe(tree, out)
        if not verify:
            for problem in tree.problems:
                out.print(f"damage: {problem}", markup=False)
            return
        report = tree.verify()
        for line in report.lines():
            out.print(f"damage: {line}", markup=False)
        if not report.ok:
            raise StoreError(
                f"{store}: damaged in {len(report.lines())} places (listed above); everything "
                "else can be read. Gists are made again by the next build"
            )
        out.print(f"verified: {report.blocks:,} blocks and {report.gists:,} gists, no damage")


def _spec(layout: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Fields of a store for tokens alone, and the tokenizer."""
    from latent_jax.backbones import outline

    model = outline(layout.pop("backbone", "smollm2"))
    spec = {
        "tokenizer": model.tokenizer.sha256, "base": model.sha256,
        "vocab_size": model.config.vocab_size, "width": model.config.hidden_size,
    }  # fmt: skip
    return spec | layout, model.tokenizer


def _spec_of(run: str) -> tuple[dict[str, Any], Any]:
    """Fields of the stores of a run's GistNet, and the tokenizer."""
    from latent_jax import run as runs
    from latent_jax.backbones import outline
    from latent_jax.systems.megacontext.config import MegaRun
    from latent_jax.systems.megacontext.memory import spec_fields

    path, config = runs.open_run(run)
    if not isinstance(config, MegaRun):
        raise ConfigError(f"--run {path}: a {config.system} run has no GistNet")
    model = outline(config.backbone.name)
    return spec_fields(model, config.model), model.tokenizer


def _slots(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise StoreError(f"--slots {text}: give whole numbers, such as 1 or 4,16") from None


def _describe(tree, out: Console) -> None:
    spec, sizes = tree.spec, tree.sizes()
    grid = Table(title=escape(str(tree.path)), title_justify="left", show_header=False)
    grid.add_column()
    grid.add_column(overflow="fold")
    grid.add_row("history", f"{len(tree):,} tokens in {len(tree.documents):,} documents")
    grid.add_row("tokenizer", spec.tokenizer or "not named")
    grid.add_row("base model", spec.base or "not named")
    grid.add_row("block", f"{spec.block} tokens, {spec.branch} children above")
    slots = ", ".join(map(str, spec.slots))
    noun = "slot" if slots == "1" else "slots"
    grid.add_row("gist", f"{slots} {noun} of {spec.width} numbers, {spec.dtype}")
    grid.add_row("gist version", tree.version or "none yet")
    total = sum(sizes.values())
    each = f", {total / len(tree):.2f} per token" if len(tree) else ""
    grid.add_row("bytes", f"{total:,}{each}")
    out.print(grid)
    if tree.levels:
        _levels(tree, sizes, out)


def _levels(tree, sizes: dict[str, int], out: Console) -> None:
    from latent_jax.systems.megacontext.store import State

    grid = Table(title="levels", title_justify="left")
    for column in ("level", "tokens per node", "nodes", "current", "partial", "stale", "none",
                   "bytes/token"):
        grid.add_column(column, justify="right")
    for level in range(1, tree.levels + 1):
        state = tree.state(level)
        used = sizes.get(f"level{level}.bin", 0) + sizes.get(f"level{level}.head", 0)
        counts = [int((state == which).sum()) for which in reversed(State)]
        cells = [level, tree.spec.tokens_in(level), tree.count(level), *counts]
        grid.add_row(*(f"{cell:,}" for cell in cells), f"{used / len(tree):.2f}")
    out.print(grid)


def _label_progress(quiet: bool) -> Callable[[int, int], None] | None:
    """A line now and then."""
    if quiet:
        return None
    last = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last >= _INTERVAL:
            last = time.monotonic()
            print(f"label: {done}/{total} contexts", file=sys.stderr, flush=True)

    return tell


def _gist_progress(quiet: bool) -> Callable[[int, int], None] | None:
    """A line now and then."""
    if quiet:
        return None
    last, total = time.monotonic(), 0

    def tell(level: int, made: int) -> None:
        nonlocal last, total
        total += made
        if time.monotonic() - last >= _INTERVAL:
            last = time.monotonic()
            print(f"gists: {total} made, at level {level}", file=sys.stderr, flush=True)

    return tell


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[int, int, int], None] | None]:
    """A bar on a terminal, else a line now and then."""
    if quiet:
        yield None
        return
    err = console(stderr=True)
    if not err.is_terminal:
        last = time.monotonic()

        def tell(done: int, files: int, tokens: int) -> None:
            nonlocal last
            if done == files or time.monotonic() - last >= _INTERVAL:
                last = time.monotonic()
                print(f"ingest: {done}/{files} files, {tokens} tokens", file=sys.stderr, flush=True)

        yield tell
        return
    from rich import progress as rp

    columns = (
        rp.TextColumn("ingest"),
        rp.BarColumn(bar_width=24),
        rp.MofNCompleteColumn(),
        rp.TextColumn("files, {task.fields[tokens]:,} tokens"),
        rp.TimeElapsedColumn(),
    )
    with rp.Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("ingest", total=None, tokens=0)
        yield lambda done, files, tokens: bar.update(
            task, completed=done, total=files, tokens=tokens
        )
