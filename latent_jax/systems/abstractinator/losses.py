"""Loss terms of each kind of phase; all in nats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from latent_jax.core.types import Mean
from latent_jax.systems.abstractinator import segment
from latent_jax.systems.abstractinator.model import Abstractinator, Rows
from latent_jax.systems.abstractinator.tokenizer import EOP

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


def next_rows(
    model: Abstractinator, variables: Mapping[str, Any], out: Rows
) -> tuple[Float[Array, "b s n k"], Float[Array, "b s n"], Bool[Array, "b s n"]]:
    """Digits given earlier rows: logits, nats, and which are counted (quantised and there)."""
    logits = model.apply(variables, out.rows, out.there, out.digits, method="predict")
    return logits, _nll(logits, jnp.maximum(out.digits, 0)), out.digits >= 0


def level(
    model: Abstractinator, variables: Mapping[str, Any], ids: Array, out: Rows
) -> tuple[dict[str, Mean], dict[str, Any]]:
    """Terms that train a level."""
    nll, counted, is_byte, right = reconstruction(model, variables, ids, out)
    q = out.quantised
    terms = {"reconstruct": Mean.of(nll, counted), "commit": q.losses["commitment"]}
    if "entropy" in q.losses:
        terms["entropy"] = q.losses["entropy"]
    found = out.found
    counts = found.overflow.sum() + found.length.sum()
    aux: dict[str, Any] = {
        "byte_accuracy": Mean.of(right, is_byte),
        "overflow": Mean(found.overflow.sum().astype(jnp.float32), counts.astype(jnp.float32)),
        "bytes_per_row": Mean.of(found.length, found.rows),
        "quantisation_error": q.metrics["quantisation_error"],
    }
    aux |= {
        f"stage{i}.entropy_ratio": q.metrics["entropy_ratio"][i] for i in range(q.indices.shape[-1])
    }
    return terms, aux


def top(
    model: Abstractinator, variables: Mapping[str, Any], out: Rows
) -> tuple[dict[str, Mean], dict[str, Any]]:
    """Terms that train the row model."""
    logits, nll, counted = next_rows(model, variables, out)
    right = jnp.argmax(logits, -1) == out.digits
    aux = {
        f"top.stage{i}.accuracy": Mean.of(right[..., i], counted[..., i])
        for i in range(nll.shape[-1])
    }
    return {"top": Mean.of(nll, counted)}, aux


def _bytes(
    method: str, model: Abstractinator, variables: Mapping[str, Any], ids: Array, valid: Array
) -> Mean:
    logits = model.apply(variables, ids, valid, method=method)
    return Mean.of(_nll(logits, jnp.where(valid, ids, 0)), valid)


def byte_lm(
    model: Abstractinator, variables: Mapping[str, Any], ids: Array, valid: Array
) -> dict[str, Mean]:
    """The term that trains the peer."""
    return {"byte_lm": _bytes("peer", model, variables, ids, valid)}


def entropy_model(
    model: Abstractinator, variables: Mapping[str, Any], ids: Array, valid: Array
) -> dict[str, Mean]:
    """The term that trains the model whose uncertainty cuts segments."""
    return {"entropy_model": _bytes("foresee", model, variables, ids, valid)}
