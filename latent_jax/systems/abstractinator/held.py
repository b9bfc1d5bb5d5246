"""Proof, from the trace of a step, that levels which a phase does not train hold still."""

from __future__ import annotations

from typing import Any

import jax

from latent_jax.core import trees
from latent_jax.core.errors import RunError
from latent_jax.systems.abstractinator import recipe
from latent_jax.systems.abstractinator.config import part

# Loss terms of every level, and of the lowest.
_TERMS, _LOWEST = ("commit", "entropy", "digits"), ("reconstruct", "ratio")


def prove(system: Any, kind: str) -> None:
    """Traces a training step of one kind of batch before anything is compiled.

    The codebooks of every level that the batch does not train have to leave the step as the very
    variables that came in, and no loss term may be such a level's. (That the phase updates none of
    its parameters is `checks.check`'s.)

    Args:
      system: the abstractinator.
      kind: a phase's data, such as ``top``.

    Raises:
      RunError: a held level would move; names the level and what moves it.
    """
    config = system.config
    mine = set(config.trains[kind])
    held = [i for i in range(len(config.levels)) if part("compressor", i) not in mine]
    if not held:
        return
    batch = recipe.batch_specs(config, kind)[0].arrays
    keys = {name: jax.random.key(0) for name in system.rng_names}

    def step(variables: Any, batch: Any) -> Any:
        return system.loss_terms(variables, {}, batch, keys, True)[:2]

    traced, shapes = jax.make_jaxpr(step, return_shape=True)(system.shapes, batch)
    came = dict(zip(trees.flatten((system.shapes, batch)), traced.jaxpr.invars, strict=True))
    left = dict(zip(trees.flatten(shapes), traced.jaxpr.outvars, strict=True))
    for i in held:
        where = f"level {i} would not hold still in a phase with data={kind}"
        book = f"codebook/{part('quantiser', i)}/"
        for path, value in left.items():
            if path.startswith(f"1/{book}") and value is not came[f"0/{path[2:]}"]:
                raise RunError(f"{where}: the step changes {path[2:]}")
        terms = {part(name, i) for name in _TERMS} | set(() if i else _LOWEST)
        found = sorted(name for name in shapes[0] if name in terms)
        if found:
            raise RunError(f"{where}: it has the loss term {found[0]}")
