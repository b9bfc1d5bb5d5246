"""How much of a frozen base's own attention each node of a working context gets.

Whoever reads the tail behind the context has already looked for what it needs: a few heads find
single tokens anywhere in a text ("retrieval heads", Wu et al. 2024), in gists as in raw blocks, and
training-free readers of long texts choose what to bring back by such scores (InfLLM, Xiao et al.
2024; Quest, Tang et al. 2024). Nothing is trained, and no word has to be shared.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from latent_jax.backbones.attention_probe import queries
from latent_jax.backbones.decoder import KV, Decoder
from latent_jax.backbones.sink import behind, sink_kv
from latent_jax.ops.attention import MASKED


def node_attention(
    decoder: Decoder,
    params: Any,
    sink: int,
    placed: KV,
    owner: Int[Array, " m"],
    nodes: int,
    ids: Int[Array, " t"],
    first: Int[Array, ""],
    watched: int,
) -> Float[Array, " n"]:
    """Attention of the last tokens to the entries of each node, root mean square over all heads.

    The root mean square, because one head that looks at a node says more than all that look at it
    a little: its attention is the mean over the tokens and the sum over the node's entries.

    Args:
      decoder: the frozen base, with ``params``.
      sink: token before everything.
      placed: one context as a prefix.
      owner: node of each of its entries; ``nodes`` or more for what belongs to none.
      nodes: how many there are.
      ids: tokens that follow the context.
      first: rotary position of the first of them.
      watched: how many of the last ones are asked.
    """
    c, t = decoder.config, ids.shape[0]
    prefix = behind(sink_kv(decoder, params, jnp.int32(sink), 1), placed)
    x = decoder.apply({"params": params}, ids[None], method="embed")
    where = (first + jnp.arange(t))[None]
    rows = jnp.arange(t - watched, t)[None]
    q, own = queries(decoder, params, x, where, jnp.ones((1, t), bool), rows, prefix)
    scale = c.head_dim**-0.5 if c.query_scale is None else c.query_scale
    seen = jnp.broadcast_to(prefix.mask, (watched, prefix.mask.shape[-1]))
    seen = jnp.concatenate([seen, jnp.arange(t) <= rows[0][:, None]], axis=1)
    bias = jnp.zeros(prefix.k.shape[:-1]) if prefix.bias is None else prefix.bias

    def layer(part):
        q, before, after, extra = part
        q = q[0].reshape(watched, c.num_kv_heads, -1, c.head_dim).astype(jnp.float32) * scale
        keys = jnp.concatenate([before, after], axis=1)[0]
        extra = jnp.pad(extra[0], ((0, t), (0, 0)))
        logits = jnp.einsum("wgxd,sgd->gxws", q, keys) + extra.T[:, None, None]
        weight = jax.nn.softmax(jnp.where(seen, logits, MASKED), axis=-1)
        weight = weight[..., 1 : 1 + owner.shape[0]].mean(2).reshape(-1, owner.shape[0])
        of_node = jax.ops.segment_sum(weight.T, owner, nodes + 1)[:nodes]
        return jnp.square(of_node).mean(1)

    return jnp.sqrt(jax.lax.map(layer, (q, prefix.k, own.k, bias)).mean(0))
