"""Commands on a trained run that a system answers through its optional hooks.

A system may define any of these; their keyword arguments are the options of the commands:

    ask(variables, frozen, text, question) -> str or mapping
    generate(variables, frozen, prompt=None, max_new_tokens=None, tell=None) -> str or mapping;
        with ``tell``, a function that gets bytes as they come, these are shown instead
    export(variables, frozen, to) -> what was written
    diagnose(variables, frozen) -> mapping: flat numbers as in results.json, and findings as text
        (one, or a list)
    show(results) -> anything rich can print, or a mapping, at the end of `run` and `eval`

and `compare`, see `latent_jax.commands.compare`.
"""

from __future__ import annotations

import glob
import inspect
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from latent_jax import run as runs
from latent_jax.core import files
from latent_jax.core.errors import ConfigError, DataError, RunError
from latent_jax.report.load import is_number


def read_text(path: str) -> str:
    """The text of a file, `-` for standard input.

    Raises:
      DataError: unreadable, not text, or empty.
    """
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"--text {path}: no such file (use - for standard input)") from None
    except UnicodeDecodeError:
        raise DataError(f"--text {path}: not a UTF-8 text file") from None
    except OSError as error:
        raise DataError(f"--text {path}: {error.strerror}") from None
    if not text.strip():
        raise DataError(f"--text {path}: the text is empty")
    return text.strip()


def call(
    hook: str,
    run: str,
    options: Mapping[str, Any],
    overrides: Iterable[str] = (),
    checkpoint: str = "last",
    out: str | None = None,
) -> Any:
    """Calls `system.<hook>(variables, frozen, **options)` on a run.

    Args:
      hook: name of the method.
      run: the run's directory.
      options: keyword arguments; those that are None are left out.
      overrides: dotted settings that differ from the run's.
      checkpoint: `last`, `best`, `peak` or a step.
      out: file that gets what the hook returns, as JSON.

    Raises:
      RunError: no such run, or its system has no such hook.
      ConfigError: the hook does not take an option.
    """
    path, config = runs.open_run(run, overrides)
    cls = runs.system_class(config.system)
    method = getattr(cls, hook, None)
    if method is None:
        raise RunError(f"{path}: the system {config.system!r} cannot {hook}")
    given = {name: value for name, value in options.items() if value is not None}
    accepted = inspect.signature(method).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        for name in given:
            if name not in accepted:
                flag = "--" + name.replace("_", "-")
                raise ConfigError(f"{flag}: `{hook}` of {config.system!r} has no use for it")
    missing = [
        name
        for name, p in list(accepted.items())[3:]
        if p.default is p.empty and p.kind is not p.VAR_KEYWORD and name not in given
    ]
    if missing:
        flags = ", ".join("--" + name.replace("_", "-") for name in missing)
        raise ConfigError(f"`{hook}` of the system {config.system!r} needs {flags}")
    if "run" in accepted:  # a hook that reads the run's log and samples too
        given["run"] = path
    system, variables = runs.load(path, config, checkpoint)
    value = getattr(system, hook)(variables, system.frozen, **given)
    write(hook, value, out)
    return value


def write(hook: str, value: Any, out: str | None) -> None:
    """What a hook returned as JSON: into a file, or a folder as ``<hook>.json``."""
    if out is None:
        return
    target = Path(out)
    files.make_dir(target.parent)
    files.write_json(target / f"{hook}.json" if target.is_dir() else target, value)


def numbers(flag: str, text: str | None) -> list[float] | None:
    """Numbers between commas.

    Raises:
      ConfigError: something else.
    """
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{flag} {text}: a number, or several between commas") from None


def generate(
    run: str,
    options: Mapping[str, Any],
    raw: bool,
    overrides: Iterable[str] = (),
    checkpoint: str = "last",
    out: str | None = None,
) -> None:
    """Calls the hook `generate` and shows what it returns, or its bytes as they come.

    Args:
      run: the run's directory.
      options: keyword arguments of the hook.
      raw: write the bytes themselves, and nothing else.
      overrides: see `call`.
      checkpoint: see `call`.
      out: see `call`.

    Raises:
      ConfigError: ``raw`` for a system that does not tell its bytes; else as `call`.
    """
    from latent_jax.commands.show import Bytes, present

    _, config = runs.open_run(run, overrides)
    hook = getattr(runs.system_class(config.system), "generate", None)
    if hook is None or "tell" not in inspect.signature(hook).parameters:
        if raw:
            raise ConfigError(f"--raw: `generate` of {config.system!r} has no use for it")
        present(call("generate", run, options, overrides, checkpoint, out))
        return
    with Bytes(raw) as shown:
        call("generate", run, {**options, "tell": shown}, overrides, checkpoint, out)


def call_each(
    hook: str,
    names: Iterable[str],
    options: Mapping[str, Any],
    overrides: Iterable[str] = (),
    checkpoint: str = "last",
    out: str | None = None,
) -> Any:
    """`call` on one run, or on several (globs are expanded): their mean and standard deviation.

    Returns:
      What the hook returns for a single run. For several: every number that all have as its mean,
      with ``<name>.std`` (of a sample: between runs, in place of one between a run's seeds);
      ``runs``; and each run's findings after its name. A run named twice counts once.

    Raises:
      RunError: a glob that matches no run; else as `call`.
    """
    found = expand(names)
    if len(found) == 1:
        return call(hook, found[0], options, overrides, checkpoint, out)
    parts = [call(hook, run, options, overrides, checkpoint) for run in found]
    value = {"runs": len(found), **joined(parts)}
    value["findings"] = [
        f"{run}: {text}"
        for run, part in zip(found, parts, strict=True)
        for text in lines(part.get("findings", ()))
    ]
    write(hook, value, out)
    return value


def joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several runs' numbers as means, with ``<name>.std`` between runs; one run's as they are."""
    if len(parts) == 1:
        return dict(parts[0])
    found: dict[str, Any] = {}
    for name in parts[0]:
        if name.endswith(".std") and name.removesuffix(".std") in parts[0]:
            continue
        values = [part.get(name) for part in parts]
        if all(is_number(value) for value in values):
            found[name] = statistics.fmean(values)
            found[f"{name}.std"] = statistics.stdev(values)
    return found


def lines(findings: str | Iterable[str]) -> Iterable[str]:
    """Findings one by one, of a hook that gives them as a text or as a list."""
    return (findings,) if isinstance(findings, str) else findings


def expand(names: Iterable[str]) -> list[str]:
    """Runs by name, or that globs match, each once.

    Raises:
      RunError: a glob that matches no run.
    """
    return list(dict.fromkeys(run for name in names for run in _matches(name)))


def _matches(name: str) -> list[str]:
    if not glob.has_magic(name) or Path(name).is_dir():
        return [name]
    found = sorted(p for p in glob.glob(name) if (Path(p) / "config.yaml").is_file())
    if not found:
        raise RunError(f"{name}: no run matches")
    return found
