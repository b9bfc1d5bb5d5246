"""Gists that are input embeddings of the frozen base, which reads them like words.

A slot is one vector of the base's width, a twentieth of a slot's keys and values in SmolLM2-135M.
The whole working context then goes through the base in its order, gists and raw tokens alike, each
at its place: what an entry becomes depends on what stands before it, and an exchanged entry costs
the reading of all that follows it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from latent_jax.backbones.cross_entropy import token_cross_entropy
from latent_jax.backbones.decoder import Decoder
from latent_jax.backbones.sink import sink_kv
from latent_jax.backbones.streams import streams
from latent_jax.systems.megacontext.embedding_net import EmbeddingNet, Sources, shares, unit
from latent_jax.systems.megacontext.model_config import ModelConfig
from latent_jax.systems.megacontext.positions import slot_offsets

_MOST = 12.0  # nats; a single word must not decide a probe
_RIDGE = 0.1  # of a probe, in each feature's own variance


class EmbeddingGists:
    """Makes gists.

    Args:
      config: layout and options.
      decoder: the frozen base.
      sink: token before every window.
    """

    def __init__(self, config: ModelConfig, decoder: Decoder, sink: int):
        self.config, self.decoder, self.sink = config, decoder, sink
        self.net = EmbeddingNet(config, decoder.config.hidden_size)
        last = decoder.config.num_layers
        # Evenly spread, the last one after all layers.
        self.layers = np.linspace(0, last, config.gist.streams + 1).round().astype(int)[1:].tolist()

    def fresh(self, key: jax.Array) -> dict[str, Any]:
        """Parameters before `calibrate`: plain means of unit size."""
        return self.net.init(key, method="touch")["params"]

    def read(
        self, base: Any, ids: Int[Array, "b t"]
    ) -> tuple[Sources, Float[Array, "r w d"]]:
        """Whole blocks as the base sees them in windows that begin at the rows' first tokens.

        Returns:
          Sources of the ``b * blocks`` gists of level 1, and the base's output over the windows.
        """
        (b, t), size = ids.shape, self.config.layout.block
        length = self.config.gist.window * size
        # Padding stands after everything real, where causal attention does not look.
        rows = jnp.pad(ids, ((0, 0), (0, -t % length))).reshape(-1, length)
        x = self.decoder.apply({"params": base}, rows, method="embed")
        first = sink_kv(self.decoder, base, jnp.int32(self.sink), len(rows))
        z, out = streams(self.decoder, base, x, self.layers, prefix=first)

        def cut(y):
            y = y.reshape(b, -1, *y.shape[2:])[:, :t]
            return jax.lax.stop_gradient(y.reshape(-1, size, *y.shape[2:]))

        return Sources(cut(x), cut(z)), out.hidden

    def make(self, params: Any, base: Any, ids: Int[Array, "b t"]) -> Float[Array, "n s d"]:
        """Gists of whole blocks."""
        return self.net.apply({"params": params}, self.read(base, ids)[0], 1)

    def merge(
        self, params: Any, base: Any, below: Float[Array, "n branch s d"], level: int
    ) -> Float[Array, "n s d"]:
        """Gists of a level from 2 up; the base reads what lies below each behind the sink."""
        n, branch, _, d = below.shape
        x = jax.lax.stop_gradient(jnp.asarray(below, jnp.float32).reshape(n, -1, d))
        layout, r = self.config.layout, self.decoder.config
        child = layout.block * int(layout.widths[level - 1])
        at = np.arange(branch)[:, None] * child + slot_offsets(
            layout, level - 1, self.config.gist.place
        )
        if at.max() >= r.max_position:  # squeezed, in order: the base knows no such distance
            at = at * (r.max_position - 1) // at.max()
        where = jnp.broadcast_to(at.reshape(-1), x.shape[:2])
        first = sink_kv(self.decoder, base, jnp.int32(self.sink), n)
        # In the dtype of the base's own embeddings, which is what it computes in.
        z, _ = streams(
            self.decoder, base, x.astype(base["embed"].dtype), self.layers, where, prefix=first
        )
        return self.net.apply({"params": params}, Sources(x, jax.lax.stop_gradient(z)), level)

    def build(
        self, params: Any, base: Any, ids: Int[Array, "b t"], level: int
    ) -> Float[Array, "n s d"]:
        """Gists of a level from texts of whole nodes of it."""
        found = self.make(params, base, ids)
        for upper in range(2, level + 1):
            below = found.reshape(-1, self.config.layout.branching, *found.shape[1:])
            found = self.merge(params, base, below, upper)
        return found

    def pooled(self, base: Any, ids: Int[Array, "b t"], level: int) -> Float[Array, "n s d"]:
        """Mean of the embeddings of each slot's stretch, at the size of an embedding: untrained."""
        layout = self.config.layout
        span = layout.block * int(layout.widths[level])
        x = self.decoder.apply({"params": base}, ids, method="embed").astype(jnp.float32)
        size = jnp.sqrt(jnp.mean(jnp.square(x), axis=-1)).mean()
        own = shares(layout.slots[level - 1], span) == np.arange(layout.slots[level - 1])[:, None]
        mean = jnp.einsum(
            "nid,si->nsd", unit(x).reshape(-1, span, x.shape[-1]),
            own / own.sum(1, keepdims=True),
        )  # fmt: skip
        return size * unit(mean)


def calibrate(
    gists: EmbeddingGists, base: Any, rows: Int[np.ndarray, "n t"], key: jax.Array
) -> dict[str, Any]:
    """Fresh parameters whose slots are words that the base did not expect, at their size.

    A ridge regression from what a slot sees of a word to what the base lost on it (nats) is the
    query of the first read of level 1, which is the one that a slot starts as. It is sharp: a
    frozen base reads a list of words, but the mean of a few words makes it lose its thread.

    Args:
      rows: training texts of whole windows.
    """
    params = gists.fresh(key)
    content, width = gists.config.gist.content, gists.decoder.config.hidden_size

    @jax.jit
    def seen(base, ids):
        found, hidden = gists.read(base, ids)
        nll, _ = token_cross_entropy(gists.decoder, base, hidden[:, :-1], ids[:, 1:])
        x = jnp.concatenate([unit(found.x)[:, :, None], unit(found.z)], axis=2)
        x = x.reshape(*ids.shape, -1)[:, 1:].reshape(nll.size, -1)  # nobody expects a first word
        size = jnp.sqrt(jnp.mean(jnp.square(found.x.astype(jnp.float32)), axis=-1)).mean()
        return x, nll.reshape(-1), size

    parts = [[np.asarray(y, np.float64) for y in seen(base, row[None])] for row in rows]
    x = np.concatenate([part[0] for part in parts])
    lost = np.minimum(np.concatenate([part[1] for part in parts]), _MOST)
    x, lost = x - x.mean(0), lost - lost.mean()
    gram = x.T @ x
    at = np.diag_indices_from(gram)
    gram[at] += _RIDGE * gram[at] + 1e-6 * gram[at].mean()  # some features may never change
    probe = np.linalg.solve(gram, x.T @ lost)
    probe /= max(np.std(x @ probe), 1e-6)
    for level in params.values():
        level["size"] = jnp.full_like(level["size"], np.mean([part[2] for part in parts]))
    look = content * np.sqrt(width) * probe.reshape(-1, width)
    first, options, layout = params["level_1"], gists.config.gist, gists.config.layout
    slots, reads = layout.slots[0], options.reads
    first["look"] = first["look"].at[::reads].set(jnp.asarray(look, jnp.float32))
    own = shares(slots, layout.block) == np.arange(slots)[:, None]
    # As sharp between stretches as between words.
    outside = -options.focus * (1 + content)
    first["prefer"] = first["prefer"].at[::reads].set(jnp.where(own, 0.0, outside))
    return params
