"""Named random streams: ``fold_in(name)``, then ``fold_in(step)``.

A stream depends only on the seed, its name and the step, never on how many other streams exist or
in which order they are drawn. So adding a dropout layer does not change the data order, and a
resumed run draws exactly what the uninterrupted one would have drawn.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import jax
from jaxtyping import Array, Int, PRNGKeyArray


def stream(
    key: PRNGKeyArray | Array, name: str, step: int | Int[Array, ""] | None = None
) -> PRNGKeyArray:
    """Returns the key of the stream ``name``, at ``step`` if one is given.

    Args:
      key: the run's root key (typed or raw).
      name: the stream's name, e.g. ``"dropout"``.
      step: the step counter; may be traced.

    Example:
      >>> import jax
      >>> root = jax.random.key(0)
      >>> bool(stream(root, "dropout", 3) == stream(root, "dropout", 3))
      True
      >>> bool(stream(root, "dropout", 3) == stream(root, "noise", 3))
      False
    """
    # crc32 and not hash(): the latter is salted per process, hosts would disagree.
    key = jax.random.fold_in(key, zlib.crc32(name.encode("utf-8")))
    return key if step is None else jax.random.fold_in(key, step)


def named(
    seed: int | PRNGKeyArray | Array,
    names: Iterable[str],
    step: int | Int[Array, ""] | None = None,
) -> dict[str, PRNGKeyArray]:
    """Returns ``{name: key}`` for Linen's ``rngs`` argument.

    Args:
      seed: an integer seed or a root key.
      names: the streams wanted.
      step: the step counter; may be traced.
    """
    key = jax.random.key(seed) if isinstance(seed, int) else seed
    return {name: stream(key, name, step) for name in names}
