"""What each entry of a text's cache is worth to its head; the kept ones stand in for the others.

A text is read a second time, behind itself: what a head looks at to say the text again is what it
needs of it ("repeat-prefill" queries, Zweiger et al. 2026, arXiv:2602.16284). Of those attention
weights entries are left out one by one, each time the one that the others can best stand in for,
and what is kept has its values and its weight refitted by least squares (`ops.subsets`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from latent_jax.backbones.attention_probe import watch
from latent_jax.backbones.config import DecoderConfig
from latent_jax.backbones.decoder import KV, Decoder
from latent_jax.backbones.sink import behind, sink_kv
from latent_jax.ops.attention import MASKED
from latent_jax.ops.subsets import refitted, removal_order, ridged

#: Of the mean attention power of an entry: keeps a fit to few queries from following each of them.
RIDGE = 0.2
#: What one entry may stand for, as a multiple of its own attention.
LEAST, MOST = 0.3, 30.0


class Entries(NamedTuple):
    """A text's cache, entry by entry.

    Attributes:
      kv: keys and values; with counts, the values of the kept entries are refitted and the bias is
        the logarithm of each one's weight (`MASKED` for the others).
      worth: by rank, best first: of `worth`.
      rank: of every entry within its head, 0 for the last one to be left out.
    """

    kv: KV
    worth: Float[Array, "l b g t"]
    rank: Int[Array, "l b g t"]


def output_metric(params: Any, config: DecoderConfig) -> Float[Array, "l g d d"]:
    """How large a head's output is to the residual stream, mean over the query heads of a group."""
    o = jnp.asarray(params["layers"]["o"]["kernel"], jnp.float32)
    groups, d = config.num_kv_heads, config.head_dim
    o = o.reshape(config.num_layers, groups, -1, d, o.shape[-1])
    return jnp.einsum("lgxde,lgxfe->lgdf", o, o) / o.shape[2]


def worth(
    attended: Float[Array, "*s t"], cost: Float[Array, "*s t"], power: Float[Array, "*s 1"]
) -> Float[Array, "*s t"]:
    """What a head's entries are worth beside those of other heads and layers, by rank.

    The geometric mean of two measures, each of which misjudges some heads: how much attention an
    entry gets, and how far the layer's output moves without it when the others stand in.

    Args:
      attended: root mean square attention, best first.
      cost: squared error of the output, of `ops.subsets.removal_order`.
      power: mean squared norm of the stream that the output is added to.
    """
    return jnp.sqrt(attended * jnp.sqrt(jnp.maximum(cost, 0.0) / power))


def elimination_flops(config: DecoderConfig, tokens: int) -> float:
    """Operations of `entries` beside the two readings of a text; they grow with its cube."""
    each = config.num_heads // config.num_kv_heads
    # Products of attention, two inverses, and six updates of a matrix for every entry left out.
    return config.num_layers * config.num_kv_heads * (2.0 * each + 2 * 2 + 6) * tokens**3


def entries(
    decoder: Decoder,
    params: Any,
    ids: Int[Array, "b t"],
    mask: Bool[Array, "b t"],
    sink: Int[Array, ""] | None = None,
    count: Int[Array, "b l g"] | None = None,
) -> Entries:
    """Reads right-padded texts twice and ranks their entries.

    Args:
      decoder: the frozen LLM.
      params: its parameters.
      ids: texts.
      mask: which tokens are real.
      sink: token before the text.
      count: entries that each head keeps; None keeps them all as they are.
    """
    c, (b, t) = decoder.config, ids.shape
    first = None if sink is None else sink_kv(decoder, params, sink, b)
    x = decoder.apply({"params": params}, ids, method="embed")
    cache = decoder.apply({"params": params}, x, mask=mask, prefix=first).kv
    seen = behind(first, cache)
    places = jnp.broadcast_to(jnp.arange(t), (b, t))
    length = mask.sum(-1, keepdims=True)
    again = watch(decoder, params, x, length + places, mask, places, seen)
    before = jnp.broadcast_to(seen.mask[:, None], (b, t, seen.mask.shape[1]))
    causal = jnp.tril(jnp.ones((t, t), bool))[None] & mask[:, None]
    visible = jnp.concatenate([before, causal], axis=-1) & mask[:, :, None]
    scale = c.head_dim**-0.5 if c.query_scale is None else c.query_scale
    queried = jnp.maximum(length, 1)[..., None] * (c.num_heads // c.num_kv_heads)
    begin = seen.mask.shape[1] - t  # where the text begins behind the sink
    count = jnp.full((b, c.num_layers, c.num_kv_heads), t) if count is None else count

    def layer(of):
        q, before, after, value, metric, power, count = of
        q = (q.astype(jnp.float32) * scale).reshape(b, t, c.num_kv_heads, -1, c.head_dim)
        logits = jnp.einsum("bqgxd,bsgd->bgxqs", q, jnp.concatenate([before, after], axis=1))
        p = jax.nn.softmax(jnp.where(visible[:, None, None], logits, MASKED), axis=-1)
        p = (p * mask[:, None, None, :, None])[..., begin : begin + t]
        pairs = jnp.einsum("bgxqi,bgxqj->bgij", p, p) / queried[..., None]
        # Of the real entries' mean: padding changes nothing.
        gram = ridged(pairs, RIDGE * t / jnp.maximum(length, 1))
        value = value.swapaxes(1, 2).astype(jnp.float32) * mask[:, None, :, None]
        wanted = jnp.einsum("bgid,gde,bgje->bgij", value, metric, value)
        # An entry's weight counts as its values do, of which it shows the mean size.
        sizes = jnp.einsum("bgii->bg", wanted) / jnp.maximum(length, 1)
        real = mask[:, None, :, None] & mask[:, None, None]
        wanted = jnp.where(real, wanted + sizes[..., None, None], 0.0)
        rank, cost = removal_order(gram, wanted)
        attended = -jnp.sort(-jnp.sqrt(jnp.einsum("bgii->bgi", pairs)), axis=-1)
        value_of = worth(attended, cost, power[:, None, None])
        kept = (rank < count[..., None]) & mask[:, None]
        ones = jnp.ones((*value.shape[:-1], 1))
        fit = refitted(gram, jnp.concatenate([value, ones], axis=-1), kept)
        weight = jnp.clip(fit[..., -1], LEAST, MOST)
        made = (fit[..., :-1] / weight[..., None]).swapaxes(1, 2).astype(cache.v.dtype)
        bias = jnp.where(kept, jnp.log(weight), MASKED).swapaxes(1, 2)
        return made, bias, value_of, rank

    counts = count.transpose(1, 0, 2)
    found = jax.lax.map(
        layer,
        (again.q, seen.k, again.kv.k, cache.v, output_metric(params, c), again.power, counts),
    )
    return Entries(KV(cache.k, found[0], mask, found[1]), *found[2:])
