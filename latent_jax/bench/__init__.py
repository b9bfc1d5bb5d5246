"""Benchmarks: ours beside a peer, in one process, as ratios.

`latent-jax bench NAME [--flag value …]` calls `run(NAME, args)`. A benchmark is a module with a
frozen dataclass of options and `main(options) -> dict`; it is imported only when it runs, so
peers stay optional installs.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latent_jax.core.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Bench:
    """A registered benchmark: `module` holds `Options` (a dataclass) and `main(options) ->
    dict`."""

    name: str
    module: str
    about: str


BENCHES: dict[str, Bench] = {}


def register(name: str, module: str, about: str) -> None:
    """Add a benchmark; `module` is imported only when it runs.

    Raises:
        ValueError: the name is taken.
    """
    if name in BENCHES:
        raise ValueError(f"benchmark {name!r} is registered twice")
    BENCHES[name] = Bench(name, module, about)


register(
    "backbone",
    "latent_jax.bench.backbone",
    "prefill and decode of a frozen LLM against transformers + torch on the CPU",
)
register(
    "rvq",
    "latent_jax.bench.rvq",
    "residual VQ against vector-quantize-pytorch: time, memory, and distortion of N(0, I)",
)
register(
    "mega",
    "latent_jax.bench.mega",
    "a working context beside the frozen base at the same W, and a store as it grows",
)
register(
    "mdn",
    "latent_jax.bench.mdn",
    "training step of the spacing transformer against a torch twin on the CPU",
)
register(
    "wire",
    "latent_jax.bench.wire",
    "training step of LatentWire against an in-context autoencoder in torch, same frozen reader",
)
register(
    "scaling",
    "latent_jax.bench.scaling",
    "how time grows with batch, length, vectors, codes, stages and devices",
)
register(
    "all",
    "latent_jax.bench.everything",
    "all of these in one process, beside the machine's own speed: one table, one JSON",
)


def names() -> list[str]:
    """Names of all benchmarks."""
    return sorted(BENCHES)


def _scalar(hint: Any) -> Any:
    """The parser of an option's type: `int | None` parses as int."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        inner = [a for a in typing.get_args(hint) if a is not type(None)]
        return inner[0]
    return hint


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(f"{self.prog}: {message}")


def parse_options(cls: type, args: Sequence[str], prog: str = "bench") -> Any:
    """Build the options dataclass `cls` from `--dashed-name value` arguments.

    Raises:
        ConfigError: an unknown option or a value of the wrong type.
    """
    parser = _Parser(prog=prog, allow_abbrev=False)
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        kind = _scalar(hints[f.name])
        flag = "--" + f.name.replace("_", "-")
        about = str(f.metadata.get("help", ""))
        if kind is bool:
            parser.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=f.default, help=about
            )
        else:
            parser.add_argument(
                flag, type=kind, default=f.default, help=f"{about} (default: {f.default})"
            )
    return cls(**vars(parser.parse_args(list(args))))


def run(name: str, args: Sequence[str] = (), out: str | Path | None = None) -> dict[str, Any]:
    """Run one benchmark and, with `out`, write its results as JSON (`out` may be a folder or a
    .json path).

    Args:
        name: registered name.
        args: its command-line options.
        out: where to write; None writes nothing.

    Returns:
        The results: flat dotted names.

    Raises:
        ConfigError: no such benchmark or option.
    """
    if name not in BENCHES:
        raise ConfigError(f"no benchmark named {name!r}: choose from {', '.join(names())}")
    module = importlib.import_module(BENCHES[name].module)
    options = parse_options(module.Options, args, prog=f"bench {name}")
    results = module.main(options)
    if out is not None:
        path = Path(out)
        path = path if path.suffix == ".json" else path / f"bench_{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(path.name + ".tmp")
        aside.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        os.replace(aside, path)
    return results
