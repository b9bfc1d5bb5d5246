"""What gists are trained on: the base behind them beside the base behind the text itself."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from latent_jax.backbones.cross_entropy import token_cross_entropy
from latent_jax.backbones.decoder import KV, Decoder
from latent_jax.backbones.substitution import substitution
from latent_jax.core.types import Mean
from latent_jax.systems.megacontext.config import MegaRun
from latent_jax.systems.megacontext.contexts import pass_through
from latent_jax.systems.megacontext.embedding_gists import EmbeddingGists
from latent_jax.systems.megacontext.gist import Gists, build, damped, grouped
from latent_jax.systems.megacontext.head_gists import HeadGists
from latent_jax.systems.megacontext.positions import slot_positions
from latent_jax.systems.megacontext.reading import encode, place, read_on, who_sees_what

BESIDE = ("rebuild", "apart")  # terms of `StandIn._other_terms`, computed where a weight is not 0


class Made(NamedTuple):
    """Gists of a training row.

    Attributes:
      own: the entries of the blocks that they are made of.
      gists: theirs.
      placed: as a prefix of the row.
    """

    own: Any
    gists: Any
    placed: KV


class StandIn:
    """Mixed into the system; needs its ``config``, ``decoder``, ``sink`` and ``gists``."""

    config: MegaRun
    decoder: Decoder
    sink: int
    gists: Any

    def _behind_all(self, gist, base, ids, key, chunk, lora=None):
        """Every chunk of a row reads on behind the gists of what came before it; also what those
        are.
        """
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
            gists = self.gists.net.apply({"params": gist}, own, 1)
            placed = self._pass_through(base, gists, at)._replace(mask=seen)
        else:
            if isinstance(self.gists, HeadGists):
                k, v, bias = self.gists.spread(gist, self.gists.make(gist, base, ids))
                gists = Gists(k, v)
            else:
                gists, bias = build(self.gists, gist, own, 1), None
                gists = damped(c.model, self.decoder.config, gists, 1)
            placed = place(self.decoder, gists, at, seen, bias)
        given = read_on(self.decoder, base, self.sink, placed, ids, where, raw, lora)
        told = self._told(t, chunk)
        found = substitution(
            self.decoder, base, full[:, told], given[:, told], ids[:, told + 1], c.losses.chunk
        )
        return found, Made(own, gists, placed)

    def _told(self, t: int, chunk: int) -> np.ndarray:
        """Places whose next token is predicted: behind gists, and with a raw tail before it as in
        a working context (a chunk of one block has none).
        """
        layout = self.config.model.layout
        chunks = np.arange(t).reshape(-1, chunk * layout.block)
        return chunks[1:, self._tail(chunk) : -1].reshape(-1)

    def _tail(self, chunk: int) -> int:
        layout = self.config.model.layout
        return layout.protected * layout.block - 1 if chunk > 1 else 0

    def _at_boundaries(self, t: int, chunk: int) -> np.ndarray | None:
        """Weights of the predicted tokens; none if all weigh the same."""
        weight, block = self.config.losses.boundary, self.config.model.layout.block
        if weight == 1:
            return None
        behind = self._told(t, chunk) % (chunk * block) - self._tail(chunk)
        return np.where(behind < block, weight, 1.0).astype(np.float32)

    def _other_terms(self, base, ids, made: Made, lora) -> dict[str, Mean]:
        """What else gists may be trained on: `BESIDE`."""
        c, terms = self.config, {}
        wanted = {
            name for name in BESIDE
            if getattr(c.losses, name) or any(p.weights.get(name) for p in c.train.phases)
        }
        if "rebuild" in wanted:
            terms["rebuild"] = self._rebuilt(base, ids, made.placed, lora)
        if "apart" in wanted:
            terms["apart"] = alikeness(made.gists.v, made.own.v, len(ids))
        return terms

    def _rebuilt(self, base, ids, placed: KV, lora) -> Mean:
        """Every block read again, behind its own gist and nothing else.

        It stands as far behind as the row is long: where the text itself stood is taken.
        """
        (b, t), size = ids.shape, self.config.model.layout.block
        block, slots = np.arange(t) // size, placed.k.shape[2] * size // t
        own = block[:, None] == np.arange(placed.k.shape[2]) // slots
        raw = (block[:, None] == block) & np.tri(t, dtype=bool)
        hidden = read_on(
            self.decoder, base, self.sink,
            placed._replace(mask=jnp.broadcast_to(own, (b, *own.shape))), ids,
            jnp.broadcast_to(t + np.arange(t), ids.shape), jnp.broadcast_to(raw, (b, t, t)), lora,
        )  # fmt: skip
        told = np.flatnonzero(np.arange(t) % size < size - 1)
        nll, _ = token_cross_entropy(
            self.decoder, base, hidden[:, told], ids[:, told + 1], self.config.losses.chunk
        )
        return Mean.of(nll)

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
            found = damped(c.model, self.decoder.config, found, level)
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


def alikeness(
    gists: Float[Array, "l n s g d"], raw: Float[Array, "l n t g d"], rows: int
) -> Mean:
    """Squared excess of the cosine between the gists of two blocks of a row over that between the
    mean values of the blocks themselves.

    A frozen base's values share much whatever the text, so 0 would be no goal; gists that are no
    more alike than their texts cost nothing, and what makes them more alike is pushed back.
    """

    def cosines(x):
        flat = x.mean(2, dtype=jnp.float32)  # of the slots or tokens
        flat = jnp.moveaxis(flat, 1, 0).reshape(rows, x.shape[1] // rows, -1)
        unit = flat / jnp.maximum(jnp.linalg.norm(flat, axis=-1, keepdims=True), 1e-6)
        return jnp.einsum("rid,rjd->rij", unit, unit)

    excess = jax.nn.relu(cosines(gists) - jax.lax.stop_gradient(cosines(raw)))
    return Mean.of(excess**2, ~np.eye(excess.shape[1], dtype=bool))
