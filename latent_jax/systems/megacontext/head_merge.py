"""Entries of several gists become those of the gist above them, one head at a time.

What `head_gists` does with the tokens of a block is done again with the entries that stand for
many tokens: each already carries a weight and a value of its own. The entries that least attend to
are merged into a few more than are kept, these are left out one by one, and every time values and
weights of the others are fitted by least squares to what all entries gave.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from latent_jax.backbones.head_entries import LEAST, MOST
from latent_jax.ops.subsets import inverse, refitted, removal_order, ridged

#: Entries that are left out one by one, as a multiple of those that may be kept.
AHEAD = 2
#: Bias of a place that holds nothing; half precision can store it.
NOTHING = -6e4


def merged(
    keys: Float[Array, "n g c d"],
    values: Float[Array, "n g c d"],
    bias: Float[Array, "n g c"],
    asked: Float[Array, "m g x d"],
    elsewhere: Float[Array, "m g x"],
    metric: Float[Array, "g d d"],
    mass: Float[Array, " g"],
    count: Int[Array, " g"],
    places: int,
    ridge: float,
) -> tuple[Float[Array, "n t g 2*d+1"], Int[Array, "n t g"], Float[Array, "n g t"]]:
    """Entries of one layer's heads in ``n`` gists, of all ``c`` entries below each.

    Args:
      keys: rotated as from the node's first token.
      bias: logarithm of each entry's weight; places that hold nothing are far below zero.
      asked: scaled and rotated queries of texts that read on behind the node.
      elsewhere: logarithm of what each attends to beside the node.
      metric: how large a head's values are in the residual stream.
      mass: what a weight is worth beside a value.
      count: entries that each head keeps.
      places: most of them in any head.
      ridge: of the fit, in mean squared attention of an entry.

    Returns:
      ``t`` entries (key, value, bias), as many as can be left out one by one; the order in which
      they are packed, kept ones first; by rank, what leaving an entry out costs.
    """
    c, d = keys.shape[2:]
    bias = jnp.maximum(bias, NOTHING)
    logits = jnp.einsum("mgxd,ngcd->ngxmc", asked, keys) + bias[:, :, None, None]
    norm = jnp.logaddexp(jax.nn.logsumexp(logits, axis=-1), elsewhere.transpose(1, 2, 0))
    p = jnp.exp(logits - norm[..., None]).reshape(*bias.shape[:2], -1, c)
    p = p / jnp.sqrt(p.shape[2])
    there = (bias > NOTHING / 2)[..., None]
    rows = jnp.where(there, jnp.concatenate([values, jnp.ones_like(values[..., :1])], -1), 0.0)
    size = jnp.einsum("ngcd,gde,ngce->ngc", rows[..., :-1], metric, rows[..., :-1])
    worth = jnp.square(p).sum(2) * (size + mass[:, None])
    t = min(c, AHEAD * places)
    top = jnp.sort(jax.lax.top_k(worth, t)[1], axis=-1)  # in the order of the text

    def of_top(x):
        index = top.reshape(*top.shape, *(1,) * (x.ndim - 3))
        return jnp.take_along_axis(x, index, axis=2)

    near = jnp.take_along_axis(p, top[:, :, None], axis=3)
    gram = ridged(jnp.swapaxes(near, 2, 3) @ near, ridge)
    own = of_top(rows)
    lost = jnp.swapaxes(near, 2, 3) @ (p @ rows - near @ own)
    full = own + inverse(gram) @ lost
    wanted = jnp.einsum("ngid,gde,ngje->ngij", full[..., :-1], metric, full[..., :-1])
    weights = full[..., -1]
    wanted = wanted + mass[:, None, None] * weights[..., :, None] * weights[..., None, :]
    rank, cost = removal_order(gram, wanted)
    kept = rank < count[:, None]
    fit = refitted(gram, full, kept)
    weight = jnp.clip(fit[..., -1:], LEAST, MOST)
    heavier = jnp.maximum(of_top(bias)[..., None] + jnp.log(weight), NOTHING)
    new = jnp.concatenate([of_top(keys), fit[..., :-1] / weight, heavier], axis=-1)
    place = jnp.arange(t)
    order = jnp.argsort(jnp.where(kept, place, t + place), axis=-1)
    return new.swapaxes(1, 2), order.swapaxes(1, 2), cost
