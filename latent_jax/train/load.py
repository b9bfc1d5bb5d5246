"""Reading a run's variables without its optimizer, data or mesh."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from latent_jax.core import trees
from latent_jax.core.errors import CheckpointError


def quiet_orbax() -> None:
    """Keeps Orbax's log records off the terminal.

    What goes wrong is raised and told in one line by us; Orbax logs every traceback besides. They
    stay visible at level DEBUG of the logger "absl".
    """
    logger = logging.getLogger("absl")
    if not any(isinstance(f, _NotOrbax) for f in logger.filters):
        logger.addFilter(_NotOrbax())


class _NotOrbax(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        verbose = logging.getLogger("absl").level == logging.DEBUG
        return verbose or "orbax" not in record.pathname


def load_variables(run: str | Path, which: str = "last") -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads the variables of a run as numpy arrays, without knowing its optimizer or mesh.

    Args:
      run: run directory (the one that holds ``checkpoints/``), or that directory itself.
      which: ``last``, ``best`` (raw metric), ``peak`` (smoothed metric), or a step.

    Returns:
      ``(variables, meta)`` with ``variables = {"params": …, **collections}``.

    Raises:
      CheckpointError: no such run or step, or it cannot be read.
    """
    quiet_orbax()
    directory = Path(run)
    if directory.name != "checkpoints":
        directory = directory / "checkpoints"
    steps = sorted(int(p.name) for p in directory.glob("*") if p.name.isdigit())
    if not steps:
        raise CheckpointError(f"no checkpoint in {directory}: is that a run's directory?")
    step = _choose(directory, steps, which)
    root = (directory / str(step)).absolute()
    try:
        meta = _meta(root)
        with ocp.StandardCheckpointer() as reader:
            shapes = reader.metadata(root / "variables").item_metadata.tree
            target = jax.tree.map(
                lambda m: jax.ShapeDtypeStruct(
                    m.shape, m.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
                ),
                dict(shapes),
            )
            flat = reader.restore(root / "variables", target)
    except CheckpointError:
        raise
    except Exception as e:  # noqa: BLE001 - Orbax raises many kinds for a damaged file
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0][:160]
        raise CheckpointError(f"checkpoint {root} cannot be read: {reason}") from e
    variables = trees.unflatten({k: np.asarray(v) for k, v in flat.items()})
    variables.setdefault("params", {})
    if trees.count_params(variables["params"]) != meta["param_count"]:
        raise CheckpointError(
            f"checkpoint {root} holds {trees.count_params(variables['params'])} parameters, "
            f"{meta['param_count']} were trained"
        )
    return variables, meta


def _choose(directory: Path, steps: list[int], which: str) -> int:
    if which == "last":
        return steps[-1]
    if which in ("best", "peak"):
        host = _meta(directory / str(steps[-1]))["host"]
        chosen = host.get("selection", {}).get(which)
        if chosen is not None and chosen not in steps:
            raise CheckpointError(
                f"{directory}: the {which} checkpoint, step {chosen}, is not there any more; there "
                f"are: last, {', '.join(map(str, steps))}"
            )
        return steps[-1] if chosen is None else int(chosen)
    if which.isdigit() and int(which) in steps:
        return int(which)
    raise CheckpointError(
        f"{directory} has no checkpoint {which!r}; there are: last, best, peak, "
        + ", ".join(map(str, steps))
    )


def _meta(root: Path) -> dict[str, Any]:
    try:
        return json.loads((root / "meta" / "metadata").read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise CheckpointError(f"checkpoint {root} has no readable meta: {e}") from e
