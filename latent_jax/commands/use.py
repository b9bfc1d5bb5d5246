"""Commands that use what was trained: texts, questions, wires, diagnoses, exports."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from latent_jax.commands.options import (
    USE,
    Checkpoint,
    Compressor,
    Out,
    Reader,
    Run,
    Seed,
    Set,
    Text,
    overrides,
)

app = typer.Typer()


@app.command(rich_help_panel=USE)
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
    call(run, options, raw, overrides(set_, seed=seed), checkpoint, out)


@app.command(rich_help_panel=USE)
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


@app.command(rich_help_panel=USE)
def compress(
    run: Annotated[str, typer.Argument(
        help="Packaged compressor, its directory, a run, or without training smollm2:kv_stride."
    )],
    text: Annotated[list[str], typer.Option(help="Text file, - for standard input; repeatable.")],
    out: Annotated[str, typer.Option(help="File to write.")],
    bits: Annotated[str, typer.Option(
        help="fp32, bf16, fp16, int8, int6, int4; codes of a discrete wire."
    )] = "fp32",
    ratio: Annotated[
        float | None, typer.Option(help="Tokens per latent; default the compressor's.")
    ] = None,
) -> None:
    """Compress texts into a file of latents, and say what that takes and what it saves."""
    from latent_jax.commands import wire

    wire.compress(run, text, out, bits, ratio)


@app.command(rich_help_panel=USE)
def reconstruct(
    wire: Annotated[str, typer.Argument(help="File of `compress`.")],
    compressor: Compressor = None, reader: Reader = "main",
) -> None:  # fmt: skip
    """Rebuild the texts of a stored wire from their latents."""
    from latent_jax.commands import wire as wires

    wires.reconstruct(wire, compressor, reader)


@app.command(rich_help_panel=USE)
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

    present(compare.diagnose(run, overrides(set_, seed=seed), checkpoint, out))


@app.command(rich_help_panel=USE)
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

    settings = overrides(set_, seed=seed)
    present(inspect.call(name, run, options, settings, checkpoint, out))
