"""Config → system, trainer, evaluation, report: what the command line, notebooks and
`latent_jax.run` call.

Each of `train`, `evaluate` and `report` also works alone on the directory of an existing run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from latent_jax.core import config as configs
from latent_jax.core import files
from latent_jax.core.errors import ConfigError, RunError
from latent_jax.core.parts import Parts
from latent_jax.core.yamlio import suggest
from latent_jax.report import record, write_report
from latent_jax.report.directory import prepared

# Name in a config's `system:` → its class. `package.module:Class` names one of your own.
SYSTEMS: dict[str, str] = {
    "abstractinator": "latent_jax.systems.abstractinator.system:AbstractinatorSystem",
    "latentwire": "latent_jax.systems.latentwire.system:LatentWireSystem",
    "megacontext": "latent_jax.systems.megacontext.system:MegaContextSystem",
    "lm": "latent_jax.systems.lm.system:LMSystem",
    "spacing": "latent_jax.systems.spacing.system:SpacingSystem",
}

_ROOTS = (Path(__file__).resolve().parent.parent / "configs", Path(__file__).parent / "configs")


class Results(dict[str, Any]):
    """Flat dotted name → number (`<name>.ci95` → interval), with the run's directory.

    Attributes:
      out: the run's directory.
      artefacts: what the evaluation made beside numbers (samples, arrays).
      system: the system that was evaluated.
    """

    def __init__(
        self, values: Mapping[str, Any], out: Path, artefacts: Mapping[str, Any], system: Any
    ) -> None:
        super().__init__(values)
        self.out = out
        self.system = system
        self.artefacts = dict(artefacts)

    @property
    def report(self) -> Path:
        """Path of the HTML report."""
        return self.out / "report.html"


def system_class(name: str) -> type:
    """The class behind a config's `system:`.

    Raises:
      ConfigError: no such system.
    """
    target = SYSTEMS.get(name, name)
    if ":" not in target:
        hint = suggest(name, SYSTEMS) if name else ""
        raise ConfigError(
            f"system = {name!r}: no such system{hint}; allowed: {', '.join(SYSTEMS)}, "
            "or package.module:Class"
        )
    module, _, attribute = target.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise  # the system is there, something it imports is not
        raise ConfigError(f"system = {name!r}: cannot import {module}") from None
    except AttributeError:
        raise ConfigError(f"system = {name!r}: {module} has no {attribute}") from None
    if not hasattr(found, "config_class"):
        raise ConfigError(f"system = {name!r}: {attribute} has no config_class, it is no system")
    return found


def find_config(name: str | Path) -> Path:
    """A config's file: a path, or the name of a packaged one such as `latentwire/tiny`.

    Raises:
      ConfigError: there is none.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    relative = path.relative_to("configs") if path.parts[:1] == ("configs",) else path
    for root in _ROOTS:
        for candidate in (root / relative, root / f"{relative}.yaml"):
            if not path.is_absolute() and candidate.is_file():
                return candidate
    hint = suggest(_short(relative), packaged_configs())
    raise ConfigError(f"{name}: no such config{hint}; `latent-jax config` lists the packaged ones")


def packaged_configs() -> list[str]:
    """Names of the configs that come with the package."""
    return sorted(
        {_short(p.relative_to(root)) for root in _ROOTS for p in root.rglob("*.yaml")}
    )


def _short(path: Path) -> str:
    return path.as_posix().removesuffix(".yaml")


def resolve(
    config: str | Path | Mapping[str, Any] | Any,
    overrides: Iterable[str] | Mapping[str, Any] = (),
) -> Any:
    """Resolves a config file, mapping or config object, with dotted overrides, strictly.

    Raises:
      ConfigError: unknown key, wrong type, impossible combination, no such file or system.
    """
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        if not overrides:
            return config
        config = configs.to_dict(config)
    tree = dict(config) if isinstance(config, Mapping) else configs.read_yaml(find_config(config))
    tree = configs.apply_overrides(tree, overrides)
    name = tree.get("system")
    if not isinstance(name, str):
        raise ConfigError(f"system is missing: name one of {', '.join(SYSTEMS)}")
    return configs.parse(system_class(name).config_class, tree)


def open_run(
    run: str | Path, overrides: Iterable[str] | Mapping[str, Any] = ()
) -> tuple[Path, Any]:
    """The directory and config of an existing run; the name and config of weights that a system
    ships or has exported (its ``stored``).

    Raises:
      RunError: no such run.
    """
    path = Path(run)
    if not path.is_dir() and (Path("runs") / path).is_dir():
        path = Path("runs") / path
    if not (path / "checkpoints").is_dir():
        for name in SYSTEMS:
            tree = getattr(system_class(name), "stored", lambda _: None)(str(run))
            if tree is not None:
                return Path(run), resolve(tree, overrides)
    if not path.is_dir():
        runs = sorted(p.parent.name for p in Path("runs").glob("*/config.yaml"))
        known = f"; in runs/ there are: {', '.join(runs)}" if runs else ""
        raise RunError(f"no such run: {run} is not a directory{known}")
    if not (path / "config.yaml").is_file():
        raise RunError(f"not a run: {path} has no config.yaml")
    return path, resolve(path / "config.yaml", overrides)


def train(
    config: Any, progress: Any = None, profile: bool = False
) -> tuple[Any, Any, Path]:
    """Trains a resolved config (or continues its run).

    Args:
      config: from `resolve`.
      progress: called with `train.progress.ProgressEvent`s.
      profile: trace a few steps into ``profile/`` of the run's directory.

    Returns:
      (system, final TrainState, the run's directory).
    """
    from latent_jax.sharding import make_mesh
    from latent_jax.train.loop import fit

    began = time.perf_counter()
    mesh = make_mesh(config.mesh)  # a wrong mesh is told before a model is loaded
    rates: dict[str, float] = {}
    costs: dict[str, float] = {}

    def watch(event: Any) -> None:
        rates.update(event.rates)
        if event.host is not None:
            costs["throughput.host_share"] = event.host
        if progress is not None:
            progress(event)

    with prepared(config) as out:
        system = system_class(config.system)(config)
        state = fit(system, config, out, mesh, watch, profile)
    throughput = {f"throughput.{unit}_per_second": rate for unit, rate in rates.items()} | costs
    if throughput and record.primary():
        files.write_json(out / "throughput.json", throughput)
    record.history(out, "train", config, began, {"step": int(state.step), **throughput})
    return system, state, out


def load(run: str | Path, config: Any = None, checkpoint: str = "last") -> tuple[Any, Any]:
    """Builds the system of a run with its trained variables: (system, variables)."""
    from latent_jax.train.checkpoints import load_variables

    if config is None:
        run, config = open_run(run)
    cls = system_class(config.system)
    if hasattr(cls, "stored") and cls.stored(str(run)) is not None:
        system = cls(config)
        return system, system.stored_variables(str(run))
    # Before the system is built: a run without checkpoints should say so at once.
    variables, _ = load_variables(run, checkpoint)
    return cls(config), variables


def evaluate(
    run: str | Path,
    overrides: Iterable[str] | Mapping[str, Any] = (),
    checkpoint: str = "last",
    out: str | Path | None = None,
    progress: Any = None,
) -> Results:
    """Evaluates an existing run again and writes its results and report.

    Args:
      run: the run's directory, or weights that a system ships or has exported: those are evaluated
        as their run was, into ``runs/<name>``.
      overrides: settings that differ, such as `eval.segments=500`.
      checkpoint: `last`, `best`, `peak`, or a step.
      out: another directory for the results; the run's own are then kept.
      progress: called as progress(what, done, total).
    """
    path, config = open_run(run, overrides)
    system, variables = load(path, config, checkpoint)
    if out is None and not (path / "config.yaml").is_file():
        out = Path("runs") / path.name
    if out is not None and Path(out).resolve() != path.resolve():
        out = files.make_dir(out)
        with files.explained(out):
            for name in ("config.hash", "metrics.jsonl", "warnings.jsonl", "throughput.json"):
                if (path / name).is_file():
                    shutil.copyfile(path / name, out / name)
        files.write_text(out / "config.yaml", configs.dump_yaml(configs.to_dict(config)))
        files.write_json(out / "environment.json", record.environment())
        path = out
    return finish(system, variables, config, path, progress, checkpoint)


def finish(
    system: Any, variables: Any, config: Any, out: Path, progress: Any, checkpoint: str = "last"
) -> Results:
    """Evaluates a system with its variables, and writes results, samples, history and report."""
    import jax

    from latent_jax.sharding import make_mesh, tree_shardings

    began = time.perf_counter()
    mesh = make_mesh(config.mesh)

    def placed(tree: Any) -> Any:
        return jax.device_put(tree, tree_shardings(tree, system.logical_rules, mesh))

    with jax.set_mesh(mesh):
        variables = {name: placed(tree) for name, tree in variables.items()}
        if hasattr(system, "train_controls"):  # what the evaluation compares with is trained too
            from latent_jax.train.loop import fit

            system.train_controls(fit, out / "controls", mesh)
        options: dict[str, Any] = {"progress": progress}
        if getattr(system, "evaluates_in_parts", False):
            options["parts"] = _parts(out, config, variables)
        metrics, artefacts = system.evaluate(variables, placed(system.frozen), **options)
    if hasattr(system, "judge"):  # what its log says
        metrics = dict(metrics) | system.judge(out)
    costs = _read(out / "throughput.json") | {"memory.peak_bytes": record.peak_bytes()}
    results = Results(record.flat_numbers(costs | dict(metrics)), out, artefacts, system)
    if record.primary():
        samples = list(artefacts.get("samples") or [])
        if artefacts.get("demonstration"):
            samples.append({"kind": "demonstration", **artefacts["demonstration"]})
        files.write_jsonl(out / "samples.jsonl", samples)
        files.write_json(out / "results.json", dict(results))
        record.history(out, "eval", config, began, record.headline(results), checkpoint)
        write_report(out, getattr(system, "findings", None))
        if "parts" in options:
            options["parts"].done()
    return results


def _parts(out: Path, config: Any, variables: Any) -> Parts:
    """Finished parts of an evaluation that was stopped: of these weights, settings and sources."""
    import jax
    import numpy as np

    if jax.process_count() > 1:  # all must measure the same parts
        return Parts(None, "")
    digest = hashlib.sha256(f"{configs.config_hash(config)} {record.source_digest()}".encode())
    for leaf in jax.tree.leaves(variables):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return Parts(out / "evaluation.parts.json", digest.hexdigest()[:16])


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}


def report(run: str | Path) -> Path:
    """Makes the report of an existing run again; returns its path."""
    path, config = open_run(run)
    return write_report(path, getattr(system_class(config.system), "findings", None))


def run(
    config: str | Path | Mapping[str, Any] | Any,
    *,
    progress: Any = None,
    eval_progress: Any = None,
    **overrides: Any,
) -> Results:
    """Trains, evaluates and reports; continues by itself where the directory holds this run.

    Args:
      config: path or packaged name of a YAML file, a mapping, or a config object.
      progress: called with the trainer's `ProgressEvent`s.
      eval_progress: called as progress(what, done, total) during the evaluation.
      **overrides: dotted settings; `train__steps=50` or `**{"train.steps": 50}`.

    Returns:
      The results, with `.out` and `.report`.

    Raises:
      UserError: anything wrong with the config, the data, the directory or the devices.

    Example:
      >>> results = run("latentwire/tiny", train__steps=50, out="runs/try")  # doctest: +SKIP
      >>> results["ae.token_accuracy"]  # doctest: +SKIP
    """
    dotted = {name.replace("__", "."): value for name, value in overrides.items()}
    resolved = resolve(config, dotted)
    system, state, out = train(resolved, progress)
    return finish(system, state.variables, resolved, out, eval_progress)

