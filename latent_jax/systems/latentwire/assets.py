"""Compressors as files: packaged, exported or a run's, all loaded the same way."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import load_file
from safetensors.numpy import save as serialise

from latent_jax.backbones import Backbone
from latent_jax.core import trees
from latent_jax.core.config import parse, read_yaml, to_dict
from latent_jax.core.errors import CheckpointError, ConfigError
from latent_jax.core.files import make_dir, write_bytes, write_json
from latent_jax.systems.latentwire import heads
from latent_jax.systems.latentwire.codes import COLLECTION, as_params
from latent_jax.systems.latentwire.config import TASKS, LatentWireRun, ModelConfig
from latent_jax.systems.latentwire.prompts import PromptConfig

FORMAT = "latentwire-compressor-2"
WEIGHTS = "compressor.safetensors"
SCALE = ".scale"
CENTRE = "centre.safetensors"

# Of a curve of losses.
_POINTS = 50


@dataclasses.dataclass(frozen=True)
class Stored:
    """A loaded compressor.

    Attributes:
      config: its shape.
      params: trained parameters, fp32 numpy.
      backbone: ``{'name', 'sha256'}`` of the LLM that it was trained on.
      tasks: what its task embeddings were trained for.
      record: how it came to be (config, data, seed, curves, results); empty for a bare run.
      prompt: how questions are put to its reader.
      centre: mean latent of its training texts, which integer wires take off; None for a bare run.
      readers: of each further reader, the sha256 of the LLM that its adapter was trained for.
      encoder: the sha256 of ``encoder.backbone``; empty where there is none, or of a bare run.
    """

    config: ModelConfig
    params: dict[str, Any]
    backbone: dict[str, str]
    tasks: tuple[str, ...]
    record: dict[str, Any]
    prompt: PromptConfig = dataclasses.field(default_factory=PromptConfig)
    centre: np.ndarray | None = None
    readers: dict[str, str] = dataclasses.field(default_factory=dict)
    encoder: str = ""


def packaged() -> list[str]:
    """Names of the compressors that ship with the package."""
    root = resources.files("latent_jax.assets") / "compressors"
    return sorted(p.name for p in root.iterdir() if p.is_dir()) if root.is_dir() else []


def _quantise(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 codes and fp32 scales, one per column of each matrix (symmetric, round to nearest)."""
    scale = np.maximum(np.abs(x).max(-2, keepdims=True), 1e-12) / 127
    return np.round(x / scale).astype(np.int8), scale.astype(np.float32)


def save_compressor(
    directory: str | Path,
    params: Mapping[str, Any],
    config: ModelConfig,
    backbone: Backbone,
    tasks: Sequence[str],
    record: Mapping[str, Any],
    prompt: PromptConfig | None = None,
    readers: Mapping[str, str] | None = None,
    encoder: str = "",
) -> Path:
    """Writes ``compressor.safetensors`` and ``record.json``, each aside and then renamed.

    Matrices of over 100,000 numbers are stored as int8 with a scale per column (tensor
    ``<name>.scale``), codebooks and all else as fp32.
    """
    out = make_dir(directory)
    flat = {}
    for name, leaf in trees.flatten(dict(params)).items():
        x = np.asarray(leaf, np.float32)
        if x.ndim >= 2 and x.size > 100_000 and not name.startswith(f"{COLLECTION}/"):
            x, flat[name + SCALE] = _quantise(x)
        flat[name] = x
    metadata = {
        "format": FORMAT,
        "tasks": json.dumps(list(tasks)),
        "model": json.dumps(to_dict(dataclasses.replace(config, start=None))),
        "backbone": json.dumps({"name": backbone.name, "sha256": backbone.sha256}),
        "prompt": json.dumps(to_dict(prompt or PromptConfig())),
        "readers": json.dumps(dict(readers or {})),
        "encoder": encoder,
    }
    write_bytes(out / WEIGHTS, serialise(flat, metadata))
    write_json(out / "record.json", dict(record))
    return out


def save_centre(directory: str | Path, centre: np.ndarray, texts: str) -> Path:
    """Writes the mean latent of some texts beside a compressor's weights.

    Args:
      directory: an exported compressor.
      centre: of `LatentWire.fit_centre`.
      texts: which they were, for the file's metadata.
    """
    tensor = {"centre": np.asarray(centre, np.float32)}
    return write_bytes(Path(directory) / CENTRE, serialise(tensor, {"texts": texts}))


def trained_tasks(run: LatentWireRun) -> tuple[str, ...]:
    """Tasks that batches ask for and a loss counts, here or in what the run started from."""
    before = read_compressor(run.model.start).tasks if run.model.start is not None else ()
    return tuple(t for t in TASKS if run.trains(t) or t in before)


def training_record(run: str | Path) -> dict[str, Any]:
    """How a run came to be: its configuration, environment, curve and results.

    Returns:
      ``config``, ``environment``, ``steps``, ``tokens`` (compressed in training), ``curve`` (rows
      of the evaluation while training, or where there was none its losses), ``results``, and
      ``before``: the same, less ``results``, of each compressor that it started from, oldest first.

    Raises:
      CheckpointError: neither this nor what it started from is a run or a compressor.
    """
    path = Path(run)
    if not (path / "config.yaml").is_file():
        raise CheckpointError(
            f"{run}: the record of how a compressor came to be needs this run or compressor, and "
            "it is not there"
        )
    config = read_yaml(path / "config.yaml")
    environment = json.loads((path / "environment.json").read_text(encoding="utf-8"))
    rows = [json.loads(x) for x in (path / "metrics.jsonl").read_text("utf-8").splitlines()]
    steps = max((row["step"] for row in rows), default=0)
    seen = [row for row in rows if any(k.startswith("eval.") for k in row)]
    if not seen:  # nothing was evaluated while training: its losses
        some = [row for row in rows if "loss" in row]
        some = some[:: max(len(some) // _POINTS, 1)]
        kept = ("step", "phase", "loss", "lr")
        seen = [{k: v for k, v in r.items() if k in kept or k.startswith("term.")} for r in some]
    curve = [
        {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in seen
    ]
    results = path / "results.json"
    start = (config.get("model") or {}).get("start")
    before = []
    if start is not None:
        # a run keeps no record of itself: it is made of the run's files, as this one is
        found = _directory(start)
        earlier = training_record(start) if found is None else dict(_read_file(found).record)
        before = earlier.pop("before", []) + [earlier | {"name": str(start)}]
        before[-1].pop("results", None)
    return {
        "config": config,
        "environment": environment,
        "steps": steps,
        "tokens": int(sum(row.get("units.tokens", 0) for row in rows)),
        "curve": curve,
        "results": json.loads(results.read_text("utf-8")) if results.is_file() else {},
        "before": before,
    }


def with_every_task(params: dict[str, Any]) -> dict[str, Any]:
    """Tasks that are younger than the compressor start with the vector of ``continue``."""
    if "tasks" not in params:
        return params
    tasks = np.asarray(params["tasks"])
    missing = len(TASKS) - len(tasks)
    start = np.repeat(tasks[TASKS.index("continue")][None], missing, axis=0)
    return {**params, "tasks": np.concatenate([tasks, start])}


def check_parts(trained: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuses to use a compressor without a part that was trained, or with one that was not.

    Linen ignores parameters that no module asks for: an evaluation with a part switched off would
    run, and measure something else than what was trained.

    Args:
      trained: parameters of a run.
      expected: those that this configuration has (shapes serve).

    Raises:
      ConfigError: a part is missing on either side, or has another shape.
    """
    have, want = trees.flatten(dict(trained)), trees.flatten(dict(expected))
    unused, fresh = sorted(set(have) - set(want)), sorted(set(want) - set(have))
    other = [
        f"{k} is {tuple(have[k].shape)}, not {tuple(want[k].shape)}"
        for k in sorted(set(have) & set(want))
        if k != "tasks" and tuple(have[k].shape) != tuple(want[k].shape)
    ]
    if unused or fresh or other:
        size = lambda tree: sum(math.prod(x.shape) for x in tree.values())  # noqa: E731
        said = [f"trained and left out: {', '.join(unused)}"] if unused else []
        said += [f"never trained: {', '.join(fresh)}"] if fresh else []
        raise ConfigError(
            f"model: this configuration has {size(want):,} parameters, {size(have):,} were trained "
            f"({'; '.join(said + other)}); evaluate with the model.* settings of the training"
        )


def _read_file(directory: Path) -> Stored:
    path = directory / WEIGHTS
    try:
        with safetensors.safe_open(path, framework="numpy") as f:
            meta = f.metadata() or {}
            flat = {n: f.get_tensor(n) for n in f.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, safetensors.SafetensorError) as e:
        raise CheckpointError(f"{path}: not a readable compressor ({e})") from e
    if meta.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {meta.get('format')!r}, this version reads {FORMAT}")
    scales = {n.removesuffix(SCALE): flat.pop(n) for n in list(flat) if n.endswith(SCALE)}
    flat = {n: x.astype(np.float32) * scales.get(n, np.float32(1)) for n, x in flat.items()}
    record, centre = directory / "record.json", None
    if (directory / CENTRE).is_file():
        try:
            centre = load_file(directory / CENTRE)["centre"]
        except (OSError, KeyError, safetensors.SafetensorError) as e:
            raise CheckpointError(f"{directory / CENTRE}: not a readable centre ({e})") from e
    return Stored(
        parse(ModelConfig, json.loads(meta["model"]), f"{path}: model"),
        with_every_task(trees.unflatten(flat)),
        json.loads(meta["backbone"]),
        tuple(json.loads(meta["tasks"])),
        json.loads(record.read_text()) if record.exists() else {},
        parse(PromptConfig, json.loads(meta.get("prompt", "{}")), f"{path}: prompt"),
        centre,
        json.loads(meta.get("readers", "{}")),
        meta.get("encoder", ""),
    )


def _directory(name: str | Path) -> Path | None:
    """Where a packaged or exported compressor is; None for a run's."""
    shipped = resources.files("latent_jax.assets") / "compressors" / str(name)
    candidates = (Path(str(shipped)), Path(name))
    return next((p for p in candidates if (p / WEIGHTS).is_file()), None)


def is_compressor(name: str | Path) -> bool:
    """Whether a packaged or exported compressor has that name."""
    return _directory(name) is not None


def read_compressor(name: str | Path) -> Stored:
    """Loads a compressor by packaged name, exported directory or run directory.

    Raises:
      CheckpointError: nothing of that name, or a damaged or foreign file.
    """
    if (directory := _directory(name)) is not None:
        return _read_file(directory)
    if (Path(name) / "checkpoints").is_dir():
        from latent_jax.train.checkpoints import load_variables

        tree = read_yaml(Path(name) / "config.yaml")
        if tree.get("system") != "latentwire":
            raise CheckpointError(
                f"{name}: a run of the system {tree.get('system')!r}, which compresses no text"
            )
        run = parse(LatentWireRun, tree, str(name))
        variables, _ = load_variables(name)
        reader = {"name": run.backbone.name, "sha256": ""}
        params = heads.folded(with_every_task(as_params(variables)))
        return Stored(run.model, params, reader, trained_tasks(run), {}, run.prompt)
    raise CheckpointError(
        f"{name}: no packaged compressor ({', '.join(packaged()) or 'none'}), no directory with "
        f"{WEIGHTS}, no run with checkpoints"
    )


def stored_run(name: str | Path) -> dict[str, Any]:
    """The settings of the run that a packaged or exported compressor is of, to evaluate it.

    Raises:
      CheckpointError: it has no record of its run.
    """
    stored = read_compressor(name)
    if "config" not in stored.record:
        raise CheckpointError(
            f"{name}: nothing says how it was trained (record.json), nor how to evaluate it"
        )
    tree, model = dict(stored.record["config"]), to_dict(stored.config)
    return tree | {
        "out": None, "model": model | {"start": str(name)}, "prompt": to_dict(stored.prompt),
        "train": tree["train"] | {"init_from": None},
    }  # fmt: skip


def load_compressor(name: str | Path, backbone: Backbone) -> Stored:
    """`read_compressor`, refused if it was trained on another LLM.

    Raises:
      CheckpointError: as above, or the LLM's weights differ.
    """
    stored = read_compressor(name)
    if stored.backbone["sha256"] not in ("", backbone.sha256):
        raise CheckpointError(
            f"{name}: trained on {stored.backbone['name']} ({stored.backbone['sha256'][:12]}), "
            f"this reader is {backbone.name} ({backbone.sha256[:12]})"
        )
    return stored
