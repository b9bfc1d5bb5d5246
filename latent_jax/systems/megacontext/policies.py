"""Focus policies behind one interface: a signed score per node for the allocator.

A policy is made for a layout and then called as ``score(tiling, features, key)``; it can be jitted
and mapped. Those that only know an order of the nodes score by centred rank: +1 for the first of
those outside the protected tail, -1 for the last, ties in the middle of their ranks. So each wants
the same share of them sharpened and blurred.

``features`` holds what a policy reads and is otherwise ignored:

``overlap``
  `bm25` of every block with the tail, or the `first_ones` of a matcher's scores, by block (longer
  arrays may be padded).
``attention``
  `attention.node_attention`, by place in the tiling.
``utility``
  measured gain of sharpening each node, signed, by place in the tiling.
``entry``
  what each node holds, by place in the tiling, for a lens.
``tail``
  the newest gists, as `lens.Tail`, for a lens; one that sees words also reads ``overlap``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import rankdata
from jaxtyping import Array, Bool, Float, Int

from latent_jax.core.errors import ConfigError
from latent_jax.core.types import Variables
from latent_jax.systems.megacontext import tiling as tl
from latent_jax.systems.megacontext.layout import Layout, cover_cost
from latent_jax.systems.megacontext.lens import LensNet, entries, shared_words
from latent_jax.systems.megacontext.tiling import Tiling

Features = Mapping[str, Any]
Policy = Callable[[Tiling, Features, Array | None], Float[Array, " n"]]


def centred_rank(values: Float[Array, " n"], mask: Bool[Array, " n"]) -> Float[Array, " n"]:
    """Rank among the masked values, from -1 (lowest) to 1 (highest); 0 elsewhere, and alone.

    Example:
      >>> import jax.numpy as jnp
      >>> mask = jnp.array([True, True, True, False])
      >>> centred_rank(jnp.array([3.0, 1.0, 1.0, 9.0]), mask).tolist()
      [1.0, -0.5, -0.5, 0.0]
    """
    rank = rankdata(jnp.where(mask, values, jnp.inf), method="average")
    last = jnp.maximum(mask.sum() - 1, 1)
    return jnp.where(mask & (mask.sum() > 1), 2 * (rank - 1) / last - 1, 0.0)


def recency(layout: Layout) -> Policy:
    """The nearer, the sharper."""

    def score(tiling: Tiling, features: Features, key: Array | None = None) -> Array:
        place = jnp.arange(tiling.level.shape[0], dtype=jnp.float32)
        return centred_rank(place, _free(layout, tiling))

    return score


def sink_recency(layout: Layout, sinks: int = 1) -> Policy:
    """Recency, with the first blocks of the history kept sharp (Xiao et al. 2023).

    Args:
      layout: sizes.
      sinks: how many blocks.
    """
    near = recency(layout)

    def score(tiling: Tiling, features: Features, key: Array | None = None) -> Array:
        first, _ = tl.spans(layout, tiling)
        sink = tl.valid(tiling) & (first < sinks)
        return jnp.where(sink, 1.0, near(tiling, features, key))

    return score


def uniform(layout: Layout, budget: int) -> Policy:
    """One level of detail for all: the finest that fits the budget with the tail raw."""

    def score(tiling: Tiling, features: Features, key: Array | None = None) -> Array:
        history = tl.blocks(layout, tiling)
        needs = jnp.stack(
            [jnp.asarray(cover_cost(layout, history, top)) for top in range(layout.levels + 1)]
        )
        target = jnp.where((needs <= budget).any(), jnp.argmax(needs <= budget), layout.levels)
        return jnp.where(_free(layout, tiling), jnp.sign(tiling.level - target), 0.0)

    return score


def random(layout: Layout) -> Policy:
    """Independent uniform scores, new in every iteration."""

    def score(tiling: Tiling, features: Features, key: Array | None = None) -> Array:
        return jax.random.uniform(key, tiling.level.shape, minval=-1.0, maxval=1.0)

    return score


def bm25_to_tail(layout: Layout) -> Policy:
    """From -1 for nodes without a word of the newest tokens to 1 for the best `bm25` of a block.

    A rank would not do: most nodes tie at nothing, and the middle of their ranks is near 0.
    """

    def score(tiling: Tiling, features: Features, key: Array | None = None) -> Array:
        free = _free(layout, tiling)
        best = jnp.where(free, best_block(layout, tiling, features["overlap"]), 0.0)
        return jnp.where(free, 2 * best / jnp.maximum(best.max(), 1e-12) - 1, 0.0)

    return score


def attention(layout: Layout) -> Policy:
    """By `attention.node_attention` for each entry that the node would add, or give back.

    Sharpening a large node is dear and a small one cheap, so they are compared by what an entry
    would be about.
    """
    adds = np.asarray(layout.expand_costs, np.float32)
    adds[0] = layout.collapse_gains[0]  # a raw block can only be given back

    def score(tiling: Tiling, features: Features, key: Array | None = None) -> Array:
        density = features["attention"] / tl.by_level(adds, tiling)
        return centred_rank(density, _free(layout, tiling))

    return score


def oracle(layout: Layout) -> Policy:
    """Scores by measured utilities, scaled by their root mean square in the snapshot.

    The hyperbolic tangent bounds them without changing their order or their sign.
    """

    def score(tiling: Tiling, features: Features, key: Array | None = None) -> Array:
        return squash(features["utility"], tl.valid(tiling))

    return score


def learned(layout: Layout, lens: LensNet, variables: Variables) -> Policy:
    """Scores by a `LensNet` on this tiling.

    Args:
      layout: sizes.
      lens: the module.
      variables: its parameters, ``{"params": …}``.
    """

    def score(tiling: Tiling, features: Features, key: Array | None = None) -> Array:
        words = None
        if lens.words:
            best = best_block(layout, tiling, features["overlap"])
            words = shared_words(best, _free(layout, tiling))
        rows = entries(layout, tiling, features["entry"], words)
        batch = jax.tree.map(lambda x: x[None], (rows, features["tail"]))
        return lens.apply(variables, *batch)[0]

    return score


def squash(values: Float[Array, " n"], mask: Bool[Array, " n"]) -> Float[Array, " n"]:
    """``tanh(x / rms)`` over the masked values, 0 elsewhere: signed utilities of one scale."""
    kept = jnp.where(mask, values, 0.0)
    rms = jnp.sqrt(jnp.sum(kept**2) / jnp.maximum(mask.sum(), 1))
    return jnp.tanh(kept / jnp.maximum(rms, 1e-12))


def best_block(layout: Layout, tiling: Tiling, values: Float[Array, " m"]) -> Float[Array, " n"]:
    """The largest of the blocks' values under each node; what lies beyond the history is unread."""
    _, stop = tl.spans(layout, tiling)
    at = jnp.arange(values.shape[0])
    node = jnp.searchsorted(stop, at, side="right")
    node = jnp.where(at < tl.blocks(layout, tiling), node, stop.shape[0])
    best = jax.ops.segment_max(values, node, stop.shape[0], indices_are_sorted=True)
    return jnp.where(tl.valid(tiling), best, 0.0)


def bm25(
    ids: Int[np.ndarray, "m t"], query: Int[np.ndarray, " q"], k1: float = 1.2
) -> Float[np.ndarray, " m"]:
    """Okapi BM25 of every block with the distinct tokens of a query (Robertson & Zaragoza 2009).

    Blocks are of one length, so its length normalisation is 1.

    Args:
      ids: tokens by block; `across` makes them overlap.
      query: tokens, e.g. those of the protected tail.
      k1: saturation of repeated tokens.
    """
    terms = np.unique(query)
    if not terms.size or not len(ids):
        return np.zeros(len(ids), np.float32)
    column = np.minimum(np.searchsorted(terms, ids), terms.size - 1)
    row, at = np.nonzero(terms[column] == ids)
    counts = np.zeros((len(ids), terms.size), np.float32)
    np.add.at(counts, (row, column[row, at]), 1)
    holding = (counts > 0).sum(0)
    rarity = np.log1p((len(ids) - holding + 0.5) / (holding + 0.5))
    return (counts * (k1 + 1) / (counts + k1) @ rarity).astype(np.float32)


def across(
    score: Callable[[Int[np.ndarray, "k u"]], Float[np.ndarray, " k"]],
    ids: Int[np.ndarray, "m t"],
) -> Float[np.ndarray, " m"]:
    """Scores blocks in pairs: a fact may lie across two, and only one of them have its words.

    Args:
      score: of texts of two blocks.
      ids: tokens by block.

    Returns:
      The better of the two pairs that each block is in.
    """
    return of_blocks(score(in_pairs(ids)), len(ids))


def words_of(
    query: Int[np.ndarray, " q"], ids: Int[np.ndarray, "m t"]
) -> Float[np.ndarray, " m"]:
    """`bm25` of blocks in pairs; damaged tokens are negative and match nothing."""
    return across(functools.partial(bm25, query=query), ids)


def in_pairs(ids: Int[np.ndarray, "m t"]) -> Int[np.ndarray, "k u"]:
    """Each block with the one behind it; a block that is alone, as it is."""
    return np.concatenate([ids[:-1], ids[1:]], axis=1) if len(ids) > 1 else ids


def of_blocks(pairs: Float[np.ndarray, " k"], blocks: int) -> Float[np.ndarray, " m"]:
    """The better of the two pairs (`in_pairs`) that each block is in."""
    if blocks < 2:
        return pairs
    return np.maximum(np.append(pairs, pairs[-1]), np.insert(pairs, 0, pairs[0]))


def first_ones(scores: Float[np.ndarray, " n"], count: int = 64) -> Float[np.ndarray, " n"]:
    """The best blocks by rank, from 1 down to a half, and 0 for the others.

    Scores whose zero means nothing (`matcher.Finder`) get one: half of the best is where
    `bm25_to_tail` begins to give back.
    """
    found = np.zeros(len(scores), np.float32)
    order = np.argsort(-scores, kind="stable")[:count]
    found[order] = 1 - 0.5 * np.arange(len(order)) / count
    return found


def make(
    name: str, layout: Layout, budget: int, lens: tuple[LensNet, Variables] | None = None
) -> Policy:
    """A policy by its name.

    Args:
      name: one of `NAMES`.
      layout: sizes.
      budget: entries of the working context, W.
      lens: a trained lens and its variables, for the policy of that name.

    Raises:
      ConfigError: there is none of that name, or no lens for it.
    """
    if name == "uniform":
        return uniform(layout, budget)
    if name == "lens":
        if lens is None:
            raise ConfigError(
                "policy 'lens': this run has no lens; set model.lens and train it (data lens) on "
                "a table of `latent-jax mega label`"
            )
        return learned(layout, *lens)
    if name not in BASELINES:
        raise ConfigError(f"policy {name!r} is unknown; there are {', '.join(sorted(NAMES))}")
    return BASELINES[name](layout)


BASELINES: dict[str, Callable[[Layout], Policy]] = {
    "recency": recency,
    "sink_recency": sink_recency,
    "random": random,
    "bm25": bm25_to_tail,
    "match": bm25_to_tail,
    "attention": attention,
    "oracle": oracle,
}
NAMES = (*BASELINES, "uniform", "lens")


def _free(layout: Layout, tiling: Tiling) -> Bool[Array, " n"]:
    """Nodes that are not protected."""
    return tl.valid(tiling) & ~tl.tail(layout, tiling)
