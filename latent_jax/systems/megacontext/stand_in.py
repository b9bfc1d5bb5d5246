"""What gists are trained on: the base behind them beside the base behind the text itself."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from latent_jax.backbones.decoder import KV, Decoder
from latent_jax.backbones.substitution import substitution
from latent_jax.systems.megacontext.config import MegaRun
from latent_jax.systems.megacontext.contexts import pass_through
from latent_jax.systems.megacontext.embedding_gists import EmbeddingGists
from latent_jax.systems.megacontext.gist import Gists, build, grouped, slot_positions
from latent_jax.systems.megacontext.head_gists import HeadGists
from latent_jax.systems.megacontext.reading import encode, place, read_on, who_sees_what


class StandIn:
    """Mixed into the system; needs its ``config``, ``decoder``, ``sink`` and ``gists``."""

    config: MegaRun
    decoder: Decoder
    sink: int
    gists: Any

    def _behind_all(self, gist, base, ids, key, chunk, lora=None):
        """Every chunk of a row reads on behind the gists of what came before it."""
        c = self.config
        layout, window, lead = c.model.layout, c.model.gist.window, c.model.gist.lead
        (b, t), n = ids.shape, ids.shape[1] // layout.block
        embeddings = isinstance(self.gists, EmbeddingGists)
        if embeddings:
            own, full = self.gists.read(base, ids)
        else:
            lead = lead if n > window else 0  # nothing leads to the only window
            own, out = encode(self.decoder, base, self.sink, ids, layout.block, window, lead)
            full = out.hidden
        where = jnp.broadcast_to(jnp.arange(t), ids.shape)
        if n == window:
            full = full.reshape(b, t, -1)
        else:
            full = read_on(self.decoder, base, self.sink, None, ids, where)
        own, full = jax.lax.stop_gradient((own, full))
        seen, raw = who_sees_what(self._replaced(key, b, n), layout.block, chunk)
        at = slot_positions(c.model, 1, jnp.arange(n))
        seen = jnp.repeat(seen, at.size // n, axis=-1)
        at = jnp.broadcast_to(at, (b, at.size))
        if embeddings:
            found = self.gists.net.apply({"params": gist}, own, 1)
            placed = self._pass_through(base, found, at)._replace(mask=seen)
        else:
            if isinstance(self.gists, HeadGists):
                k, v, bias = self.gists.spread(gist, self.gists.make(gist, base, ids))
                gists = Gists(k, v)
            else:
                gists, bias = build(self.gists, gist, own, 1), None
            placed = place(self.decoder, gists, at, seen, bias)
        given = read_on(self.decoder, base, self.sink, placed, ids, where, raw, lora)
        # Behind gists, and with a raw tail before it as in a working context (a chunk of one block
        # has none).
        chunks = np.arange(t).reshape(-1, chunk * layout.block)
        tail = layout.protected * layout.block - 1 if chunk > 1 else 0
        told = chunks[1:, tail:-1].reshape(-1)
        return substitution(
            self.decoder, base, full[:, told], given[:, told], ids[:, told + 1], c.losses.chunk
        )

    def _behind_one(self, gist, base, ids, level, lora=None):
        """The end of a row reads on behind one gist of everything before; the gists below it are
        taken as they are.
        """
        c = self.config
        layout = c.model.layout
        (b, t), past = ids.shape, int(layout.widths[level]) * layout.block
        where = jnp.broadcast_to(jnp.arange(t), ids.shape)
        full = read_on(self.decoder, base, self.sink, None, ids, where)
        at = slot_positions(c.model, level, jnp.arange(1))
        at = jnp.broadcast_to(at, (b, at.size))
        if isinstance(self.gists, EmbeddingGists):
            below = self.gists.build(gist, base, ids[:, :past], level - 1)
            full, below = jax.lax.stop_gradient((full, below))
            below = below.reshape(b, layout.branching, *below.shape[1:])
            placed = self._pass_through(base, self.gists.merge(gist, base, below, level), at)
        else:
            raw, _ = encode(
                self.decoder, base, self.sink, ids[:, :past], layout.block, c.model.gist.window,
                c.model.gist.lead,
            )  # fmt: skip
            below = build(self.gists, gist, raw, level - 1)
            full, below = jax.lax.stop_gradient((full, below))
            found = self.gists.apply(
                {"params": gist}, grouped(below, layout.branching), level
            )
            placed = place(self.decoder, found, at, jnp.ones(at.shape, bool))
        given = read_on(
            self.decoder, base, self.sink, placed, ids[:, past:], where[:, past:], lora=lora
        )
        first = layout.protected * layout.block
        return substitution(
            self.decoder, base, full[:, past + first : -1], given[:, first:-1],
            ids[:, past + first + 1 :], c.losses.chunk,
        )  # fmt: skip

    def _level_of(self, tokens: int) -> int:
        """The level whose training rows have so many tokens."""
        layout = self.config.model.layout
        width = tokens // layout.block - self.config.data.beyond
        return int(np.flatnonzero(layout.widths[2:] == width)[0]) + 2

    def _replaced(self, key: jax.Array | None, b: int, n: int) -> jax.Array:
        """Which blocks are gists to what comes after them: all, or in some rows a random share."""
        if key is None:
            return jnp.ones((b, n), bool)
        some, rate, draw = jax.random.split(key, 3)
        mixed = jax.random.bernoulli(some, self.config.data.raw, (b, 1))
        share = jnp.where(mixed, jax.random.uniform(rate, (b, 1)), 1.0)
        return jax.random.uniform(draw, (b, n)) < share

    def _pass_through(
        self, base: Any, found: Float[Array, "n s d"], at: Int[Array, "b m"]
    ) -> KV:
        """Gists that are input embeddings, through the base in their order.

        In a row of mixed detail each sees the gists of all before it, also of blocks that are raw
        to the text behind.
        """
        x = found.reshape(*at.shape, found.shape[-1])
        return pass_through(
            self.decoder, base, self.sink, x, at, at, jnp.ones(at.shape, bool)
        )
