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
from latent_jax.ops import bootstrap
from latent_jax.systems.megacontext.config import MegaRun
from latent_jax.systems.megacontext.gist import GistNet, Gists, slot_positions
from latent_jax.systems.megacontext.reading import encode, place, read_on

ARMS = (
    "full", "windowed", "gist", "mean_pool", "kv_stride", "recency", "shuffled", "dropped"
)  # fmt: skip


class Recovery:
    """Measures one GistNet on one frozen base.

    Arms: ``full`` text as one sequence; ``windowed``, raw entries encoded in windows of their own
    (what a raw block of a working context is); ``gist``; ``mean_pool`` of the same stretches,
    untrained; ``kv_stride``, one raw entry per stretch; ``recency``, as many of the newest raw
    entries as there are slots; ``shuffled``, another history's gists; ``dropped``, nothing.
    """

    def __init__(self, decoder: Decoder, gists: GistNet, sink: int, config: MegaRun):
        self.decoder, self.gists, self.sink, self.config = decoder, gists, sink, config
        self._arm = jax.jit(self._losses, static_argnames=("arm",))

    def _losses(
        self, params: Any, base: Any, ids: Int[Array, "b t"], arm: str
    ) -> Float[Array, " b"]:
        """Mean loss over the horizon of each row, nats per token."""
        c = self.config
        block, n = c.model.layout.block, c.eval.history
        (b, t), past = ids.shape, n * block
        horizon = c.eval.horizon * block
        if arm == "full":
            where = jnp.broadcast_to(jnp.arange(t), ids.shape)
            hidden = read_on(self.decoder, base, self.sink, None, ids, where)
        else:
            where = jnp.broadcast_to(jnp.arange(past, t), (b, t - past))
            entries = self._entries(params, base, ids[:, :past], arm)
            hidden = read_on(self.decoder, base, self.sink, entries, ids[:, past:], where)
        nll, _ = token_cross_entropy(
            self.decoder, base, hidden[:, -horizon - 1 : -1], ids[:, -horizon:], c.losses.chunk
        )
        return nll.mean(-1)

    def _entries(self, params: Any, base: Any, ids: Int[Array, "b t"], arm: str) -> KV | None:
        """What stands for the history."""
        if arm == "dropped":
            return None
        model = self.config.model
        layout, slots = model.layout, model.layout.slots[0]
        b, n = ids.shape[0], ids.shape[1] // layout.block
        raw, _ = encode(self.decoder, base, self.sink, ids, layout.block, model.gist.window)
        at = slot_positions(model, 1, jnp.arange(n))
        if arm == "windowed":
            found, at = raw, jnp.arange(ids.shape[1])
        elif arm in ("gist", "shuffled"):
            found = self.gists.apply({"params": params["gist"]}, raw, 1)
            if arm == "shuffled":
                found = Gists(*(jnp.roll(x, n, axis=1) for x in found))
        elif arm == "mean_pool":
            shape = (slots, layout.block // slots)
            found = Gists(
                *(x.reshape(*x.shape[:2], *shape, *x.shape[3:]).mean(3) for x in raw)
            )
        elif arm == "kv_stride":
            take = slot_positions(model, 1, jnp.arange(1))
            found = Gists(*(x[:, :, take] for x in raw))
        else:
            count = n * slots
            flat = Gists(*(x.reshape(x.shape[0], b, -1, *x.shape[3:]) for x in raw))
            found = Gists(*(x[:, :, -count:] for x in flat))
            at = jnp.arange(ids.shape[1] - count, ids.shape[1])
        at = jnp.broadcast_to(at, (b, at.size))
        return place(self.decoder, found, at, jnp.ones(at.shape, bool))

    def losses(
        self,
        params: Any,
        base: Any,
        rows: Int[np.ndarray, "n t"],
        arms: Sequence[str] = ARMS,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> dict[str, Float[np.ndarray, " n"]]:
        """Loss of every arm on every history.

        The last batch is filled up with the first rows, and no batch has one row only: ``shuffled``
        needs another history in the batch.
        """
        size, found = self.config.eval.batch_size, {arm: [] for arm in arms}
        starts = range(0, len(rows), size)
        for number, start in enumerate(starts):
            index = np.arange(start, start + size) % len(rows)
            for arm in arms:
                found[arm].append(np.asarray(self._arm(params, base, rows[index], arm)))
            if progress is not None:
                progress("recovery", number + 1, len(starts))
        return {arm: np.concatenate(x)[: len(rows)] for arm, x in found.items()}

    def summary(
        self, losses: dict[str, Float[np.ndarray, " n"]], intervals: bool = True
    ) -> dict[str, Any]:
        """``nll_at_h.<arm>`` and ``recovery.lod1.slots<n>[.<arm>]``, with intervals."""
        layout = self.config.model.layout
        full, dropped = losses["full"], losses["dropped"]
        hurt = dropped - full > self.config.eval.threshold
        found: dict[str, Any] = {f"nll_at_h.{arm}": float(x.mean()) for arm, x in losses.items()}
        found["recovery.share_hurt"] = float(hurt.mean())
        if not hurt.any():
            return found
        interval = functools.partial(bootstrap.ratio_interval, denominator=(dropped - full)[hurt])
        for arm, x in losses.items():
            if arm in ("full", "dropped"):
                continue
            name = f"recovery.lod1.slots{layout.slots[0]}" + ("" if arm == "gist" else f".{arm}")
            gained = (dropped - x)[hurt]
            found[name] = float(gained.sum() / (dropped - full)[hurt].sum())
            if intervals:
                found[f"{name}.ci95"] = list(interval(gained))
        return found
