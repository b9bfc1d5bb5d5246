"""LensNet: what the newest gists make of every node of the working context."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from latent_jax.nn.cross_attention import CrossAttention
from latent_jax.systems.megacontext import tiling as tl
from latent_jax.systems.megacontext.layout import Layout
from latent_jax.systems.megacontext.tiling import Tiling

TAIL_GISTS = 6
WORDS = 2  # numbers that say which words of the tail a node has; see `shared_words`


class Entries(NamedTuple):
    """The nodes as the lens reads them; leading batch axes are free.

    Attributes:
      feature: what a node holds: its gist, or the mean embedding of a raw block.
      level: its level of detail.
      log_width: natural logarithm of the tokens it covers.
      log_distance: of one plus the tokens between its end and the cursor.
      at: its first block, which orders nodes and tail gists for a causal lens.
      mask: which places hold a node.
      words: `shared_words`, for a lens that sees them.
    """

    feature: Float[Array, "*b n d"]
    level: Int[Array, "*b n"]
    log_width: Float[Array, "*b n"]
    log_distance: Float[Array, "*b n"]
    at: Int[Array, "*b n"]
    mask: Bool[Array, "*b n"]
    words: Float[Array, "*b n w"] | None = None


class Tail(NamedTuple):
    """The newest gists.

    Attributes:
      feature: their vectors.
      at: the block that each summarises.
      mask: which exist; a short history has fewer.
    """

    feature: Float[Array, "*b g d"]
    at: Int[Array, "*b g"]
    mask: Bool[Array, "*b g"]


def entries(
    layout: Layout, tiling: Tiling, feature: Float[Array, "n d"],
    words: Float[Array, "n w"] | None = None,
) -> Entries:  # fmt: skip
    """The lens's view of a tiling whose nodes hold ``feature``."""
    here, (start, stop) = tl.valid(tiling), tl.spans(layout, tiling)
    tokens = layout.block * (stop - start)
    distance = layout.block * (tl.blocks(layout, tiling) - stop)
    return Entries(
        feature,
        jnp.maximum(tiling.level, 0),
        jnp.log(jnp.maximum(tokens, 1).astype(jnp.float32)),
        jnp.log1p(distance.astype(jnp.float32)),
        start,
        here,
        words,
    )


def shared_words(best: Float[Array, " n"], free: Bool[Array, " n"]) -> Float[Array, "n w"]:
    """What `policies.bm25` finds in each node, beside the best one and by itself.

    NumPy for NumPy's arrays, which reading threads have.

    Args:
      best: the largest of the node's blocks.
      free: nodes before the protected tail; the tail's own words are not news.
    """
    xp = np if isinstance(best, np.ndarray) else jnp
    best = xp.where(free, best, 0.0)
    return xp.stack([best / xp.maximum(best.max(), 1e-12), xp.log1p(best) / 4], -1)


def nothing_seen(width: int, words: bool = False) -> tuple[Entries, Tail]:
    """An empty context of one node, for initialisation."""
    row, none = jnp.zeros((1, 1)), jnp.zeros((1, 1), bool)
    at = row.astype(jnp.int32)
    blank = jnp.zeros((1, 1, width))
    seen = jnp.zeros((1, 1, WORDS)) if words else None
    return Entries(blank, at, row, row, at, none, seen), Tail(blank, at, none)


def action_entries(layout: Layout, tiling: Tiling) -> tuple[Array, Array]:
    """Entries that expanding each node adds, and its share of those that collapsing it frees.

    0 where the action is not legal; every member of a sibling group has an equal share.
    """
    may = tl.legal(layout, tiling)
    adds = jnp.where(may.expand, tl.by_level(layout.expand_costs, tiling), 0)
    size = jnp.where(tiling.level == 0, 1, layout.branching)
    share = tl.by_level(layout.collapse_gains, tiling) / size
    grouped = may.collapse & (tiling.level >= 1)
    # A member's leader is at most branching - 1 places before it, and groups do not overlap.
    groups = jnp.cumsum(grouped)
    member = groups - jnp.pad(groups, (layout.branching, 0))[: groups.shape[0]] > 0
    return adds.astype(jnp.float32), jnp.where(member | may.collapse, share, 0.0)


class Read(nn.Module):
    """Residual attention on another set, then a residual MLP; who sees nothing reads nothing.

    Attributes:
      width: of both sets.
      heads: attention heads.
    """

    width: int
    heads: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t c"],
        memory: Float[Array, "b m c"],
        sees: Bool[Array, "b t m"],
    ) -> Float[Array, "b t c"]:
        """Adds to ``x`` what it reads."""
        x = CrossAttention(self.width, self.heads, True, name="read")(x, memory, sees)
        y = jax.nn.gelu(nn.Dense(2 * self.width, name="up")(nn.LayerNorm(name="mlp_norm")(x)))
        return x + nn.Dense(self.width, name="down")(y)


class LensNet(nn.Module):
    """Signed scores of the context's nodes: positive to expand, negative to collapse.

    In every stack the tail gists read the context and the context reads the gists back, so the
    cost is linear in the length of the context.

    Attributes:
      levels: the top level of detail.
      width: residual stream.
      heads: attention heads.
      stacks: dual cross-attentions, 1 to 3.
      causal: a node is scored by what starts no later than itself, through gists as well. Nodes
        before the tail then see no gist: the ablation of what looking ahead is worth.
      words: nodes also show `shared_words`.
    """

    levels: int
    width: int = 64
    heads: int = 4
    stacks: int = 2
    causal: bool = False
    words: bool = False

    @nn.compact
    def __call__(self, context: Entries, tail: Tail) -> Float[Array, "b n"]:
        """Scores a batch of snapshots; 0 in the padding, and 0 everywhere before training."""
        x = nn.Dense(self.width, name="embed")(nn.RMSNorm(name="norm")(context.feature))
        x += nn.Embed(self.levels + 1, self.width, name="level")(context.level)
        # In units of a few octaves: of the size of the other inputs for any history.
        shape = jnp.stack([context.log_width, context.log_distance], -1) / 4
        x += nn.Dense(self.width, name="place")(shape)
        if self.words:
            x += nn.Dense(self.width, name="words")(context.words)
        g = nn.Dense(self.width, name="embed_tail")(nn.RMSNorm(name="tail_norm")(tail.feature))
        by_gist = context.mask[:, None, :] & tail.mask[:, :, None]
        if self.causal:
            by_gist &= context.at[:, None, :] <= tail.at[:, :, None]
        by_node = context.mask[:, :, None] & tail.mask[:, None, :]
        if self.causal:
            by_node &= tail.at[:, None, :] <= context.at[:, :, None]
        for i in range(self.stacks):
            g = Read(self.width, self.heads, name=f"gather{i}")(g, x, by_gist)
            x = Read(self.width, self.heads, name=f"scatter{i}")(x, g, by_node)
        x = nn.LayerNorm(name="final_norm")(x)
        score = nn.Dense(1, kernel_init=nn.initializers.zeros, name="score")(x)[..., 0]
        return jnp.where(context.mask, score.astype(jnp.float32), 0.0)
