"""MegaContext as the shared trainer sees it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latent_jax import backbones
from latent_jax.backbones.sharding import DECODER_RULES
from latent_jax.backbones.sink import sink_token
from latent_jax.core import trees
from latent_jax.core.types import Mean
from latent_jax.systems.megacontext import base_lora, lens_losses, match_assets, recipe
from latent_jax.systems.megacontext.alternation import Alternation
from latent_jax.systems.megacontext.config import MegaRun
from latent_jax.systems.megacontext.consistency import Checked
from latent_jax.systems.megacontext.embedding_gists import EmbeddingGists
from latent_jax.systems.megacontext.embedding_gists import calibrate as start_embeddings
from latent_jax.systems.megacontext.evaluation import Evaluation
from latent_jax.systems.megacontext.gist import GistNet, Gists
from latent_jax.systems.megacontext.head_calibration import calibrate
from latent_jax.systems.megacontext.head_gists import HeadGists
from latent_jax.systems.megacontext.hooks import StoreHooks
from latent_jax.systems.megacontext.lens import Tail, action_entries, entries, nothing_seen
from latent_jax.systems.megacontext.lens_data import LensRows, Unmeasured, batch_spec
from latent_jax.systems.megacontext.match_data import MatchRows
from latent_jax.systems.megacontext.matcher import Matcher, matching, whitened
from latent_jax.systems.megacontext.policies import squash
from latent_jax.systems.megacontext.sight import lens_net, sight_width
from latent_jax.systems.megacontext.stand_in import BESIDE, StandIn
from latent_jax.systems.megacontext.tiling import Tiling

_LABELS = (
    (r"^gist/profile/", "heads"),
    (r"^gist/(query|normaliser|metric|mass)$", "frozen"),
    (r"^gist/level_1/(query|bias|look|prefer)$", "queries"),
    (r"^gist/level_1/(keys|values|maps|size)$", "maps"),
    (r"^gist/level_[0-9]+/(query|bias|look|prefer)$", "upper_queries"),
    (r"^gist/level_[0-9]+/(keys|values|maps|size)$", "upper_maps"),
    (r"^lens/", "lens"),
    (r"^lora/", base_lora.PART),
    (r"^matcher/", "matcher"),
)


class MegaContextSystem(Evaluation, StandIn, StoreHooks, Alternation):
    """Gists that substitute for text, and a lens that says where; implements
    `latent_jax.train.protocol.System`.

    Args:
      config: the resolved run.
      backbone: an already loaded base; by default ``config.backbone`` is loaded.
    """

    config_class = MegaRun
    rng_names = ("lod",)
    notify: Callable[[str], None] | None = None
    logical_rules = (
        *DECODER_RULES,
        (r"gist/.*/(query|bias)$", ("layers", None, None, None)),
        (r"gist/.*/(keys|values)$", ("layers", None, None, "embed", "heads")),
    )

    def __init__(self, config: MegaRun, backbone: backbones.Backbone | None = None):
        self.config = config
        self.backbone = backbone or backbones.load(
            config.backbone.name, dtype=jnp.dtype(config.backbone.dtype)
        )
        self.decoder = self.backbone.decoder.clone(remat=config.model.remat)
        self.sink = sink_token(self.backbone.tokenizer)
        self.gists = GistNet(config.model, self.backbone.config)
        self.jit_init = config.model.gist.kind == "reads"  # the others read texts
        if config.model.gist.kind == "heads":
            self.gists = HeadGists(config.model, self.decoder, self.sink)
        elif config.model.gist.kind == "embeddings":
            self.gists = EmbeddingGists(config.model, self.decoder, self.sink)
        self.frozen = {"base": self.backbone.params}
        self.weights = {
            "substitute": config.losses.substitute, "upper": config.losses.upper,
            **{name: getattr(config.losses, name) for name in ("next_token", *BESIDE)},
            **{name: getattr(config.losses, name) for name in LENS_TERMS},
            "matching": config.losses.matching,
        }  # fmt: skip
        self.recovery = self._measure(1)
        self._held_out: dict[int, np.ndarray] = {}
        lens = config.model.lens
        self.lens = None if lens is None else lens_net(lens, config.model.layout)
        self._terms = jax.jit(self._lens_terms)
        lora = config.model.lora
        self.lora = None if lora is None else base_lora.make(lora, self.backbone.config)
        matcher = config.model.matcher
        self.matcher = None if matcher is None else Matcher(matcher.width)

    def init(self, rngs: Mapping[str, jax.Array], batch: Mapping[str, Any]) -> dict[str, Any]:
        """Fresh parameters: a slot starts as a mean over its stretch; or what training texts say
        of each head.
        """
        r, layout = self.backbone.config, self.config.model.layout
        if isinstance(self.gists, HeadGists):
            params = {"gist": self._calibrated()}
        elif isinstance(self.gists, EmbeddingGists):
            rows = recipe.calibration(self.config, self.backbone.tokenizer)
            base = self.frozen["base"]
            params = {"gist": start_embeddings(self.gists, base, rows, rngs["params"])}
        else:
            shape = (r.num_layers, 1, layout.block, r.num_kv_heads, r.head_dim)
            some = Gists(jnp.zeros(shape), jnp.zeros(shape))
            params = {"gist": self.gists.init(rngs["params"], some, method="touch")["params"]}
        if self.matcher is not None:
            params["matcher"] = self._fresh_matcher(rngs["params"], batch)
        return {"params": params | self._beside(rngs["params"])}

    def _beside(self, key: jax.Array) -> dict[str, Any]:
        """Fresh parameters of what stands beside gists and matcher."""
        base, found = self.backbone.config, {}
        if self.lens is not None:
            width = sight_width(base, self.config.model.lens)
            nothing = nothing_seen(width, self.lens.words)
            found["lens"] = self.lens.init(key, *nothing)["params"]
        if self.lora is not None:
            found[base_lora.PART] = self.lora.init(key)["params"]
        return found

    def _fresh_matcher(self, key: jax.Array, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A packaged one; or both maps the principal directions of a batch's states."""
        c, base = self.config.model.matcher, self.backbone
        if c.start is not None:
            return match_assets.load(c.start, c, base)
        width = self._states
        params = self.matcher.init(key, jnp.zeros((1, 2, width)))["params"]
        if "other" in batch:
            some = np.asarray(batch["other"], np.float32).reshape(-1, width)[:4096]
            if len(some) > c.width:
                start = {"kernel": jnp.asarray(whitened(some, c.width))}
                params = {**params, "question": start, "history": start}
        return params

    def _calibrated(self) -> dict[str, Any]:
        if self._taken():
            return self.gists.empty()
        tokenizer = self.backbone.tokenizer
        rows = functools.partial(recipe.calibration, self.config, tokenizer)
        return calibrate(self.gists, self.frozen["base"], rows)

    def _trains_lens(self) -> bool:
        return any(p.data == "lens" and not p.skip for p in self.config.train.phases)

    def _taken(self) -> bool:
        """Gists are those of train.init_from, of which labels are."""
        return self._trains_lens() and self.config.train.init_from is not None

    @property
    def _states(self) -> int:
        """Numbers that the matcher is given of a token."""
        return len(self.config.model.matcher.layers) * self.backbone.config.hidden_size

    def _trains_matcher(self) -> bool:
        return any(p.data == "questions" for p in self.config.train.phases)

    def init_shapes(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Shapes of what `init` returns, without its texts."""
        gist = None
        if isinstance(self.gists, HeadGists) and not self._taken():
            gist = jax.eval_shape(self.gists.empty)
        elif isinstance(self.gists, EmbeddingGists):
            gist = jax.eval_shape(self.gists.fresh, jax.random.key(0))
        if gist is not None:
            params = {"gist": gist}
            if self.matcher is not None:
                key, some = jax.random.key(0), jnp.zeros((1, 2, self._states))
                params["matcher"] = jax.eval_shape(self.matcher.init, key, some)["params"]
            return {"params": params | jax.eval_shape(self._beside, jax.random.key(0))}
        return jax.eval_shape(lambda b: self.init({"params": jax.random.key(0)}, b), dict(batch))

    def param_labels(self, params):
        """Groups ``queries`` (what slots look for) and ``maps`` (what becomes of it) of level 1,
        ``upper_queries`` and ``upper_maps`` of the levels above, and ``lens``; or ``heads``.
        """
        return trees.match_tree(_LABELS, params)

    def batch_specs(self, phase: str):
        """See `recipe.batch_specs`; the size of labelled contexts is known from their tables."""
        if phase == "lens" and self.config.data.label is not None:
            return (batch_spec(self.config, self.backbone.config),)
        return () if phase in ("lens", "questions") else recipe.batch_specs(self.config, phase)

    def unit_counts(self, batch: Mapping[str, Any]) -> dict[str, int]:
        """Tokens of the histories, or labelled contexts."""
        if "utility" in batch:
            return {"snapshots": len(batch["utility"])}
        if "question" in batch:
            return {"questions": len(batch["question"])}
        return {"tokens": int(np.size(batch["ids"]))}

    def loss_terms(self, variables, frozen, batch, rngs, train):
        """KL to the base that saw the raw text, behind gists of level 1 or of one above; or what a
        lens makes of labelled contexts.
        """
        if "utility" in batch:
            terms, ordered = self._lens_terms(variables["params"]["lens"], batch)
            return terms, {}, {"ordered": ordered}
        if "question" in batch:
            params, size = variables["params"]["matcher"], self.config.model.layout.block
            lost, right = matching(self.matcher, params, batch, size)
            return {"matching": lost}, {}, {"right": right}
        base, ids, gist = frozen["base"], batch["ids"], variables["params"]["gist"]
        model, params = self.config.model, variables["params"]
        lora = base_lora.deltas(model.lora, self.backbone.config, params)
        if "upper" in batch:
            # The level is in the shape: rows of a level are longer than those of the one below.
            found = self._behind_one(gist, base, ids, self._level_of(ids.shape[1]), lora)
            terms = {"upper": Mean.of(found.kl)}
        else:
            key = rngs["lod"] if train else None
            chunk = 1 if "near" in batch else self.config.data.chunk
            found, made = self._behind_all(gist, base, ids, key, chunk, lora)
            weight = self._at_boundaries(ids.shape[1], chunk)
            terms = {
                "substitute": Mean.of(found.kl, weight), "next_token": Mean.of(found.nll, weight)
            } | self._other_terms(base, ids, made, lora)  # fmt: skip
        return terms, {}, {"lost": Mean.of(found.nll - found.full_nll)}

    def _lens_scores(self, params, batch):
        """Scores of a batch of contexts, with their tilings."""
        zeros = jnp.zeros_like(batch["level"])
        tilings = Tiling(batch["level"], batch["index"], zeros, zeros, batch["count"])
        rows = jax.vmap(functools.partial(entries, self.config.model.layout))(
            tilings, batch["entry"], batch.get("words")
        )
        tail = Tail(batch["tail"], batch["tail_at"], batch["tail_mask"])
        return self.lens.apply({"params": params}, rows, tail), tilings, rows.mask

    def _lens_terms(self, params, batch):
        scores, tilings, mask = self._lens_scores(params, batch)
        layout, measured = self.config.model.layout, batch["measured"]
        worth = jax.vmap(squash)(batch["utility"], measured)  # in the unit of the scores
        adds, frees = jax.vmap(functools.partial(action_entries, layout))(tilings)
        terms = lens_losses.lens_terms(scores, worth, measured, mask, adds, frees)
        return terms, lens_losses.ordered(scores, worth, measured & mask)

    def train_data(self, phase: str, start_state: Any):
        """Rows of histories; see `recipe.train_stream` for what the phases read.

        Raises:
          ConfigError: histories that are too long for what is measured on them.
          DataError: training or evaluation text that is missing or too short: better said now than
            when training is over.
        """
        self.eval_data()
        self._measures()
        if self.config.eval.budgets:
            self.long_histories()
        if self.config.eval.stream:
            self.growing()
        if self.config.eval.documents:
            self.questions()
        if phase == "lens" and self.measured is None and self.config.data.label is not None:
            return Unmeasured(self.config, self.backbone.config)
        if phase == "lens":
            stream = (self.measured or self.lens_rows).stream(self.config)
        elif phase == "questions":
            stream = self.match_rows.stream()
        else:
            stream = recipe.train_stream(self.config, self.backbone.tokenizer, phase)
        if start_state is not None:
            stream.set_state(start_state)
        return stream

    @functools.cached_property
    def lens_rows(self) -> LensRows:
        """The labelled contexts of ``data.labels``."""
        return LensRows.of_tables(self.config, self.backbone)

    @functools.cached_property
    def match_rows(self) -> MatchRows:
        """What the base makes of the training questions and passages."""

        def progress(name: str, done: int, total: int) -> None:
            if self.notify is not None:
                self.notify(f"reading {name}: {done:,} of {total:,}")

        return MatchRows(self.config, self.backbone, progress)

    def quick_eval(self, variables, frozen) -> dict[str, float]:
        """Recovery on a few held-out histories, with own and with another history's gists; of a
        lens in training, its losses on held-out contexts.
        """
        found = self._quick_lens(variables) if self._trains_lens() else {}
        if self._trains_lens() and self.config.data.label is None:
            return found
        if self._trains_matcher():
            quick = self.config.eval.quick_rows, min(self.config.eval.question_blocks, 512)
            found |= self._questions(variables, frozen, {}, None, *quick)
            return {k: v for k, v in found.items() if isinstance(v, float)}
        rows = self.eval_data()[: self.config.eval.quick_rows]
        self.recovery.checked = Checked()
        lost = self.recovery.losses(variables["params"], frozen["base"], rows, QUICK)
        found["positions.inconsistent"] = float(self.recovery.checked.inconsistent)
        return found | self.recovery.summary(lost, intervals=False)

    def _quick_lens(self, variables) -> dict[str, float]:
        """Losses of a lens on held-out contexts, if there are any yet."""
        rows = self.measured if self.config.data.label is not None else self.lens_rows
        batch = None if rows is None else rows.held_out_batch()
        if batch is None:
            return {}
        terms, ordered = self._terms(variables["params"]["lens"], batch)
        found = {f"lens.{name}": float(term.value) for name, term in terms.items()}
        return found | {"lens.ordered": float(ordered.value)}


LENS_TERMS = ("regression", "ranking", "budget", "legality")
QUICK = ("full", "dropped", "gist", "shuffled")
