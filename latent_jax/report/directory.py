"""The directory of a run: where it is, whose it is, and what it says of how it was made."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from latent_jax.core import config as configs
from latent_jax.core import files
from latent_jax.core.errors import ConfigError, RunError, UserError
from latent_jax.report import record


def out_dir(config: Any) -> Path:
    """Where a run's files go: `out`, else `runs/<name>`."""
    return Path(config.out) if config.out else Path("runs") / config.name


def prepare(config: Any) -> Path:
    """Makes the run's directory, or checks that it is this run's, and records what is run.

    Raises:
      RunError: the directory holds another run, or cannot be written.
    """
    from latent_jax.train.checkpoints import resume_hash

    out = out_dir(config)
    if not record.primary():
        return out  # the first process checks and writes; the trainer checks every checkpoint
    digest = resume_hash(config)
    recorded = out / "config.hash"
    trained = any((out / "checkpoints").glob("[0-9]*"))
    if recorded.is_file() and trained:
        old = recorded.read_text(encoding="utf-8").strip()
        if old != digest:
            raise RunError(
                f"{out} holds a run of another configuration ({old}, this one is {digest}"
                f"{_differences(out, config)}); give another --out, or train.init_from={out} to "
                "start from its weights"
            )
    elif (out / "config.yaml").exists() and not recorded.is_file():
        raise RunError(f"{out} holds a config.yaml that no run wrote; give another --out")
    files.make_dir(out)
    tree = configs.to_dict(config) | {"out": None}  # a run can be moved
    files.write_text(recorded, digest + "\n")
    files.write_text(out / "config.yaml", configs.dump_yaml(tree))
    files.write_json(out / "environment.json", record.environment())
    return out


@contextlib.contextmanager
def prepared(config: Any) -> Iterator[Path]:
    """`prepare`, and nothing is left of a new directory whose run is refused before its first step.

    Some settings can only be judged once the model is there, such as labels of parameters.
    """
    new = not out_dir(config).exists()
    out = prepare(config)
    try:
        yield out
    except UserError:
        if new and record.primary() and not (out / "metrics.jsonl").exists():
            shutil.rmtree(out, ignore_errors=True)
        raise


def _differences(out: Path, config: Any) -> str:
    """The first few settings in which the recorded run differs."""
    try:
        old = configs.read_yaml(out / "config.yaml")
    except ConfigError:
        return ""
    before, after = _flat(old), _flat(configs.to_dict(config))
    changed = [k for k in {**before, **after} if before.get(k) != after.get(k)]
    changed = [k for k in changed if k not in ("out", "name")][:3]
    return "".join(f"; {k}: {before.get(k)} → {after.get(k)}" for k in changed)


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    if isinstance(tree, Mapping) and tree:
        rows: dict[str, Any] = {}
        for key, value in tree.items():
            rows |= _flat(value, f"{path}.{key}" if path else str(key))
        return rows
    return {path: tree}
