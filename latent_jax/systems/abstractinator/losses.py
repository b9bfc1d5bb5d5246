"""Loss terms of each kind of phase; all in nats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from latent_jax.core.types import Mean
from latent_jax.systems.abstractinator import router, segment
from latent_jax.systems.abstractinator.config import AbstractRun, SegmentConfig, part
from latent_jax.systems.abstractinator.model import Abstractinator, Lookback, Rows
from latent_jax.systems.abstractinator.tokenizer import EOP

# Of the codes of each stage, watched while they train; `vq_outputs.metrics` says what they are.
_HEALTH = ("perplexity", "entropy_ratio", "dead", "stale", "resets")

_nll = optax.softmax_cross_entropy_with_integer_labels


def reconstruction(
    model: Abstractinator, variables: Mapping[str, Any], ids: Int[Array, "b t"], out: Rows,
    rows: Float[Array, "b s d"] | None = None,
) -> tuple[Float[Array, "b s l"], Bool[Array, "b s l"], Bool[Array, "b s l"], Bool[Array, "b s l"]]:
    """Bytes given rows.

    Args:
      model: the module.
      variables: its variables.
      ids: byte ids.
      out: the compressed windows.
      rows: other rows to read instead of ``out``'s.

    Returns:
      Nats of every place, which are counted, which of these are bytes (the others end segments),
      and which are predicted right.
    """
    said, counted, is_byte = segment.targets(ids, out.found, model.config.segments.most, EOP)
    rows = out.rows if rows is None else rows
    logits = model.apply(variables, rows, out.there, said, method="expand")
    return _nll(logits, said), counted, is_byte, jnp.argmax(logits, -1) == said


class NextRows(NamedTuple):
    """What the row model says of each row.

    Attributes:
      logits: of its digits.
      nats: of its digits.
      known: which are counted: quantised and there.
      row: the row itself, where the head predicts one.
    """

    logits: Float[Array, "b s n k"]
    nats: Float[Array, "b s n"]
    known: Bool[Array, "b s n"]
    row: Float[Array, "b s d"] | None


def next_rows(model: Abstractinator, variables: Mapping[str, Any], out: Rows) -> NextRows:
    """Rows given earlier rows."""
    logits, row = model.apply(variables, out.rows, out.there, out.digits, method="predict")
    return NextRows(logits, _nll(logits, jnp.maximum(out.digits, 0)), out.digits >= 0, row)


def values(
    model: Abstractinator, variables: Mapping[str, Any], out: Rows, row: Float[Array, "b s d"]
) -> tuple[dict[str, Mean], dict[str, Mean]]:
    """Terms and figures of predicted rows.

    Returns:
      terms: ``top_mse`` to the next quantised row, which is a constant, and ``top_vq`` to the
        codes of the prediction itself; where it has a weight ``top_mse_post``, of the prediction
        once quantised, with the gradient passed straight through; mean squares per number.
      aux: ``top.mse_post`` of the prediction once quantised; ``top.mse_mean`` of a prediction that
        is always the batch's mean; ``top.margin``, by how much the first stage's nearest wrong code
        is farther than the right one, squared, per number: positive where that stage is right.
    """
    target = jax.lax.stop_gradient(out.rows)
    there = out.digits[..., 0] >= 0
    each = there[..., None]
    own = model.apply(variables, row, there, method="requantise")
    terms = {
        "top_mse": Mean.of((row - target) ** 2, each),
        "top_vq": own.losses["commitment"],
    }
    if _weighted(model.config, "top_mse_post"):
        terms["top_mse_post"] = Mean.of((own.quantized - target) ** 2, each)
    row, post = jax.lax.stop_gradient((row, own.quantized))
    mean = jnp.where(each, target, 0).sum((0, 1)) / jnp.maximum(there.sum(), 1)
    first = model.apply(variables, -1, method="codes")[0]
    distance = (jnp.sum(first**2, -1) - 2 * row @ first.T) / row.shape[-1]
    right = jnp.arange(len(first)) == out.digits[..., :1]
    margin = jnp.min(jnp.where(right, jnp.inf, distance), -1)
    margin = margin - jnp.sum(jnp.where(right, distance, 0.0), -1)
    aux = {
        "top.mse_post": Mean.of((post - target) ** 2, each),
        "top.mse_mean": Mean.of((mean - target) ** 2, each),
        "top.margin": Mean.of(margin, there),
    }
    return terms, aux


def _weighted(config: AbstractRun, term: str) -> bool:
    phases = config.train.phases
    return getattr(config.losses, term) != 0.0 or any(term in phase.weights for phase in phases)


def digit_logits(
    model: Abstractinator, variables: Mapping[str, Any], out: Rows, below: Rows, level: int,
    rows: Float[Array, "b s d"] | None = None,
) -> tuple[Float[Array, "b s l n k"], Int[Array, "b s l n"], Bool[Array, "b s l"]]:
    """Logits of the digits of the rows below ``level``, these digits, and which rows there are."""
    said, there = segment.grid(below.digits, out.found, model.config.longest(level))
    rows = out.rows if rows is None else rows
    return model.apply(variables, rows, out.there, said, level, method="expand"), said, there


def rows_below(
    model: Abstractinator, variables: Mapping[str, Any], out: Rows, below: Rows, level: int,
    rows: Float[Array, "b s d"] | None = None,
) -> tuple[Float[Array, "b s l n"], Bool[Array, "b s l n"], Bool[Array, "b s l n"]]:
    """Digits of the rows below ``level`` given those of it.

    Args:
      model: the module.
      variables: its variables.
      out: rows of the level.
      below: rows of the level below.
      level: which.
      rows: other rows to read instead of ``out``'s.

    Returns:
      Nats of every digit, which are counted (of rows that are there and quantised), and which are
      predicted right.
    """
    logits, said, there = digit_logits(model, variables, out, below, level, rows)
    nll = _nll(logits, jnp.maximum(said, 0))
    return nll, there[..., None] & (said >= 0), jnp.argmax(logits, -1) == said


def _quantiser(out: Rows, level: int) -> tuple[dict[str, Mean], dict[str, Any]]:
    q = out.quantised
    terms = {part("commit", level): q.losses["commitment"]}
    if "entropy" in q.losses:
        terms[part("entropy", level)] = q.losses["entropy"]
    aux = {
        f"rvq.level{level}.stage{i}.{name}": q.metrics[name][i]
        for name in _HEALTH
        for i in range(q.indices.shape[-1])
    }
    return terms, {**aux, f"rvq.level{level}.quantisation_error": q.metrics["quantisation_error"]}


def level(
    model: Abstractinator, variables: Mapping[str, Any], ids: Array, valid: Array, out: Rows,
    read: Lookback | None = None,
) -> tuple[dict[str, Mean], dict[str, Any]]:
    """Terms that train the level over bytes.

    Args:
      model: the module.
      variables: its variables.
      ids: byte ids.
      valid: which are bytes.
      out: the compressed windows.
      read: what the expander reads instead; only segments of ``clean`` rows are then scored.
    """
    rows = None if read is None else read.rows
    nll, counted, is_byte, right = reconstruction(model, variables, ids, out, rows)
    if read is not None:
        counted, is_byte = (mask & read.clean[..., None] for mask in (counted, is_byte))
    terms, aux = _quantiser(out, 0)
    c = model.config.segments
    if c.rule == "learned":
        terms["ratio"] = ratio(c, ids, valid, out.scores)
    found = out.found
    counts = found.overflow.sum() + found.length.sum()
    aux |= {
        "byte_accuracy": Mean.of(right, is_byte),
        "overflow": Mean(found.overflow.sum().astype(jnp.float32), counts.astype(jnp.float32)),
        "bytes_per_row": Mean.of(found.length, found.rows),
    }
    return {"reconstruct": Mean.of(nll, counted), **terms}, aux


def ratio(
    config: SegmentConfig, ids: Int[Array, "b t"], valid: Bool[Array, "b t"],
    p: Float[Array, "b t"],
) -> Mean:
    """`router.ratio_loss` of all starts: the router's, of full segments, and beyond the budget."""
    marked = segment.surprising(p, None, config.cut)
    starts = segment.starts(ids, config.rule, config.most, marked)
    return router.ratio_loss(p, valid, starts, config.bytes_per_segment)


def level_above(
    model: Abstractinator, variables: Mapping[str, Any], out: Rows, below: Rows, level: int,
    read: Lookback | None = None,
) -> tuple[dict[str, Mean], dict[str, Any]]:
    """Terms that train a level over rows; for ``read`` see `level`."""
    rows = None if read is None else read.rows
    nll, counted, right = rows_below(model, variables, out, below, level, rows)
    if read is not None:
        counted = counted & read.clean[..., None, None]
    terms, aux = _quantiser(out, level)
    aux[f"level{level}.digit_accuracy"] = Mean.of(right, counted)
    return {part("digits", level): Mean.of(nll, counted), **terms}, aux


def top(
    model: Abstractinator, variables: Mapping[str, Any], out: Rows
) -> tuple[dict[str, Mean], dict[str, Any]]:
    """Terms that train the row model."""
    said = next_rows(model, variables, out)
    right = jnp.argmax(said.logits, -1) == out.digits
    aux = {
        f"top.stage{i}.accuracy": Mean.of(right[..., i], said.known[..., i])
        for i in range(right.shape[-1])
    }
    terms = {"top": Mean.of(said.nats, said.known)}
    if said.row is not None:
        more, seen = values(model, variables, out, said.row)
        terms, aux = terms | more, aux | seen
    return terms, aux


def _byte_nats(logits: Array, ids: Array, valid: Array) -> Mean:
    return Mean.of(_nll(logits, jnp.where(valid, ids, 0)), valid)


def peer_nats(
    model: Abstractinator, variables: Mapping[str, Any], ids: Array, valid: Array, name: str
) -> Float[Array, "b t"]:
    """Nats of each byte under a peer; those of padding mean nothing."""
    logits = model.apply(variables, ids, valid, name, method="peer")
    return _nll(logits, jnp.where(valid, ids, 0))


def byte_lm(
    model: Abstractinator, variables: Mapping[str, Any], ids: Array, valid: Array,
    name: str = "byte_lm",
) -> dict[str, Mean]:
    """The term that trains a peer."""
    return {name: Mean.of(peer_nats(model, variables, ids, valid, name), valid)}


def entropy_model(
    model: Abstractinator, variables: Mapping[str, Any], ids: Array, valid: Array
) -> dict[str, Mean]:
    """The terms that train the model whose uncertainty cuts segments, one per head."""
    found = model.apply(variables, ids, valid, method="foresee")
    terms = {}
    if found.logits is not None:
        terms["entropy_model"] = _byte_nats(found.logits, ids, valid)
    if found.gaussian is not None:
        terms["entropy_gaussian"] = Mean.of(found.gaussian.nats(), valid)
    return terms
