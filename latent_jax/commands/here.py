"""Commands that say what there is: benchmarks, data files, machine, configurations."""

from __future__ import annotations

from typing import Annotated

import typer

from latent_jax.commands.options import HERE, Out, Quiet, Seed, Set, overrides

app = typer.Typer()


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    rich_help_panel=HERE,
)
def bench(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="Which; without it they are listed.")] = None,
    out: Out = None,
) -> None:
    """Benchmark against a peer, in one process: options after the name go to the benchmark."""
    from latent_jax import bench as benches
    from latent_jax.commands.show import present

    if name is None:
        for known in benches.names():
            print(f"{known:20} {benches.BENCHES[known].about}")
        return
    present(benches.run(name, context.args, out))


@app.command(rich_help_panel=HERE)
def fetch(
    name: Annotated[str, typer.Argument(help="smollm2, zeros or gemma3.")], quiet: Quiet = False,
    accept_terms: Annotated[
        bool, typer.Option("--accept-terms", help="Its use terms, if any, are read and accepted.")
    ] = False,
) -> None:  # fmt: skip
    """Download a pinned data file into the cache."""
    from latent_jax.core.fetch import accept
    from latent_jax.core.fetch import fetch as get

    path = get(name, quiet=quiet)
    accept(name, accept_terms)
    print(path)


@app.command(rich_help_panel=HERE)
def info() -> None:
    """Versions, devices, models and data at hand; what is missing, and the command that gets it."""
    from latent_jax.commands.info import info as show

    show()


@app.command("config", rich_help_panel=HERE)
def config_(
    config: Annotated[str | None, typer.Argument(help="Without it, the packaged ones.")] = None,
    set_: Set = None, out: Out = None, seed: Seed = None,
    plain: Annotated[bool, typer.Option("--yaml", help="Only the resolved YAML.")] = False,
) -> None:  # fmt: skip
    """Print the resolved configuration with the meaning of each setting."""
    from latent_jax import run as runs
    from latent_jax.commands import show
    from latent_jax.core.config import describe, dump_yaml, to_dict

    if config is None:
        print("\n".join(runs.packaged_configs()))
        return
    resolved = runs.resolve(config, overrides(set_, out=out, seed=seed))
    if plain:
        print(dump_yaml(to_dict(resolved)), end="")
    else:
        show.settings(describe(resolved))
