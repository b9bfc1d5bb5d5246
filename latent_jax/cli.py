"""The command line `latent-jax`.

Errors that a person can cause are one red line on stderr and exit code 2; a preempted run exits
with 75 and a hint; an interrupted one with 130. Anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from latent_jax.commands import errors, here, use
from latent_jax.commands.options import (
    HERE,
    TRAIN,
    USE,
    Checkpoint,
    Config,
    DryRun,
    Out,
    Profile,
    Quiet,
    Run,
    Seed,
    Set,
    overrides,
)
from latent_jax.core.errors import UserError

app = typer.Typer(
    name="latent-jax",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Learned latent interfaces to language and sequence models.",
    epilog="First: latent-jax info, then latent-jax run latentwire/tiny (two minutes on a CPU).",
)
@app.command(rich_help_panel=TRAIN)
def run(
    config: Config, set_: Set = None, out: Out = None, seed: Seed = None, quiet: Quiet = False,
    dry_run: DryRun = False, profile: Profile = False,
) -> None:  # fmt: skip
    """Train, evaluate and report; continues by itself where the directory holds this run."""
    from latent_jax.commands import work

    resolved = work.resolve(config, overrides(set_, out=out, seed=seed))
    if dry_run:
        work.dry_run(resolved)
    else:
        work.run(resolved, quiet, profile)


@app.command(rich_help_panel=TRAIN)
def train(
    config: Config, set_: Set = None, out: Out = None, seed: Seed = None, quiet: Quiet = False,
    dry_run: DryRun = False, profile: Profile = False,
) -> None:  # fmt: skip
    """Train only; continues by itself where the directory holds this run."""
    from latent_jax.commands import work

    resolved = work.resolve(config, overrides(set_, out=out, seed=seed))
    if dry_run:
        work.dry_run(resolved)
    else:
        _, state, where = work.train(resolved, quiet, profile)
        print(f"trained {int(state.step)} steps: {where}")


@app.command(rich_help_panel=TRAIN)
def plan(
    config: Config,
    devices: Annotated[int, typer.Option(help="How many; none has to be there.")] = 1,
    chip: Annotated[str | None, typer.Option(help="a100, h100, h200, v5e or v5p.")] = None,
    hbm: Annotated[float | None, typer.Option(help="Memory of a device, GiB.")] = None,
    peak: Annotated[float | None, typer.Option(help="Peak of a device, TFLOP/s.")] = None,
    mfu: Annotated[float, typer.Option(help="Share of the peak that a step reaches.")] = 0.4,
    table: Annotated[bool, typer.Option("--table", help="Also every array, how split.")] = False,
    set_: Set = None,
) -> None:
    """Plan a run on devices that need not be there: bytes, FLOPs, time; loads no weights."""
    from latent_jax import run as runs
    from latent_jax.commands import plan as plans
    from latent_jax.commands.show import console

    machine = plans.Machine.of(devices, chip, hbm, peak, mfu)
    found = plans.plan(runs.resolve(config, overrides(set_)), machine)
    plans.show(found, console(), machine, table)


@app.command(rich_help_panel=TRAIN)
def sweep(
    config: Config,
    grid: Annotated[
        list[str], typer.Option(help="Setting and its values: train.steps=50,100; repeatable.")
    ],
    set_: Set = None, out: Out = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="Result to show, the first is drawn; repeatable.")
    ] = None,
    quiet: Quiet = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs, stop.")] = False,
    cell: Annotated[
        int | None, typer.Option(help="Run only this one, from 0: for arrays of jobs.")
    ] = None,
) -> None:  # fmt: skip
    """Run a config at every point of a grid; the same command continues. One table, one plot."""
    from latent_jax.commands.sweep import sweep as run_all

    run_all(config, grid, overrides(set_), out, metric or (), quiet, dry_run, cell)


@app.command("eval", rich_help_panel=TRAIN)
def eval_(
    run: Annotated[str, typer.Argument(help="Directory of a run, or a packaged compressor.")],
    checkpoint: Checkpoint = "last", set_: Set = None, out: Out = None,
    seed: Seed = None, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Evaluate a run again; rewrites its results and report (or writes them to --out).

    A packaged compressor is evaluated as its own run was.
    """
    from latent_jax.commands import work

    work.evaluate(run, overrides(set_, seed=seed), checkpoint, out, quiet)


@app.command(rich_help_panel=TRAIN)
def report(run: Run) -> None:
    """Make a run's report.html again."""
    from latent_jax import run as runs

    print(runs.report(run))


def _version(wanted: bool) -> None:
    if wanted:
        import latent_jax

        print(latent_jax.__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it and stop.")
    ] = False,
) -> None:
    pass


def _add_groups() -> None:
    from latent_jax.commands.data import app as data
    from latent_jax.commands.mega import app as mega

    app.add_typer(use.app)
    app.add_typer(here.app)
    app.add_typer(data, name="data", rich_help_panel=HERE)
    app.add_typer(mega, name="mega", rich_help_panel=USE)


_add_groups()


def main(args: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    debug = bool(os.environ.get("LATENT_JAX_DEBUG"))  # keeps every traceback
    if not debug:
        errors.quiet_threads()
    try:
        code = app(args, prog_name="latent-jax", standalone_mode=False)
        if code == 130:  # typer has swallowed the interrupt
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except UserError as error:
        if debug:
            raise
        return errors.complain(str(error), error.exit_code)
    except KeyboardInterrupt:
        return errors.complain("interrupted; a run continues with the same command", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if type(error).__name__ == "Abort":  # how click passes an interrupt on
            return errors.complain("interrupted; a run continues with the same command", 130)
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # a wrong command line
            context = getattr(error, "ctx", None)
            hint = f" (see {context.command_path} --help)" if context else ""
            message = error.format_message()
            if not message:  # no arguments: the help has been printed
                return int(error.exit_code)
            return errors.complain(f"{message.rstrip('.')}{hint}", int(error.exit_code))
        explained = errors.explain(error)
        if explained is None or debug:
            raise
        return errors.complain(explained, 2)


def entry() -> None:
    """Console script."""
    code = main()
    if code and _among_others():
        # Leaving in order would wait for the other processes, which may never come.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _among_others() -> bool:
    """Whether this process has joined a job of several."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


if __name__ == "__main__":
    entry()
