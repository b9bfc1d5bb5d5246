"""Optimizers with one group per label, driven by ``state.step``.

Each group's optax state covers only its own leaves (``None`` elsewhere), so frozen leaves have
neither moments nor weight decay. The learning rate is applied here from ``state.step`` and not by
an optax schedule, which would count updates instead.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from latent_jax.core import trees
from latent_jax.core.errors import ConfigError
from latent_jax.core.types import PyTree
from latent_jax.train.config import GroupConfig, OptimizerConfig
from latent_jax.train.curriculum import ScheduleConfig, ScheduleFn, make_schedule

FROZEN = "frozen"


def learning_rate(cfg: OptimizerConfig, total_steps: int) -> ScheduleFn:
    """The base learning rate as a function of ``state.step``.

    Warm-up is linear and reaches the peak at step ``warmup_steps`` (the first step already moves:
    ``lr(s) = peak·(s+1)/(warmup+1)``); the decay ends at ``total_steps``.
    """
    if isinstance(cfg.lr, ScheduleConfig):
        return make_schedule(cfg.lr)
    peak, floor = float(cfg.lr), float(cfg.lr) * cfg.final_scale
    span = max(total_steps - cfg.warmup_steps, 1)

    def fn(step: Int[Array, ""]) -> Float[Array, ""]:
        s = jnp.asarray(step, jnp.float32)
        t = jnp.clip((s - cfg.warmup_steps) / span, 0.0, 1.0)
        if cfg.decay == "cosine":
            lr = floor + (peak - floor) * 0.5 * (1.0 + jnp.cos(jnp.pi * t))
        elif cfg.decay == "linear":
            lr = peak + (floor - peak) * t
        else:
            lr = jnp.asarray(peak, jnp.float32)
        warm = jnp.minimum((s + 1.0) / (cfg.warmup_steps + 1.0), 1.0)
        return lr * warm

    return fn


def _rule(kind: str, cfg: OptimizerConfig) -> optax.GradientTransformation:
    if kind == "adamw":
        return optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps, mu_dtype=jnp.float32)
    if kind == "lion":
        return optax.scale_by_lion(cfg.b1, cfg.b2, mu_dtype=jnp.float32)
    if kind == "sgd":
        return optax.trace(cfg.b1) if cfg.b1 else optax.identity()
    if kind == "adafactor":
        return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    raise ConfigError(
        f"train.optimizer kind {kind!r} is unknown; allowed: adamw, lion, sgd, adafactor"
    )


@dataclasses.dataclass(frozen=True)
class GroupedOptimizer:
    """One optax transformation per label over a tree of labels.

    Attributes:
      labels: tree of str with the structure of ``params``.
      names: the trained labels, sorted.
      schedule: base learning rate.
    """

    config: OptimizerConfig
    labels: PyTree
    names: tuple[str, ...]
    schedule: ScheduleFn

    @classmethod
    def create(cls, cfg: OptimizerConfig, labels: PyTree, total_steps: int) -> GroupedOptimizer:
        """Builds the optimizer.

        Raises:
          ConfigError: if a group of the config has no such label, or nothing is trained.
        """
        found = sorted(set(jax.tree.leaves(labels)) - {FROZEN})
        if not found:
            raise ConfigError("every parameter is labelled 'frozen': there is nothing to train")
        for name in cfg.groups:
            if name not in found:
                raise ConfigError(
                    f"train.optimizer.groups.{name}: no such label; there are: {', '.join(found)}"
                )
        return cls(cfg, labels, tuple(found), learning_rate(cfg, total_steps))

    def group(self, label: str) -> GroupConfig:
        return self.config.groups.get(label, GroupConfig())

    def select(self, tree: PyTree, labels: Collection[str]) -> PyTree:
        """Keeps the leaves with one of ``labels``, ``None`` elsewhere."""
        return jax.tree.map(lambda lab, x: x if lab in labels else None, self.labels, tree)

    def split(self, params: PyTree, labels: Collection[str]) -> tuple[PyTree, PyTree]:
        """Partitions params into (leaves with one of ``labels``, the others)."""
        others = {FROZEN, *self.names} - set(labels)
        return self.select(params, labels), self.select(params, others)

    def init(self, params: PyTree) -> dict[str, Any]:
        """Returns ``{label: optax state}``."""
        return {n: self._transform(n).init(self.select(params, (n,))) for n in self.names}

    def lr(self, label: str, step: Int[Array, ""]) -> Float[Array, ""]:
        return self.schedule(step) * self.group(label).lr_scale

    def update(
        self, grads: PyTree, opt_state: dict[str, Any], params: PyTree, step: Int[Array, ""],
        active: Collection[str],
    ) -> tuple[PyTree, dict[str, Any], dict[str, Float[Array, ""]]]:
        """One update of the active groups.

        Args:
          grads: gradients of the active leaves, ``None`` elsewhere.
          opt_state: state of all groups; inactive groups keep theirs.
          params: all parameters.
          step: ``state.step``.
          active: labels that are trained now.

        Returns:
          New params, new optimizer state, and norms: ``grad_norm`` (global, before clipping) and
          ``grad_norm.<label>``.
        """
        total = optax.global_norm(grads).astype(jnp.float32)
        norms = {"grad_norm": total}
        for name in active:
            part = jax.tree.map(
                lambda lab, g, n=name: g if lab == n else None, self.labels, grads
            )
            norms[f"grad_norm.{name}"] = optax.global_norm(part).astype(jnp.float32)
        if self.config.clip_norm is not None:
            scale = jnp.minimum(1.0, self.config.clip_norm / jnp.maximum(total, 1e-12))
            grads = jax.tree.map(lambda g: (g * scale).astype(g.dtype), grads)
        new_state = dict(opt_state)
        new_params = params
        for name in active:
            part = jax.tree.map(
                lambda lab, g, n=name: g if lab == n else None, self.labels, grads
            )
            old = self.select(params, (name,))
            direction, new_state[name] = self._transform(name).update(part, opt_state[name], old)
            rate = -self.lr(name, step)
            moved = jax.tree.map(lambda p, d, r=rate: (p + r * d).astype(p.dtype), old, direction)
            _, rest = self.split(new_params, (name,))
            new_params = trees.merge(moved, rest)
        return new_params, new_state, norms

    def _transform(self, label: str) -> optax.GradientTransformation:
        group = self.group(label)
        rule = _rule(group.kind or self.config.kind, self.config)
        decay = self.config.weight_decay if group.weight_decay is None else group.weight_decay
        if not decay:
            return rule
        pattern = re.compile(self.config.no_decay)

        def mask(params: PyTree) -> PyTree:
            return trees.map_with_path(lambda path, _: pattern.search(path) is None, params)

        return optax.chain(rule, optax.add_decayed_weights(decay, mask=mask))
