"""Do gists substitute? Losses of the text behind them, between full text and none.

Recovery is ``1 - (gist - full) / (dropped - full)`` of the mean losses over the horizon, on the
histories whose loss costs more than ``eval.threshold`` nats per token. Every arm reads the same
tail raw and predicts the same tokens; arms differ in what stands for the history before it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from latent_jax.backbones.cross_entropy import token_cross_entropy
from latent_jax.backbones.decoder import KV, Decoder
from latent_jax.core.errors import ConfigError, DataError
from latent_jax.ops import bootstrap
from latent_jax.systems.megacontext import base_lora, optimised
from latent_jax.systems.megacontext.config import MegaRun
from latent_jax.systems.megacontext.consistency import Checked, inconsistent
from latent_jax.systems.megacontext.contexts import pass_through
from latent_jax.systems.megacontext.embedding_gists import EmbeddingGists
from latent_jax.systems.megacontext.embedding_net import shares
from latent_jax.systems.megacontext.gist import GistNet, Gists, build, damped
from latent_jax.systems.megacontext.head_gists import HeadGists, Spread
from latent_jax.systems.megacontext.positions import Placement, slot_offsets, slot_positions
from latent_jax.systems.megacontext.reading import encode, place, read_on

# Arms that are made of raw entries, whatever the gists are.
_RAW = {"windowed", "mean_pool", "kv_stride", "recency"}
# Arms of entries that go through the base, if gists are input embeddings.
_EMBEDDED = {"gist", "shuffled", "mean_pool"}


class Recovery:
    """Measures one level of a GistNet on one frozen base.

    Attributes:
      level: of the gists.
      nodes: how many stand for the history.
      past: tokens that they replace.
      checked: entries that were read, and how many stood elsewhere than their text.

    Arms: ``full`` text as one sequence; ``windowed``, raw entries encoded in windows of their own
    (what a raw block of a working context is); ``gist``; ``mean_pool`` of the same stretches,
    untrained (of input embeddings, if gists are such); ``kv_stride``, one raw entry per stretch;
    ``recency``, as many of the newest raw entries as there are slots; ``shuffled``, another
    history's gists; ``dropped``, nothing; ``optimised``, as many slots moved by gradient descent
    for each history from its gists (from ``kv_stride``, if they are of kind heads), which sees what
    no gist may, but never the horizon (see `optimised`). Parameters with LoRA (`base_lora`) apply
    it to what is read in every arm, the whole text among them.

    Raises:
      ConfigError: histories that are too long to be optimised for, or positions that the base
        does not have.
    """

    def __init__(
        self, decoder: Decoder, gists: GistNet | HeadGists | EmbeddingGists, sink: int,
        config: MegaRun, level: int, nodes: int,
    ):  # fmt: skip
        self.decoder, self.gists, self.sink, self.config = decoder, gists, sink, config
        layout = config.model.layout
        self.level, self.slots = level, layout.slots[level - 1]
        self.nodes, self.past = nodes, nodes * int(layout.widths[level]) * layout.block
        self.checked = Checked()
        self.placement = Placement(config.model, decoder.config)
        self._arm = jax.jit(self._losses, static_argnames=("arm",))
        self._encode = jax.jit(self._raw)
        self._optimise = jax.jit(self._optimised)
        self._tail = layout.protected * layout.block
        if optimised.ARM in config.eval.arms:
            row = self.past + optimised.length(self.past, self.length - self.past, self._tail)
            if row > decoder.config.max_position:
                raise ConfigError(
                    f"eval.arms: optimised reads histories of {self.past} tokens (level {level}) "
                    f"twice, {row} tokens with what is between, and the base has "
                    f"{decoder.config.max_position} positions: lower eval.history, or leave it out"
                )
        self._make = None
        if isinstance(gists, HeadGists | EmbeddingGists):
            self._make = jax.jit(functools.partial(gists.build, level=level))

    @property
    def length(self) -> int:
        """Tokens of a row: history, protected tail and horizon."""
        layout = self.config.model.layout
        return self.past + (layout.protected + self.config.eval.horizon) * layout.block

    def places(self, arm: str) -> Int[np.ndarray, " m"]:
        """Where in the history the entries of an arm stand."""
        model, t = self.config.model, self.past
        if arm == "windowed":
            return np.arange(t)
        if arm == "recency":
            return np.arange(t - self.nodes * self.slots, t)
        if arm in ("gist", "shuffled"):
            return slot_positions(model, self.level, np.arange(self.nodes))
        # Where as many slots stand, of whatever kind the gists are.
        span = model.layout.block * int(model.layout.widths[self.level])
        at = slot_offsets(model.layout, self.level, model.gist.place)
        return (np.arange(self.nodes)[:, None] * span + at).reshape(-1)

    def _check(self, arm: str) -> None:
        """Counts entries of an arm that do not stand where their text did (`consistency`)."""
        if arm in ("full", "dropped", "recency"):  # the newest tokens may begin inside a block
            return
        level = 0 if arm == "windowed" else self.level
        count = self.past // self.config.model.layout.block if level == 0 else self.nodes
        nodes, at = [(level, i) for i in range(count)], self.places(arm)
        wrong = inconsistent(
            self.config.model, nodes, self.placement.rotary(at, self.past), self.past,
            self.placement.first(self.past, at.size), self.placement.far,
            slots=arm in ("mean_pool", "kv_stride", optimised.ARM),
        )  # fmt: skip
        self.checked.add(wrong)

    def _raw(self, base: Any, ids: Int[Array, "b t"]) -> Gists:
        """Raw entries of the history, which most arms begin with."""
        model = self.config.model
        block, gist = model.layout.block, model.gist
        ids = ids[:, : self.past]
        return encode(self.decoder, base, self.sink, ids, block, gist.window, gist.lead)[0]

    def _optimised(
        self, params: Any, base: Any, raw: Gists | None, made: Any, ids: Int[Array, "b t"]
    ) -> Any:
        """Entries of the arm ``optimised``."""
        c, b = self.config, len(ids)
        if isinstance(self.gists, EmbeddingGists):
            start = made
        elif isinstance(self.gists, HeadGists):
            at = self.places(optimised.ARM)
            start = Gists(*(self._flat(x, b)[:, :, at] for x in raw))
        else:
            start = self._built(params, raw)
        return optimised.optimised(
            self.decoder, base, self.sink, start, lambda x: self._moved(base, x, b), ids, self.past,
            self._tail, c.eval.optimised_steps, c.eval.optimised_rate,
            self.placement.first(self.past, self.nodes * self.slots),
            base_lora.deltas(c.model.lora, self.decoder.config, params), c.losses.chunk,
        )  # fmt: skip

    def _moved(self, base: Any, found: Any, b: int) -> KV:
        """Entries of that arm as the base attends to them."""
        if isinstance(self.gists, EmbeddingGists):
            return self._of_embeddings(base, found, b, optimised.ARM)
        return self._placed(found, optimised.ARM, b)

    def _placed(self, found: Gists, arm: str, b: int, bias: Any = None) -> KV:
        """Entries that do not depend on one another, where those of an arm stand."""
        at = self.placement.rotary(self.places(arm), self.past)
        at = jnp.broadcast_to(at, (b, at.size))
        return place(self.decoder, found, at, jnp.ones(at.shape, bool), bias)

    def _built(self, params: Any, raw: Gists) -> Gists:
        """Gists of a GistNet, as they are read."""
        found = build(self.gists, params["gist"], raw, self.level)
        return damped(self.config.model, self.decoder.config, found, self.level)

    def _flat(self, x: Float[Array, "l n s g d"], b: int) -> Float[Array, "l b t g d"]:
        """Raw entries by row."""
        return x.reshape(x.shape[0], b, self.past, *x.shape[3:])

    def _losses(
        self, params: Any, base: Any, raw: Gists | None, made: Any, ids: Int[Array, "b t"], arm: str
    ) -> Float[Array, " b"]:
        """Mean loss over the horizon of each row, nats per token."""
        c = self.config
        (b, t), past = ids.shape, self.past
        horizon = c.eval.horizon * c.model.layout.block
        lora = base_lora.deltas(c.model.lora, self.decoder.config, params)
        if arm == "full":
            where = jnp.broadcast_to(jnp.arange(t), ids.shape)
            hidden = read_on(self.decoder, base, self.sink, None, ids, where, lora=lora)
        else:
            count = 0 if arm == "dropped" else len(self.places(arm))
            where = self.placement.first(past, count) + jnp.arange(t - past)
            where = jnp.broadcast_to(where, (b, t - past))
            if arm == optimised.ARM:
                entries = self._moved(base, made, b)
            elif isinstance(self.gists, EmbeddingGists) and arm in _EMBEDDED:
                if arm == "mean_pool":
                    made = self.gists.pooled(base, ids[:, :past], self.level)
                entries = self._of_embeddings(base, made, b, arm)
            else:
                entries = self._entries(params, raw, made, b, arm)
            hidden = read_on(
                self.decoder, base, self.sink, entries, ids[:, past:], where, lora=lora
            )
        nll, _ = token_cross_entropy(
            self.decoder, base, hidden[:, -horizon - 1 : -1], ids[:, -horizon:], c.losses.chunk
        )
        return nll.mean(-1)

    def _entries(
        self, params: Any, raw: Gists | None, made: Any, b: int, arm: str
    ) -> KV | None:
        """What stands for the history."""
        if arm == "dropped":
            return None
        own = arm in ("gist", "shuffled")
        if own and made is not None:
            return self._of_heads(params["gist"], made, b, arm)
        slots, at = self.slots, self.places(arm)
        flat = Gists(*(self._flat(x, b) for x in raw))
        if arm == "windowed":
            found = raw
        elif own:
            found = self._built(params, raw)
            if arm == "shuffled":
                found = Gists(*(jnp.roll(x, self.nodes, axis=1) for x in found))
        elif arm == "mean_pool":
            found = Gists(*(_pooled(x, self.nodes, slots) for x in flat))
        else:  # raw entries where they stood
            found = Gists(*(x[:, :, at] for x in flat))
        return self._placed(found, arm, b)

    def _of_heads(self, params: Any, made: Any, b: int, arm: str) -> KV:
        """Gists of the history's own entries."""
        found = self.gists.spread(params, made, self.level)
        if arm == "shuffled":
            found = Spread(*(jnp.roll(x, self.nodes, axis=1) for x in found))
        return self._placed(Gists(found.k, found.v), arm, b, found.bias)

    def _of_embeddings(self, base: Any, made: Any, b: int, arm: str) -> KV:
        """Gists that are input embeddings, through the base in their order."""
        if arm == "shuffled":
            made = jnp.roll(made, self.nodes, axis=0)
        order = self.places(arm)
        at = self.placement.rotary(order, self.past)
        at, order = (jnp.broadcast_to(x, (b, x.size)) for x in (at, order))
        x, there = made.reshape(*at.shape, made.shape[-1]), jnp.ones(at.shape, bool)
        return pass_through(self.decoder, base, self.sink, x, at, order, there)

    def losses(
        self,
        params: Any,
        base: Any,
        rows: Int[np.ndarray, "n t"],
        arms: Sequence[str],
        progress: Callable[[str, int, int], None] | None = None,
    ) -> dict[str, Float[np.ndarray, " n"]]:
        """Loss of every arm on every history.

        The last batch is filled up with the first rows. A batch is never longer than the rows, or
        a history could follow itself round and be ``shuffled`` with its own gists.

        Raises:
          DataError: fewer than two histories.
        """
        if len(rows) < 2:
            raise DataError(
                f"eval.text: {len(rows)} history of {self.length} tokens; recovery needs two, for "
                "one is read with the gists of another"
            )
        embeddings = isinstance(self.gists, EmbeddingGists)
        raw_arms = _RAW - {"mean_pool"} if embeddings else _RAW | {optimised.ARM}
        size, found = min(self.config.eval.batch_size, len(rows)), {arm: [] for arm in arms}
        starts = range(0, len(rows), size)
        for number, start in enumerate(starts):
            ids = rows[np.arange(start, start + size) % len(rows)]
            raw = self._encode(base, ids) if self._make is None or raw_arms & set(arms) else None
            made = None
            if self._make is not None and {"gist", "shuffled", optimised.ARM} & set(arms):
                made = self._make(params["gist"], base, ids[:, : self.past])
            for arm in arms:
                self._check(arm)
                own = made
                if arm == optimised.ARM:
                    own = self._optimise(params, base, raw, made, ids)
                found[arm].append(np.asarray(self._arm(params, base, raw, own, ids, arm)))
            if progress is not None:
                progress("recovery", number + 1, len(starts))
        return {arm: np.concatenate(x)[: len(rows)] for arm, x in found.items()}

    def summary(
        self, losses: dict[str, Float[np.ndarray, " n"]], intervals: bool = True
    ) -> dict[str, Any]:
        """``nll_at_h.lod<l>.<arm>`` and ``recovery.lod<l>.slots<n>[.<arm>]``, with intervals."""
        full, dropped = losses["full"], losses["dropped"]
        hurt = dropped - full > self.config.eval.threshold
        lod = f"lod{self.level}"
        found: dict[str, Any] = {f"nll_at_h.{lod}.{a}": float(x.mean()) for a, x in losses.items()}
        found[f"recovery.{lod}.histories"] = len(full)
        found[f"recovery.{lod}.share_hurt"] = float(hurt.mean())
        if not hurt.any():
            return found
        cost = (dropped - full)[hurt]
        for arm, x in losses.items():
            if arm in ("full", "dropped"):
                continue
            name = f"recovery.{lod}.slots{self.slots}" + ("" if arm == "gist" else f".{arm}")
            gained = (dropped - x)[hurt]
            found[name] = float(gained.sum() / cost.sum())
            if intervals:
                found[f"{name}.ci95"] = list(bootstrap.ratio_interval(gained, cost))
        return found


def _pooled(x: Float[Array, "l b t g d"], nodes: int, slots: int) -> Float[Array, "l b m g d"]:
    """Mean over each slot's stretch; the stretches of a node differ by one where they must."""
    x = x.reshape(*x.shape[:2], nodes, -1, *x.shape[3:])
    own = shares(slots, x.shape[3]) == np.arange(slots)[:, None]
    mean = jnp.einsum("lbnigd,si->lbnsgd", x, own / own.sum(1, keepdims=True))
    return mean.reshape(*x.shape[:2], nodes * slots, *x.shape[4:]).astype(x.dtype)
