"""A deep prefix as a residual onto the keys and values that soft tokens have.

A latent is first a soft token, which the frozen LLM itself turns into keys and values; what the
adapter makes of the latent for every layer is added to those, behind a gate that is closed at
first. So step 0 is what soft tokens alone would be, on the manifold that the LLM knows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from latent_jax.backbones.decoder import KV, Decoder
from latent_jax.backbones.sink import sink_kv
from latent_jax.core.errors import DataError
from latent_jax.systems.latentwire.codes import as_variables
from latent_jax.systems.latentwire.latents import Wire
from latent_jax.systems.latentwire.pool import num_latents, span_means
from latent_jax.systems.latentwire.ridge import regression


def onto(
    body: Decoder,
    frozen: Any,
    soft: Float[Array, "b m d"],
    wire: Wire,
    deep: KV,
    gate: Float[Array, " l"],
    sink: int | None,
) -> KV:
    """Keys and values of soft tokens, plus those of a deep prefix times each layer's gate.

    Args:
      body: the reader.
      frozen: its parameters.
      soft: soft tokens, at the wire's positions.
      wire: which of them are real, and where they stand.
      deep: rotated to the same positions.
      gate: of every layer.
      sink: token before them.
    """
    first = None
    if sink is not None:
        first = sink_kv(body, frozen, jnp.int32(sink), len(soft))
    own = body.apply({"params": frozen}, soft, wire.positions, wire.mask, prefix=first).kv
    gate = gate[:, None, None, None, None].astype(soft.dtype)
    return KV(own.k + gate * deep.k, own.v + gate * deep.v, wire.mask)


def fit(
    model: Any, params: Mapping[str, Any], frozen: Any, batches: Iterable[Mapping[str, Any]]
) -> dict[str, Any]:
    """Starts soft tokens where they are nearest to the mean embedding of what they stand for.

    Args:
      model: the compressor.
      params: its parameters, the wire's fitted.
      frozen: parameters of the LLM.
      batches: of training.

    Raises:
      DataError: they hold fewer than two latents.
    """
    c = model.config
    run = jax.jit(lambda p, f, i, m: model.apply(as_variables(p), f, i, m, method="compress"))
    x, y, count = [], [], 0
    for batch in batches:
        ids, mask = np.asarray(batch["context"]), np.asarray(batch["context_mask"])
        if ids.shape[1] > c.segment:
            ids, mask = ids.reshape(-1, c.segment), mask.reshape(-1, c.segment)
        ids, mask = jnp.asarray(ids), jnp.asarray(mask)
        wire, m = run(params, frozen, ids, mask), num_latents(ids.shape[1], c.ratio)
        text = jnp.asarray(frozen["embed"])[ids]
        real = np.asarray(wire.mask)[:, :m]  # private latents stand for no span
        x.append(np.asarray(wire.z, np.float32)[:, :m][real])
        y.append(np.asarray(span_means(text, mask, m, c.ratio), np.float32)[real])
        count += len(x[-1])
        if count >= 8 * c.wire.d_z:
            break
    if count < 2:
        raise DataError("the training data hold fewer than 2 latents: no soft token can be fitted")
    found = regression(np.concatenate(x), np.concatenate(y))
    soft = found["in_scale"][:, None] * found["map"] * found["out_scale"]
    mean = found["out_mean"] - found["in_mean"] @ soft
    return {**params, "soft": jnp.asarray(soft), "soft_mean": jnp.asarray(mean)}
