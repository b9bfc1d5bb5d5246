"""What a few texts tell of every head: what readers ask of it, and what its entries are worth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from latent_jax.backbones import head_entries
from latent_jax.backbones.attention_probe import queries, stream_power
from latent_jax.backbones.sink import sink_kv
from latent_jax.ops import rope
from latent_jax.ops.attention import MASKED
from latent_jax.systems.megacontext.head_gists import HeadGists


def calibrate(
    gists: HeadGists, base: Any, rows: Callable[[int], Int[np.ndarray, "n t"]], batch: int = 4
) -> dict[str, Any]:
    """Parameters of `HeadGists` from texts.

    The first half of the windows of level 1 lends its queries; on the second half it is measured
    what each rank of each head is worth: the error of the layer's output without it, over the power
    of the stream that the output is added to. The same is then measured level by level, on whole
    nodes of it.

    Args:
      gists: what they are for.
      base: parameters of the frozen base.
      rows: texts by level: at least two windows for level 1, at least one node for the others.
      batch: windows at once.
    """
    windows, params = rows(1), gists.empty()
    half = len(windows) // 2
    ask = jax.jit(_asked, static_argnums=0)
    m = params["query"].shape[1]
    at = np.linspace(windows.shape[1] // 8, windows.shape[1] - 1, -(-m // half)).astype(int)
    asked = [ask(gists, base, windows[i : i + 1], at) for i in range(half)]
    pick = np.random.default_rng(0).permutation(half * len(at))[:m]  # no text at one distance
    joined = [jnp.concatenate(x, axis=1)[:, pick] for x in zip(*asked, strict=True)]
    params |= {"query": joined[0], "normaliser": joined[1]}
    params["metric"] = head_entries.output_metric(base, gists.base)

    @jax.jit
    def values(base, metric, ids):
        sink = sink_kv(gists.decoder, base, jnp.int32(gists.sink), len(ids))
        x = gists.decoder.apply({"params": base}, ids, method="embed")
        v = gists.decoder.apply({"params": base}, x, prefix=sink).kv.v.astype(jnp.float32)
        size = jnp.einsum("lbtgd,lgde,lbtge->lg", v, metric, v) / ids.size
        return size, stream_power(gists.decoder, base, x, sink)

    @jax.jit
    def measured(params, base, ids):
        return gists.entries(params, base, ids)[2].mean(1)

    later = [windows[i : i + batch] for i in range(half, len(windows), batch)]
    stats = [values(base, params["metric"], part) for part in later]
    share = np.asarray([len(part) for part in later]) / (len(windows) - half)
    params["mass"], power = (
        sum(w * x for w, x in zip(share, y, strict=True)) for y in zip(*stats, strict=True)
    )
    # The geometric mean with the attention (`head_entries.worth`) was tried and is no better here.
    costs = sum(w * measured(params, base, part) for w, part in zip(share, later, strict=True))
    params["profile"] |= {"level_1": costs / power[:, None, None]}

    for level in range(2, gists.config.layout.levels + 1):

        @jax.jit
        def above(params, base, ids, level=level):
            below = gists.build(params, base, ids[None], level - 1)
            return gists.over(params, below[None], level)[2][:, 0]

        nodes = rows(level)
        costs = sum(above(params, base, ids) for ids in nodes) / len(nodes)
        costs = costs[..., : gists.places(level)]
        params["profile"] |= {f"level_{level}": costs / power[:, None, None]}
    return params


def _asked(gists, base, ids, at):
    """Queries of a text before rotation, at some places, and what each attended to in all."""
    r, (b, t) = gists.base, ids.shape
    sink = sink_kv(gists.decoder, base, jnp.int32(gists.sink), b)
    x = gists.decoder.apply({"params": base}, ids, method="embed")
    where, here = jnp.broadcast_to(jnp.arange(t), ids.shape), jnp.asarray(at)[None]
    mask = jnp.ones(ids.shape, bool)
    q, own = queries(gists.decoder, base, x, where, mask, here, sink)
    keys = jnp.concatenate([sink.k, own.k], axis=2)
    visible = jnp.pad(here[..., None] >= where[:, None], ((0, 0), (0, 0), (1, 0)),
                      constant_values=True)  # fmt: skip

    def layer(pair):
        logits = jnp.einsum("bmgxd,bsgd->bmgxs", gists.scaled(pair[0]), pair[1])
        logits = jnp.where(visible[:, :, None, None], logits, MASKED)
        return jax.nn.logsumexp(logits, axis=-1)[0].reshape(len(at), r.num_heads)

    normaliser = jax.lax.map(layer, (q, keys))
    return rope.rotate_layers(q, -here, gists.waves)[:, 0], normaliser
