"""The command line `latent-jax`.

Errors that a person can cause are one red line on stderr and exit code 2; a preempted run exits
with 75 and a hint; an interrupted one with 130. Anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated, Any

import typer

from latent_jax.commands import errors
from latent_jax.core.errors import UserError

app = typer.Typer(
    name="latent-jax",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Learned latent interfaces to language and sequence models.",
    epilog="First: latent-jax info, then latent-jax run latentwire/tiny (two minutes on a CPU).",
)
# Headings of the list of commands.
_TRAIN, _USE, _HERE = "Train and evaluate", "Use what was trained", "What there is"

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


def _overrides(set_: list[str] | None, **options: Any) -> list[str]:
    # JSON is YAML, and keeps a directory a text even where it reads like a number.
    return [*(set_ or []), *(f"{k}={json.dumps(v)}" for k, v in options.items() if v is not None)]


@app.command(rich_help_panel=_TRAIN)
def run(
    config: Config, set_: Set = None, out: Out = None, seed: Seed = None, quiet: Quiet = False,
    dry_run: DryRun = False, profile: Profile = False,
) -> None:  # fmt: skip
    """Train, evaluate and report; continues by itself where the directory holds this run."""
    from latent_jax.commands import work

    resolved = work.resolve(config, _overrides(set_, out=out, seed=seed))
    if dry_run:
        work.dry_run(resolved)
    else:
        work.run(resolved, quiet, profile)


@app.command(rich_help_panel=_TRAIN)
def train(
    config: Config, set_: Set = None, out: Out = None, seed: Seed = None, quiet: Quiet = False,
    dry_run: DryRun = False, profile: Profile = False,
) -> None:  # fmt: skip
    """Train only; continues by itself where the directory holds this run."""
    from latent_jax.commands import work

    resolved = work.resolve(config, _overrides(set_, out=out, seed=seed))
    if dry_run:
        work.dry_run(resolved)
    else:
        _, state, where = work.train(resolved, quiet, profile)
        print(f"trained {int(state.step)} steps: {where}")


@app.command(rich_help_panel=_TRAIN)
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
    found = plans.plan(runs.resolve(config, _overrides(set_)), machine)
    plans.show(found, console(), machine, table)


@app.command(rich_help_panel=_TRAIN)
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

    run_all(config, grid, _overrides(set_), out, metric or (), quiet, dry_run, cell)


@app.command("eval", rich_help_panel=_TRAIN)
def eval_(
    run: Run, checkpoint: Checkpoint = "last", set_: Set = None, out: Out = None,
    seed: Seed = None, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Evaluate a run again; rewrites its results and report (or writes them to --out)."""
    from latent_jax.commands import work

    work.evaluate(run, _overrides(set_, seed=seed), checkpoint, out, quiet)


@app.command(rich_help_panel=_TRAIN)
def report(run: Run) -> None:
    """Make a run's report.html again."""
    from latent_jax import run as runs

    print(runs.report(run))


@app.command(rich_help_panel=_USE)
def generate(
    run: Run, text: Text = None,
    prompt: Annotated[str | None, typer.Option(help="The text itself, instead of a file.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", "--bytes", min=1, help="At most this many.")
    ] = None,
    temperature: Annotated[
        str | None, typer.Option(help="0 is greedy; 0.9, or one per stage: 0.9,0.7.")
    ] = None,
    top_p: Annotated[str | None, typer.Option(help="Nucleus mass, likewise.")] = None,
    slide: Annotated[
        bool, typer.Option("--slide", help="Let the context move over longer texts.")
    ] = False,
    raw: Annotated[bool, typer.Option("--raw", help="Only the new bytes, exactly.")] = False,
    checkpoint: Checkpoint = "last", set_: Set = None, out: Out = None, seed: Seed = None,
) -> None:  # fmt: skip
    """Generate from a run: LatentWire compresses a text and rebuilds it, other models continue it.

    A model of bytes shows them as they come: what is no UTF-8 as replacement characters.
    """
    from latent_jax.commands.inspect import generate as call
    from latent_jax.commands.inspect import numbers, read_text
    from latent_jax.core.errors import ConfigError

    if text is not None and prompt is not None:
        raise ConfigError("--text and --prompt are two ways to give one text: use one of them")
    prompt = prompt if text is None else read_text(text)
    options = {
        "prompt": prompt, "max_new_tokens": max_new_tokens, "slide": slide or None,
        "temperature": numbers("--temperature", temperature), "top_p": numbers("--top-p", top_p),
    }  # fmt: skip
    call(run, options, raw, _overrides(set_, seed=seed), checkpoint, out)


@app.command(rich_help_panel=_USE)
def ask(
    run: Annotated[str, typer.Argument(help="Run, packaged compressor, or a stored wire.")],
    question: Annotated[str, typer.Option(help="What to ask about it.")],
    text: Annotated[str | None, typer.Option(help="Text file; - for standard input.")] = None,
    compressor: Compressor = None, reader: Reader = "main",
    checkpoint: Checkpoint = "last", set_: Set = None, out: Out = None, seed: Seed = None,
) -> None:  # fmt: skip
    """Answer a question from a text's latents: compressed now, or stored by `compress`."""
    from latent_jax.commands import wire
    from latent_jax.commands.inspect import read_text
    from latent_jax.core.errors import ConfigError, DataError

    if not question.strip():
        raise DataError("--question is empty")
    if wire.ask(run, [] if text is None else [text], question, compressor, reader):
        return
    if text is None:
        raise ConfigError(f"--text is missing: {run} is no stored wire; give a text to ask about")
    _hook("ask", run, checkpoint, set_, out, seed, text=read_text(text), question=question)


@app.command(rich_help_panel=_USE)
def compress(
    run: Annotated[str, typer.Argument(
        help="Packaged compressor, its directory, a run, or without training smollm2:kv_stride."
    )],
    text: Annotated[list[str], typer.Option(help="Text file, - for standard input; repeatable.")],
    out: Annotated[str, typer.Option(help="File to write.")],
    bits: Annotated[str, typer.Option(help="fp32, bf16, fp16, int8, int6 or int4.")] = "fp32",
    ratio: Annotated[
        float | None, typer.Option(help="Tokens per latent; default the compressor's.")
    ] = None,
) -> None:
    """Compress texts into a file of latents, and say what that takes and what it saves."""
    from latent_jax.commands import wire

    wire.compress(run, text, out, bits, ratio)


@app.command(rich_help_panel=_USE)
def reconstruct(
    wire: Annotated[str, typer.Argument(help="File of `compress`.")],
    compressor: Compressor = None, reader: Reader = "main",
) -> None:  # fmt: skip
    """Rebuild the texts of a stored wire from their latents."""
    from latent_jax.commands import wire as wires

    wires.reconstruct(wire, compressor, reader)


@app.command(rich_help_panel=_USE)
def diagnose(
    run: Annotated[list[str], typer.Argument(help="Runs, or quoted globs: 'runs/e3_seed*'.")],
    checkpoint: Checkpoint = "last", set_: Set = None, out: Out = None, seed: Seed = None,
) -> None:  # fmt: skip
    """Look for the known failures in a run: collapse, magnitudes, what the latents mean.

    Runs of several seeds give one table of mean and standard deviation, several configurations
    one row each.
    """
    from latent_jax.commands import compare
    from latent_jax.commands.show import present

    present(compare.diagnose(run, _overrides(set_, seed=seed), checkpoint, out))


@app.command(rich_help_panel=_USE)
def export(
    run: Run, to: Annotated[str, typer.Option(help="Directory to write.")],
    checkpoint: Checkpoint = "last", set_: Set = None, seed: Seed = None,
) -> None:  # fmt: skip
    """Write a run's trained weights with their training record, to be loaded or shipped."""
    _hook("export", run, checkpoint, set_, None, seed, to=to)


def _hook(
    name: str, run: str, checkpoint: str, set_: list[str] | None, out: str | None,
    seed: int | None, **options: Any,
) -> None:  # fmt: skip
    from latent_jax.commands import inspect
    from latent_jax.commands.show import present

    overrides = _overrides(set_, seed=seed)
    present(inspect.call(name, run, options, overrides, checkpoint, out))


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    rich_help_panel=_HERE,
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


@app.command(rich_help_panel=_HERE)
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


@app.command(rich_help_panel=_HERE)
def info() -> None:
    """Versions, devices, models and data at hand; what is missing, and the command that gets it."""
    from latent_jax.commands.info import info as show

    show()


@app.command("config", rich_help_panel=_HERE)
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
    resolved = runs.resolve(config, _overrides(set_, out=out, seed=seed))
    if plain:
        print(dump_yaml(to_dict(resolved)), end="")
    else:
        show.settings(describe(resolved))


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

    app.add_typer(data, name="data", rich_help_panel=_HERE)
    app.add_typer(mega, name="mega", rich_help_panel=_USE)


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
