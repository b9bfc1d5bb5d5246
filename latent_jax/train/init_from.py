"""Starting from another run's weights (``train.init_from``), with a fresh step counter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latent_jax.core import trees
from latent_jax.core.errors import CheckpointError
from latent_jax.train.checkpoints import load_variables
from latent_jax.train.state import TrainState


def read_weights(source: str) -> dict[str, np.ndarray]:
    """Reads ``{path: array}`` from ``RUN[@last|best|peak|STEP]`` or a ``.safetensors`` file.

    Paths start with the collection (``params/encoder/…``).
    """
    path = Path(source)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            return load_file(path)
        except (OSError, SafetensorError) as e:
            raise CheckpointError(f"cannot read weights {path}: {e}") from e
    run, _, which = source.partition("@")
    variables, _ = load_variables(run, which or "last")
    return trees.flatten(variables)


def save_weights(path: str | Path, variables: dict[str, Any], dtype: Any = None) -> None:
    """Writes variables as a ``.safetensors`` file that ``train.init_from`` reads."""
    from safetensors.numpy import save_file

    flat = {
        k: np.ascontiguousarray(np.asarray(jax.device_get(v)).astype(dtype or v.dtype))
        for k, v in trees.flatten(variables).items()
    }
    path = Path(path)
    aside = path.with_name(path.name + ".tmp")
    save_file(flat, aside)
    aside.replace(path)


def apply_init_from(
    state: TrainState, source: str, partial: bool, shardings: TrainState
) -> tuple[TrainState, str]:
    """Replaces variables of a fresh state by another run's.

    Args:
      state: a state at step 0.
      source: see `read_weights`.
      partial: allow variables that the source lacks (they keep their fresh values).
      shardings: where the arrays go.

    Returns:
      The state and one line that says what was taken.

    Raises:
      CheckpointError: unreadable source, a shape that differs, missing variables without
        ``partial``, or nothing in common.
    """
    found = read_weights(source)
    wanted = trees.flatten(state.variables)
    places = trees.flatten(shardings.variables)
    missing = sorted(set(wanted) - set(found))
    taken = {}
    for path in sorted(set(wanted) & set(found)):
        have, want = tuple(found[path].shape), tuple(wanted[path].shape)
        if have != want:
            raise CheckpointError(
                f"train.init_from={source}: {path} has shape {have} there and {want} here"
            )
        value = np.asarray(found[path]).astype(wanted[path].dtype)
        # A copy on the device: the step donates it, the numpy view must not be aliased.
        taken[path] = jnp.copy(jax.device_put(value, places[path]))
    if not taken:
        raise CheckpointError(f"train.init_from={source}: no variable in common with this system")
    if missing and not partial:
        raise CheckpointError(
            f"train.init_from={source} lacks {len(missing)} of {len(wanted)} variables, e.g. "
            f"{missing[0]}; set train.init_partial=true to start those afresh"
        )
    fresh = {k: v for k, v in wanted.items() if k not in taken}
    variables = {**fresh, **taken}

    def fill(prefix: str, tree: Any) -> Any:
        return trees.map_with_path(lambda path, _: variables[f"{prefix}/{path}"], tree)

    new = state.replace(
        params=fill("params", state.params),
        collections={k: fill(k, v) for k, v in state.collections.items()},
    )
    unused = len(set(found) - set(wanted))
    line = f"started from {source}: {len(taken)} arrays taken, {len(missing)} fresh"
    return new, line + (f", {unused} there unused" if unused else "")
