"""`latent-jax compress | reconstruct`, and `ask` about a stored wire."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latent_jax.commands.inspect import read_text
from latent_jax.commands.show import console
from latent_jax.core.errors import ConfigError, WireError
from latent_jax.core.files import make_dir
from latent_jax.report.tables import size
from latent_jax.systems.latentwire.api import LatentWire
from latent_jax.systems.latentwire.assets import is_compressor
from latent_jax.systems.latentwire.config import MAIN
from latent_jax.systems.latentwire.cost import cost
from latent_jax.systems.latentwire.message import Message
from latent_jax.systems.latentwire.training_free import METHODS
from latent_jax.systems.latentwire.wire import check_form, is_wire, read_bytes, read_header


def compress(
    name: str, texts: Sequence[str], out: str, bits: str, ratio: float | None = None
) -> None:
    """Compresses text files into one wire and says what it takes."""
    check_form(bits)
    found = [read_text(path) for path in texts]
    make_dir(Path(out).parent)
    wire = _load(name)
    z = wire.compress(found, ratio)
    z.save(out, bits)
    c, width = cost(wire, z, found, bits), z.z.shape[-1]
    say(
        f"{out}: {_count(len(z), 'text')}, {_count(c.tokens, 'token')} in "
        f"{_count(c.latents, 'latent')} of {width:,} numbers ({bits}); ratio {z.ratio:g}, "
        f"M = {_some(z.latents)}, ceil(T / {z.ratio:g}) per segment of {z.segment} tokens"
    )
    say(
        f"bytes: {c.wire_bytes:,} = header {c.header:,} + scales {c.scales:,} + payload "
        f"{c.payload:,}, {c.wire_bytes / c.tokens:,.1f} per token; the text has {c.text_bytes:,} "
        f"in UTF-8, {c.gzip_bytes:,} gzipped"
    )
    say(
        f"reading: {size(c.latent_kv_bytes)} of keys and values instead of {size(c.text_kv_bytes)}"
        f", {c.latent_flops / 1e9:.3g} GFLOP of prefill instead of {c.text_flops / 1e9:.3g}"
    )
    say(c.verdict())


def reconstruct(path: str, compressor: str | None, reader: str = MAIN) -> None:
    """Rebuilds the texts of a stored wire, as one of its readers says them."""
    wire, z = _open(path, compressor)
    rebuilt = wire.read_by(reader).reconstruct(z)
    for number, text in enumerate(rebuilt):
        if len(rebuilt) > 1:
            say(f"[{number}]")
        say(text)


def ask(
    target: str, texts: Sequence[str], question: str, compressor: str | None = None,
    reader: str = MAIN,
) -> bool:  # fmt: skip
    """Answers from a stored wire, or from texts compressed by a named compressor.

    Returns:
      False where ``target`` is neither: a run then, whose system may answer in its own way.
    """
    if is_wire(target):
        if texts:
            raise ConfigError(f"--text: {target} is a stored wire and holds its text already")
        wire, z = _open(target, compressor)
    elif (is_compressor(target) or _training_free(target)) and texts:
        wire = _load(target)
        z = wire.compress([read_text(path) for path in texts])
    else:
        return False
    answers = wire.read_by(reader).answer(z, question)
    for number, answer in enumerate(answers):
        say(f"[{number}] {answer}" if len(answers) > 1 else answer)
    return True


def say(text: str) -> None:
    """Prints text as it is."""
    console().print(text, markup=False)


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"


def _some(values: Sequence[int], most: int = 8) -> str:
    return ", ".join(map(str, values[:most])) + (", …" if len(values) > most else "")


def _load(name: str) -> LatentWire:
    """A packaged or exported compressor, a run (of ``runs/`` too), or ``reader:method``."""
    if _training_free(name):
        reader, _, method = name.rpartition(":")
        return LatentWire.training_free(reader, method)
    inside = Path("runs") / name
    if not is_compressor(name) and not Path(name).exists() and inside.is_dir():
        name = str(inside)
    return LatentWire.load(name)


def _training_free(name: str) -> bool:
    return name.rpartition(":")[2] in METHODS and not Path(name).exists()


def _open(path: str, compressor: str | None) -> tuple[Any, Message]:
    """A stored wire with the compressor that it names, or another that is told."""
    header, _ = read_header(read_bytes(path), path)
    name = compressor or header.origin.encoder
    known = is_compressor(name) or _training_free(name) or Path(name).exists()
    if compressor is None and not known:
        raise WireError(
            f"{path}: made by {name or 'a compressor without a name'} for {header.origin.reader}, "
            "which is not here; name its compressor with --compressor"
        )
    wire = _load(name)
    return wire, wire.open(path)
