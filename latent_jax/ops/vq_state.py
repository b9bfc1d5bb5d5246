"""A stack of EMA codebooks, one per stage: what is stored, how it moves, how dead codes restart."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from latent_jax.ops import vq


class Codebooks(NamedTuple):
    """Codes of ``s`` stages and what is known about them; always fp32.

    Attributes:
      code: the codes; zero rows where a stage has fewer.
      norm: their squared norms, cached: whoever changes ``code`` calls `with_codes`.
      size: moving average of how many rows chose each code, from 1.
      total: moving average of the sum of those rows, from the code itself.
      usage: moving average of the share of rows, from uniform.
      stale: steps since a code was last chosen.
      resets: codes restarted so far.
      ready: whether a stage has been initialised; until then it is skipped.
    """

    code: Float[Array, "s k d"]
    norm: Float[Array, "s k"]
    size: Float[Array, "s k"]
    total: Float[Array, "s k d"]
    usage: Float[Array, "s k"]
    stale: Int[Array, "s k"]
    resets: Int[Array, " s"]
    ready: Bool[Array, " s"]


def norms(code: Float[Array, "*s k d"]) -> Float[Array, "*s k"]:
    """Squared norms."""
    return jnp.sum(code.astype(jnp.float32) ** 2, -1)


def fresh(code: Float[Array, "s k d"], live: Bool[Array, "s k"], ready: bool) -> Codebooks:
    """Statistics of new codes: sizes 1 beside sums equal to the codes.

    From sizes of 0 the first update would divide the sums by the batch's share alone and throw
    the codes far away.
    """
    code = jnp.where(live[..., None], code.astype(jnp.float32), 0.0)
    stages = live.shape[0]
    share = live / live.sum(-1, keepdims=True)
    return Codebooks(
        code=code,
        norm=norms(code),
        size=live.astype(jnp.float32),
        total=code,
        usage=share.astype(jnp.float32),
        stale=jnp.zeros(live.shape, jnp.int32),
        resets=jnp.zeros(stages, jnp.int32),
        ready=jnp.full(stages, ready),
    )


def with_codes(state: Codebooks, code: Float[Array, "s k d"]) -> Codebooks:
    """Other codes, with the norms that belong to them."""
    return state._replace(code=code, norm=norms(code))


def track(
    state: Codebooks, count: Float[Array, "s k"], decay: Float[Array, ""] | float
) -> Codebooks:
    """Moves usage and staleness; a stage that saw no row stays as it is."""
    rows = count.sum(-1, keepdims=True)
    share = decay * state.usage + (1 - decay) * count / jnp.maximum(rows, 1.0)
    stale = jnp.where(count > 0, 0, state.stale + 1)
    return state._replace(
        usage=jnp.where(rows > 0, share, state.usage),
        stale=jnp.where(rows > 0, stale, state.stale),
    )


def ema(
    state: Codebooks,
    count: Float[Array, "s k"],
    total: Float[Array, "s k d"],
    decay: Float[Array, ""] | float,
    epsilon: float,
    live: Bool[Array, "s k"],
    cosine: bool = False,
    gate: Float[Array, ""] | float = 1.0,
) -> Codebooks:
    """Moves sizes, sums and codes towards one batch (van den Oord et al. 2017, appendix A.1).

    A stage that saw no row, because all were padding or it was dropped, stays as it is.

    Args:
      state: the codebooks.
      count: rows of each code.
      total: their sums.
      decay: of the averages.
      epsilon: of the Laplace smoothing.
      live: rows of the arrays that are codes.
      cosine: codes have unit length.
      gate: 1 moves in full, a fraction moves by that part of a step, 0 changes no bit.
    """
    moved = (count.sum(-1, keepdims=True) > 0) & (gate > 0)
    decay = 1 - gate * (1 - decay)
    size = jnp.where(moved, decay * state.size + (1 - decay) * count, state.size)
    moved = moved[..., None]
    total = jnp.where(moved, decay * state.total + (1 - decay) * total, state.total)
    code = total / vq.smoothed(size, epsilon, live)[..., None]
    code = vq.unit(code) if cosine else code
    state = state._replace(size=size, total=total)
    return with_codes(state, jnp.where(moved & live[..., None], code, state.code))


def dead(
    state: Codebooks,
    fraction: float,
    patience: int,
    live: Bool[Array, "s k"],
    protected: Bool[Array, "s k"] | None = None,
) -> Bool[Array, "s k"]:
    """Codes used less than ``fraction`` of uniform *and* not chosen for ``patience`` steps."""
    uniform = 1.0 / live.sum(-1, keepdims=True)
    found = live & (state.usage < fraction * uniform) & (state.stale >= patience)
    return found if protected is None else found & ~protected


def restart(
    state: Codebooks,
    gone: Bool[Array, "s k"],
    rows: Float[Array, "s m d"],
    valid: Bool[Array, "s m"],
    size: float,
    epsilon: float,
    live: Bool[Array, "s k"],
    cosine: bool = False,
) -> Codebooks:
    """Restarts dead codes from recent residuals, the stalest first, each row at most once.

    Code, size and sum of a restarted code agree: ``total / smoothed(size) == code``. Every other
    code keeps its bits.

    Args:
      state: the codebooks.
      gone: codes to restart; no more than there are valid rows are.
      rows: distinct rows per stage; their number ``m`` is the most that restart at once.
      valid: rows that are none of the padding.
      size: cluster size after a restart.
      epsilon: of the Laplace smoothing.
      live: rows of the arrays that are codes.
      cosine: codes have unit length.
    """
    k, m = gone.shape[-1], rows.shape[1]
    # Valid rows first, and the dead codes in the order in which they shall take them.
    front = jnp.argsort(~valid, axis=-1, stable=True)
    rows = jnp.take_along_axis(rows, front[..., None], 1)
    order = jnp.argsort(jnp.where(gone, -state.stale, jnp.iinfo(jnp.int32).max), -1, stable=True)
    rank = jnp.argsort(order, -1)
    taken = gone & (rank < valid.sum(-1, keepdims=True))
    new = jnp.take_along_axis(rows, jnp.minimum(rank, m - 1)[..., None], 1)
    new = vq.unit(new) if cosine else new
    code = jnp.where(taken[..., None], new, state.code)
    sizes = jnp.where(taken, size, state.size)
    sums = code * vq.smoothed(sizes, epsilon, live)[..., None]
    uniform = jnp.broadcast_to(1.0 / live.sum(-1, keepdims=True), (gone.shape[0], k))
    state = state._replace(
        size=sizes,
        total=jnp.where(taken[..., None], sums, state.total),
        usage=jnp.where(taken, uniform, state.usage),
        stale=jnp.where(taken, 0, state.stale),
        resets=state.resets + taken.sum(-1).astype(jnp.int32),
    )
    return with_codes(state, code)
