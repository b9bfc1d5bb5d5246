"""What a lens is trained on: measured utilities of one snapshot, and what its scores would cost.

Every term is a `Mean`, so that snapshots of different sizes are weighted by what they hold.
``scores`` and ``utility`` are in the same unit (`policies.squash`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from latent_jax.core.types import Mean


def regression(
    scores: Float[Array, "b n"], utility: Float[Array, "b n"], mask: Bool[Array, "b n"]
) -> Mean:
    """Squared error of the signed scores where a utility was measured."""
    return Mean.of(optax.squared_error(scores, jnp.where(mask, utility, 0.0)), mask)


def ranking(
    scores: Float[Array, "b n"], utility: Float[Array, "b n"], mask: Bool[Array, "b n"]
) -> Mean:
    """``softplus(s_j - s_i)`` over the pairs of a snapshot with ``u_i > u_j`` (Burges et al. 2005).

    A snapshot weighs by its pairs; ties give none.
    """
    better = utility[:, :, None] > utility[:, None, :]
    pairs = better & mask[:, :, None] & mask[:, None, :]
    return Mean.of(jax.nn.softplus(scores[:, None, :] - scores[:, :, None]), pairs)


def ordered(
    scores: Float[Array, "b n"], utility: Float[Array, "b n"], mask: Bool[Array, "b n"]
) -> Mean:
    """Share of the pairs with ``u_i > u_j`` that have ``s_i > s_j``; ties count half."""
    better = utility[:, :, None] > utility[:, None, :]
    pairs = better & mask[:, :, None] & mask[:, None, :]
    gap = scores[:, :, None] - scores[:, None, :]
    return Mean.of((jnp.sign(gap) + 1) / 2, pairs)


def budget(
    scores: Float[Array, "b n"],
    adds: Float[Array, "b n"],
    frees: Float[Array, "b n"],
    mask: Bool[Array, "b n"],
    epsilon: float = 1e-6,
) -> Mean:
    """``((P - N) / (epsilon + P + N))^2`` of each snapshot: what is asked for must be offered too.

    Args:
      scores: signed scores.
      adds: entries that expanding a node adds; P is their sum weighted by the positive scores.
      frees: entries that collapsing it frees; N is their sum weighted by the negative ones.
      mask: nodes.
      epsilon: keeps a snapshot without either finite.
    """
    asked = jnp.sum(jnp.where(mask, jax.nn.relu(scores) * adds, 0.0), -1)
    offered = jnp.sum(jnp.where(mask, jax.nn.relu(-scores) * frees, 0.0), -1)
    return Mean.of(((asked - offered) / (epsilon + asked + offered)) ** 2)


def legality(
    scores: Float[Array, "b n"],
    may_expand: Bool[Array, "b n"],
    may_collapse: Bool[Array, "b n"],
    mask: Bool[Array, "b n"],
) -> Mean:
    """Squared scores that ask for what cannot be done: a raw block sharper, a top gist coarser."""
    wrong = jnp.where(may_expand, 0.0, jax.nn.relu(scores) ** 2)
    wrong += jnp.where(may_collapse, 0.0, jax.nn.relu(-scores) ** 2)
    return Mean.of(wrong, mask)


def lens_terms(
    scores: Float[Array, "b n"],
    utility: Float[Array, "b n"],
    measured: Bool[Array, "b n"],
    mask: Bool[Array, "b n"],
    adds: Float[Array, "b n"],
    frees: Float[Array, "b n"],
) -> dict[str, Mean]:
    """All terms by name.

    Args:
      scores: of the lens.
      utility: signed labels.
      measured: where there is one.
      mask: nodes.
      adds: entries that expanding a node adds, 0 where it cannot be expanded.
      frees: entries that collapsing it frees, 0 where it cannot be collapsed; of a sibling group,
        each member's share.
    """
    return {
        "regression": regression(scores, utility, measured & mask),
        "ranking": ranking(scores, utility, measured & mask),
        "budget": budget(scores, adds, frees, mask),
        "legality": legality(scores, adds > 0, frees > 0, mask),
    }
