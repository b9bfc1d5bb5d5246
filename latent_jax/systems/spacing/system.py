"""Spacing as the shared trainer sees it: several seeds of one model, side by side."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latent_jax.core.errors import CheckpointError
from latent_jax.core.types import Mean, PyTree
from latent_jax.systems.spacing import auxiliary, losses, recipe, start
from latent_jax.systems.spacing.config import AUXILIARY, SpacingRun
from latent_jax.systems.spacing.model import SpacingModel

logger = logging.getLogger(__name__)


class SpacingSystem:
    """Predicts the next gap; implements `latent_jax.train.protocol.System`.

    Parameters and all that follows from them carry a leading axis of ``config.seeds``. What the
    kernels mean depends on distances that the training data gave: collection ``distances`` keeps
    them (``reach`` and ``heights`` of `SpacingModel`), so that a run is read as it was trained
    whatever data it meets later.
    """

    config_class = SpacingRun
    rng_names = ("sample",)
    frozen: Mapping[str, Any] = {}
    jit_init = False  # the least-squares start reads the data

    def __init__(self, config: SpacingRun):
        self.config = config
        self.gaps = recipe.load(config.data)
        window = config.data.window
        reach = self.gaps.reach(window) if config.model.embed.height else float(window - 1)
        self.model = SpacingModel(config.model, reach, self.gaps.heights, window - 1)
        weights = config.losses
        self.weights = {
            "nll": weights.nll, "last": weights.last, "entropy": weights.entropy,
            "orthogonality": weights.orthogonality, "auxiliary": weights.auxiliary,
        }  # fmt: skip
        sample = self.gaps.windows(self.gaps.spread(2048, "train"), window)["gaps"]
        found = np.asarray(auxiliary.targets(jnp.asarray(sample), jnp.asarray([window - 1])))[:, 0]
        self._statistics = (found.mean(0), np.maximum(found.std(0), 1e-6))
        self._quick = jax.jit(self._held_out_terms)

    @property
    def logical_rules(self):
        """Seeds along no axis, weights along ``embed``/``mlp``."""
        return (
            (r"(qkv|up)/kernel$", (None, "embed", "mlp")),
            (r"(out|down)/kernel$", (None, "mlp", "embed")),
            (r".*", ()),
        )

    def init(self, rngs: Mapping[str, jax.Array], batch: Mapping[str, Any]) -> dict[str, Any]:
        """Fresh parameters of every seed; kernels are fitted to the data."""
        c = self.config
        params = jax.jit(self._fresh)(rngs["params"])
        tree = params["model"]["gaps"]
        embed = c.model.embed
        if embed.kernels:
            seeds = range(c.seed, c.seed + c.seeds)
            tree |= start.embedding(self.gaps, c.data.window, self.model.reach, embed, seeds)
        return {"params": params, "distances": self._distances()}

    def init_shapes(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Shapes of what `init` returns: nothing is fitted."""
        return jax.eval_shape(
            lambda: {"params": self._fresh(jax.random.key(0)), "distances": self._distances()}
        )

    def _distances(self) -> dict[str, jax.Array]:
        return {
            "reach": jnp.asarray(self.model.reach, jnp.float32),
            "heights": jnp.asarray(self.model.heights, jnp.float32),
        }

    def model_of(self, variables: Mapping[str, Any]) -> SpacingModel:
        """The model with the distances that variables were trained with.

        Raises:
          CheckpointError: they say none: saved before runs kept them.
        """
        if "distances" not in variables:
            raise CheckpointError(
                "these variables lack the collection 'distances' (how far the kernels reach): "
                "saved by an older version, whose kernels mean something else; train the run again"
            )
        found = variables["distances"]
        return self.model.clone(reach=found["reach"], heights=tuple(found["heights"]))

    def as_trained(self, variables: Mapping[str, Any]) -> SpacingSystem:
        """This system on its data with the model of `model_of`."""
        trained = copy.copy(self)
        trained.model = self.model_of(variables)
        if trained.model.reach > 1.001 * self.model.reach:
            logger.warning(
                "kernels reach %.1f, but the %d gaps before a target span %.1f at the greatest "
                "height of this data: it is predicted from less distance than was trained on",
                *(trained.model.reach, self.config.data.window - 1, self.model.reach),
            )
        return trained

    def _fresh(self, key: jax.Array) -> PyTree:
        c = self.config
        t = c.data.window - 1

        def one(key: jax.Array) -> PyTree:
            made = self.model.init(
                {"params": key, "sample": key}, jnp.ones((1, t)), jnp.full((1,), 12.0)
            )
            params: dict[str, Any] = {"model": made["params"]}
            if self._auxiliary:
                kernel = 0.02 * jax.random.normal(key, (c.model.slot_width, len(AUXILIARY)))
                params["auxiliary"] = {"kernel": kernel, "bias": jnp.zeros(len(AUXILIARY))}
            return params

        return jax.vmap(one)(jax.random.split(key, c.seeds))

    @property
    def _auxiliary(self) -> bool:
        weight = self.config.losses.auxiliary
        return self.config.model.memory.kind != "none" and weight != 0.0

    def param_labels(self, params: PyTree) -> PyTree:
        """``kernels``, ``line`` (the linear prediction), ``memory`` (slots and their read-out),
        ``auxiliary``, ``model``."""

        def label(path: Any, _: Any) -> str:
            name = "/".join(str(getattr(p, "key", p)) for p in path)
            if "auxiliary" in name:
                return "auxiliary"
            if "kernels" in name:
                return "kernels"
            if name.endswith(("gate", "level", "spread", "offset")):
                return "line"
            return "memory" if any(n in name for n in ("slot_", "read_out", "claim_")) else "model"

        return jax.tree_util.tree_map_with_path(label, params)

    def _terms(self, variables, batch, key, train):
        """Terms summed over seeds, and each seed's own last-position NLL."""
        c, model = self.config, self.model_of(variables)
        n = c.seeds
        split = {k: batch[k].reshape(n, -1, *batch[k].shape[1:]) for k in ("gaps", "log_height")}

        def one(params, gaps, height, key):
            if train and c.clip_norm is not None:
                # The trainer divides the sum of all seeds by their number.
                params = losses.clip_gradient(params, c.clip_norm / n)
            return losses.terms(
                model, c, params, gaps, height, self._statistics, key, train
            )

        keys = jax.random.split(key, n)
        params = variables["params"]
        found, aux = jax.vmap(one)(params, split["gaps"], split["log_height"], keys)
        pooled = {k: Mean(m.sum.sum(), m.count.sum()) for k, m in found.items()}
        logged = {k: Mean(m.sum.sum(), m.count.sum()) for k, m in aux.items()}
        if n > 1:
            logged |= {
                f"nll_last.seed{i}": Mean(aux["nll_last"].sum[i], aux["nll_last"].count[i])
                for i in range(n)
            }
        return pooled, logged

    def loss_terms(self, variables, frozen, batch, rngs, train):
        """Negative log-likelihood at every scored position, and the regularisers."""
        terms, aux = self._terms(variables, batch, rngs["sample"], train)
        return terms, {}, aux

    def train_data(self, phase: str, start_state: Any):
        """Shuffled windows from every start of the training part."""
        stream = recipe.train_stream(self.config, self.gaps)
        if start_state is not None:
            stream.set_state(start_state)
        return stream

    def batch_specs(self, phase: str):
        """See `recipe.batch_specs`."""
        return recipe.batch_specs(self.config, phase)

    def unit_counts(self, batch: Mapping[str, Any]) -> dict[str, int]:
        """Windows, and gaps that are predicted."""
        rows, length = batch["gaps"].shape
        memory = self.config.model.memory
        targets = memory.cuts if memory.kind == "postfix" else length - 1
        return {"windows": rows, "targets": rows * targets}

    def eval_data(self) -> dict[str, np.ndarray]:
        """The windows of the evaluation while training, the same for every seed."""
        starts = self.gaps.spread(self.config.eval.quick)
        rows = self.gaps.windows(starts, self.config.data.window)
        return {k: np.concatenate([v] * self.config.seeds) for k, v in rows.items()}

    def _held_out_terms(self, variables, batch):
        terms, aux = self._terms(variables, batch, jax.random.key(0), train=False)
        return {k: m.value for k, m in {**terms, **aux}.items()}

    def quick_eval(self, variables, frozen) -> dict[str, float]:
        """Every term and the last-position NLL (nats) on held-out windows."""
        found = self._quick(variables, jax.tree.map(jnp.asarray, self.eval_data()))
        return {k: float(v) for k, v in found.items()}

    def evaluate(self, variables, frozen, progress=None):
        """See `latent_jax.systems.spacing.evaluate.evaluate`."""
        from latent_jax.systems.spacing.evaluate import evaluate

        told = progress or (lambda *_: None)
        return evaluate(self.as_trained(variables), variables["params"], told)

    def diagnose(self, variables, frozen, windows: int = 256) -> dict[str, Any]:
        """See `latent_jax.systems.spacing.diagnose.diagnose`."""
        from latent_jax.systems.spacing.diagnose import diagnose

        return diagnose(self.as_trained(variables), variables["params"], windows)

    @classmethod
    def compare(cls, found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """See `latent_jax.systems.spacing.comparison.compare`."""
        from latent_jax.systems.spacing.comparison import compare

        return compare(found)
