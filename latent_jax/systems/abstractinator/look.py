"""What one looks at in an abstractinator: nats byte by byte, and which codes a segment has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from latent_jax.systems.abstractinator import losses


class Window(NamedTuple):
    """One held-out window.

    Attributes:
      pieces: its bytes; those that are not printable ASCII as a dot.
      nats: of each byte given its row and the bytes of its segment so far (NaN beyond the budget
        of segments).
      starts: bytes with which a segment begins.
      digits: codes of each segment's row.
    """

    pieces: list[str]
    nats: Float[np.ndarray, " t"]
    starts: list[int]
    digits: Int[np.ndarray, "s n"]


def windows(system: Any, variables: Mapping[str, Any], count: int = 4) -> list[Window]:
    """Evenly spread held-out windows under teacher forcing.

    Args:
      system: the `AbstractinatorSystem` of the run.
      variables: of its model.
      count: at most so many.

    Raises:
      CheckpointError: the variables are of another configuration.
    """
    system.check(variables)
    model, held = system.model, system.windows("validation")

    @jax.jit
    def measure(variables, ids, valid):
        out = model.apply(variables, ids, valid, method="encode")
        nats, _, is_byte, _ = losses.reconstruction(model, variables, ids, out)
        return nats, is_byte, out.found.start, out.there, out.digits

    batch = held.batch(held.spread(count))
    ids, valid = batch["ids"], batch["there"]
    found = measure(dict(variables), jnp.asarray(ids), jnp.asarray(valid))
    rows = zip(ids, valid.sum(1), *map(np.asarray, found), strict=True)
    return [_window(row[:size], *rest) for row, size, *rest in rows]


def _window(
    ids: np.ndarray, nats: np.ndarray, is_byte: np.ndarray, start: np.ndarray, there: np.ndarray,
    digits: np.ndarray,
) -> Window:  # fmt: skip
    flat = np.full(len(ids), np.nan)
    flat[(start[:, None] + np.arange(nats.shape[1]))[is_byte]] = nats[is_byte]
    pieces = [chr(i) if 32 <= i < 127 or i == 10 else "·" for i in ids.tolist()]
    return Window(pieces, flat, start[there].tolist(), digits[there])
