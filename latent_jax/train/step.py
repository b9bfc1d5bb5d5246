"""The one training step: value_and_grad → Σ weight(step)·mean → optimizer → collections.

There is no branch per system: what differs is behind `latent_jax.train.protocol.System`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from latent_jax.core import rng as rng_lib
from latent_jax.core import trees
from latent_jax.core.errors import ConfigError
from latent_jax.core.types import Mean, PyTree
from latent_jax.train import curriculum
from latent_jax.train.optimizers import GroupedOptimizer
from latent_jax.train.protocol import System
from latent_jax.train.state import TrainState

DEFAULT_RNGS = ("dropout", "sample")
StepFn = Callable[[TrainState, PyTree, Mapping[str, Any]], tuple[TrainState, dict[str, jax.Array]]]


def make_train_step(
    system: System,
    optimizer: GroupedOptimizer,
    *,
    seed: int,
    accumulate: int = 1,
    active: tuple[str, ...] | None = None,
    weights: Mapping[str, Any] | None = None,
    shardings: TrainState | None = None,
    metric_sharding: Any = None,
    jit: bool = True,
) -> StepFn:
    """Builds ``step(state, frozen, batch) -> (state, metrics)``.

    Args:
      system: the model and its losses.
      optimizer: grouped optimizer over the system's labels.
      seed: root of the random streams.
      accumulate: micro-batches per step; must divide the batch axis.
      active: labels trained in this phase; ``None`` = all.
      weights: term weights of this phase; ``None`` = the system's.
      shardings: output shardings of the state (needed when jitted on a mesh).
      metric_sharding: output sharding of the metrics.
      jit: jit with the state donated; False returns the pure function.

    Returns:
      The step. ``metrics`` holds float32 scalars: ``loss``, ``term.<name>`` (mean),
      ``weight.<name>``, ``share.<name>`` (part of Σ|weight·mean|), ``grad_norm``,
      ``grad_norm.<label>``, ``lr`` and ``lr.<label>``, ``skipped``, ``skipped_total``,
      ``gate.<name>``, ``rate.<name>``, the system's aux values under their own names, and
      ``count.<name>`` of every term and aux that is a `Mean` (0: nothing of it was in the batch,
      its mean says nothing).

    A non-finite loss or gradient leaves params, collections, optimizer and gates untouched; only
    ``step`` and the guard's counters move.
    """
    active = optimizer.names if active is None else active
    table = system.weights if weights is None else weights
    weights = {name: w for name, w in table.items() if w is not None}
    rng_names = tuple(getattr(system, "rng_names", DEFAULT_RNGS))
    changing = getattr(system, "rates", {})

    def forward(params: PyTree, state: TrainState, collections: Any, frozen: PyTree, batch: Any,
                micro: Any) -> tuple[dict[str, Mean], Any, dict[str, Any]]:
        rngs = rng_lib.named(seed, rng_names, state.step)
        if accumulate > 1:
            rngs = {k: jax.random.fold_in(v, micro) for k, v in rngs.items()}
        variables = {"params": params, **collections}
        now = rates_at(system, state.step)
        terms, new, aux = system.loss_terms(variables, frozen, batch, rngs, True, **now)
        return terms, {**collections, **new}, aux

    def step(state: TrainState, frozen: PyTree, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        trained, held = optimizer.split(state.params, active)
        scale = {
            name: curriculum.weight_at(w, state.gates.get(name), state.step)
            for name, w in weights.items()
        }

        def objective(part: PyTree, collections: Any, batch: Any, micro: Any, counts: Any) -> Any:
            params = trees.merge(part, held)
            terms, new, aux = forward(params, state, collections, frozen, batch, micro)
            loss = jnp.zeros((), jnp.float32)
            for name, term in weighted(terms, scale).items():
                count = term.count if counts is None else counts[name]
                count = jax.lax.stop_gradient(jnp.maximum(jnp.asarray(count, jnp.float32), 1.0))
                value = jnp.asarray(term.sum, jnp.float32) / count
                # A term that is switched off must not poison the sum with its inf or NaN.
                loss += jnp.where(scale[name] == 0, 0.0, scale[name] * value)
            return loss, (terms, new, aux)

        grad_fn = jax.value_and_grad(objective, has_aux=True)
        if accumulate == 1:
            (loss, (terms, collections, aux)), grads = grad_fn(
                trained, state.collections, batch, 0, None
            )
        else:
            loss, terms, collections, aux, grads = _accumulated(
                grad_fn, forward, state, trained, held, frozen, batch, accumulate
            )
        means = {name: term.value for name, term in terms.items()}
        observed = {**aux, **terms}
        counts = {k: v.count for k, v in observed.items() if isinstance(v, Mean)}
        aux = {k: v.value if isinstance(v, Mean) else v for k, v in aux.items()}

        params, opt_state, norms = optimizer.update(
            grads, state.opt_state, state.params, state.step, active
        )
        gates = curriculum.update_gates({**system.weights, **weights}, state.gates, observed)
        finite = jnp.isfinite(loss) & jnp.isfinite(norms["grad_norm"])

        def keep(new: PyTree, old: PyTree) -> PyTree:
            return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

        bad = 1 - finite.astype(jnp.int32)
        guard = {
            "skipped": state.guard["skipped"] + bad,
            "in_a_row": (state.guard["in_a_row"] + 1) * bad,
        }
        new_state = TrainState(
            step=state.step + 1,
            params=keep(params, state.params),
            collections=keep(collections, state.collections),
            opt_state=keep(opt_state, state.opt_state),
            gates=keep(gates, state.gates),
            guard=guard,
        )
        metrics = {
            "loss": loss,
            **{f"term.{n}": v for n, v in means.items()},
            **_shares(scale, means),
            **{f"rate.{n}": r for n, r in curriculum.values_at(changing, state.step).items()},
            **{f"gate.{n}": g["factor"] for n, g in state.gates.items() if "factor" in g},
            **norms,
            "lr": optimizer.schedule(state.step),
            **{f"lr.{n}": optimizer.lr(n, state.step) for n in active},
            "skipped": bad,
            "skipped_total": guard["skipped"],
            **aux,
            **{f"count.{n}": c for n, c in counts.items()},
        }
        return new_state, {k: jnp.asarray(v, jnp.float32) for k, v in metrics.items()}

    if not jit:
        return step
    if shardings is None:
        return jax.jit(step, donate_argnums=0)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, metric_sharding))


def rates_at(system: System, step: Any) -> dict[str, Any]:
    """What ``loss_terms`` is told beside its batch: the system's rates at a step, if it has any."""
    changing = getattr(system, "rates", {})
    return {"rates": curriculum.values_at(changing, step)} if changing else {}


def weighted(terms: Mapping[str, Mean], weights: Iterable[str]) -> dict[str, Mean]:
    """The terms that have a weight, of which the loss is made.

    Raises:
      ConfigError: there is none.
    """
    names = set(weights)
    used = {name: term for name, term in terms.items() if name in names}
    if not used:
        raise ConfigError(
            f"none of the loss terms ({', '.join(sorted(terms))}) has a weight; "
            f"weights: {', '.join(sorted(names)) or 'none'}"
        )
    return used


def _accumulated(
    grad_fn: Any, forward: Any, state: TrainState, trained: PyTree, held: PyTree, frozen: PyTree,
    batch: Any, n: int,
) -> Any:
    """Sums gradients over micro-batches so that the result equals the whole batch's.

    A first pass finds each term's count over the whole batch (XLA drops everything else in it);
    the second divides each micro-batch's sum by that, so ragged masks do not bias the mean.
    """
    # Rows i, i+n, i+2n, …: the batch axis stays sharded as it was, no data moves.
    split = jax.tree.map(
        lambda x: jnp.swapaxes(x.reshape(x.shape[0] // n, n, *x.shape[1:]), 0, 1), batch
    )
    index = jnp.arange(n)

    def count(_: None, item: Any) -> Any:
        micro, i = item
        params = trees.merge(trained, held)
        terms, _, _ = forward(params, state, state.collections, frozen, micro, i)
        return None, {k: jnp.asarray(t.count, jnp.float32) for k, t in terms.items()}

    _, stacked = jax.lax.scan(count, None, (split, index))
    counts = jax.tree.map(lambda c: c.sum(0), stacked)

    def body(carry: Any, item: Any) -> Any:
        grads, loss, collections = carry
        micro, i = item
        (part, (terms, collections, aux)), g = grad_fn(trained, collections, micro, i, counts)
        return (jax.tree.map(jnp.add, grads, g), loss + part, collections), (terms, aux)

    start = (jax.tree.map(jnp.zeros_like, trained), jnp.zeros((), jnp.float32), state.collections)
    (grads, loss, collections), (terms, aux) = jax.lax.scan(body, start, (split, index))
    is_mean = lambda x: isinstance(x, Mean)  # noqa: E731
    terms = jax.tree.map(lambda t: Mean(t.sum.sum(0), t.count.sum(0)), terms, is_leaf=is_mean)
    aux = {
        k: Mean(v.sum.sum(0), v.count.sum(0)) if is_mean(v) else jnp.mean(v, 0)
        for k, v in aux.items()
    }
    return loss, terms, collections, aux, grads


def _shares(scale: Mapping[str, Any], means: Mapping[str, Any]) -> dict[str, Any]:
    """Each term's weight and its part of the absolute weighted sum."""
    parts = {n: jnp.abs(scale[n] * means[n]) for n in means if n in scale}
    total = jnp.maximum(sum(parts.values()), 1e-12)
    return {
        **{f"weight.{n}": scale[n] for n in parts},
        **{f"share.{n}": p / total for n, p in parts.items()},
    }


def drop_empty(row: Mapping[str, float]) -> dict[str, float]:
    """Drops the counts from a row of metrics, and the means of what was not in the batch."""
    empty = {k[6:] for k, v in row.items() if k.startswith("count.") and v == 0}
    gone = empty | {f"{part}.{name}" for name in empty for part in ("term", "share")}
    return {k: v for k, v in row.items() if k not in gone and not k.startswith("count.")}
