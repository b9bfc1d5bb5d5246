"""MegaContext as the shared trainer sees it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latent_jax import backbones
from latent_jax.backbones.sharding import DECODER_RULES
from latent_jax.backbones.sink import sink_token
from latent_jax.core import trees
from latent_jax.core.types import Mean
from latent_jax.systems.megacontext import recipe
from latent_jax.systems.megacontext.config import MegaRun
from latent_jax.systems.megacontext.gist import GistNet, Gists, slot_positions
from latent_jax.systems.megacontext.losses import substitution
from latent_jax.systems.megacontext.reading import encode, place, read_on, who_sees_what
from latent_jax.systems.megacontext.recovery import Recovery

_LABELS = (
    (r"^gist/.*/(query|bias)$", "queries"),
    (r"^gist/.*/(keys|values)$", "maps"),
)


class MegaContextSystem:
    """Gists that substitute for text; implements `latent_jax.train.protocol.System`.

    Args:
      config: the resolved run.
      backbone: an already loaded base; by default ``config.backbone`` is loaded.
    """

    config_class = MegaRun
    rng_names = ("lod",)
    logical_rules = (
        *DECODER_RULES,
        (r"gist/.*/(query|bias)$", ("layers", None, None, None)),
        (r"gist/.*/(keys|values)$", ("layers", None, None, None, "heads")),
    )

    def __init__(self, config: MegaRun, backbone: backbones.Backbone | None = None):
        self.config = config
        self.backbone = backbone or backbones.load(
            config.backbone.name, dtype=jnp.dtype(config.backbone.dtype)
        )
        self.decoder = self.backbone.decoder.clone(remat=config.model.remat)
        self.sink = sink_token(self.backbone.tokenizer)
        self.gists = GistNet(config.model, self.backbone.config)
        self.frozen = {"base": self.backbone.params}
        self.weights = {
            "substitute": config.losses.substitute, "next_token": config.losses.next_token
        }  # fmt: skip
        self.recovery = Recovery(self.decoder, self.gists, self.sink, config)
        self._held_out: np.ndarray | None = None

    def init(self, rngs: Mapping[str, jax.Array], batch: Mapping[str, Any]) -> dict[str, Any]:
        """Fresh parameters: a slot starts as a mean over its stretch."""
        r, layout = self.backbone.config, self.config.model.layout
        shape = (r.num_layers, 1, layout.block, r.num_kv_heads, r.head_dim)
        some = Gists(jnp.zeros(shape), jnp.zeros(shape))
        return {"params": {"gist": self.gists.init(rngs["params"], some, method="touch")["params"]}}

    def param_labels(self, params):
        """Groups ``queries`` (what slots look for) and ``maps`` (what becomes of it)."""
        return trees.match_tree(_LABELS, params)

    def unit_counts(self, batch: Mapping[str, Any]) -> dict[str, int]:
        """Tokens of the histories."""
        return {"tokens": int(np.size(batch["ids"]))}

    def loss_terms(self, variables, frozen, batch, rngs, train):
        """Every token of a row reads on behind the gists of its own past; the base that saw the
        raw text is the teacher.
        """
        c, base, ids = self.config, frozen["base"], batch["ids"]
        layout, window = c.model.layout, c.model.gist.window
        (b, t), n = ids.shape, ids.shape[1] // layout.block
        entries, out = encode(self.decoder, base, self.sink, ids, layout.block, window)
        full = out.hidden
        where = jnp.broadcast_to(jnp.arange(t), ids.shape)
        if n == window:
            full = full.reshape(b, t, -1)
        else:
            full = read_on(self.decoder, base, self.sink, None, ids, where)
        entries, full = jax.lax.stop_gradient((entries, full))
        gists = self.gists.apply({"params": variables["params"]["gist"]}, entries, 1)
        seen, raw = who_sees_what(
            self._replaced(rngs["lod"] if train else None, b, n), layout.block, layout.protected
        )
        at = slot_positions(c.model, 1, jnp.arange(n))
        placed = place(self.decoder, gists, jnp.broadcast_to(at, (b, at.size)), None)
        placed = placed._replace(mask=jnp.repeat(seen, layout.slots[0], axis=-1))
        given = read_on(self.decoder, base, self.sink, placed, ids, where, raw)
        # The first tokens have nothing behind the tail yet.
        first = (layout.protected + 1) * layout.block
        kl, nll, best = substitution(
            self.decoder, base, full[:, first:-1], given[:, first:-1], ids[:, first + 1 :],
            c.losses.chunk,
        )  # fmt: skip
        terms = {"substitute": Mean.of(kl), "next_token": Mean.of(nll)}
        return terms, {}, {"lost": Mean.of(nll - best)}

    def _replaced(self, key: jax.Array | None, b: int, n: int) -> jax.Array:
        """Which blocks are gists to what comes after them: all, or in some rows a random share."""
        if key is None:
            return jnp.ones((b, n), bool)
        some, rate, draw = jax.random.split(key, 3)
        mixed = jax.random.bernoulli(some, self.config.data.raw, (b, 1))
        share = jnp.where(mixed, jax.random.uniform(rate, (b, 1)), 1.0)
        return jax.random.uniform(draw, (b, n)) < share

    def train_data(self, phase: str, start_state: Any):
        """Rows of histories; every phase reads the same ones."""
        stream = recipe.train_stream(self.config, self.backbone.tokenizer)
        if start_state is not None:
            stream.set_state(start_state)
        return stream

    def eval_data(self) -> np.ndarray:
        """Held-out histories with their tail and horizon, ``[n, tokens]``."""
        if self._held_out is None:
            e = self.config.eval
            blocks = e.history + self.config.model.layout.protected + e.horizon
            limit = max(e.rows, e.quick_rows)
            self._held_out = recipe.histories(
                self.config, self.backbone.tokenizer, "validation", blocks, limit
            )
        return self._held_out

    def quick_eval(self, variables, frozen) -> dict[str, float]:
        """Recovery on a few held-out histories, with own and with another history's gists."""
        rows = self.eval_data()[: self.config.eval.quick_rows]
        found = self.recovery.losses(variables["params"], frozen["base"], rows, QUICK)
        return self.recovery.summary(found, intervals=False)

    def evaluate(self, variables, frozen, progress=None):
        """Recovery at every level with its controls, and losses of all arms."""
        rows = self.eval_data()[: self.config.eval.rows]
        found = self.recovery.losses(variables["params"], frozen["base"], rows, progress=progress)
        return self.recovery.summary(found), {"histories": found}


QUICK = ("full", "dropped", "gist", "shuffled")
