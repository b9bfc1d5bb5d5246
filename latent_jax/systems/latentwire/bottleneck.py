"""Fitting the wire's bottleneck to what the encoder actually emits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from latent_jax.backbones.decoder import Decoder, inverse_frequencies
from latent_jax.core.errors import CheckpointError, DataError
from latent_jax.systems.latentwire.given import prefill
from latent_jax.systems.latentwire.model import Compressor, flatten_kv, num_latents
from latent_jax.systems.latentwire.pool import span_means
from latent_jax.systems.latentwire.ridge import regression

#: Standard deviations of a number at which its rounding (behind a tanh) is a third of the range.
LEVELS_AT = 1.5


def principal_map(x: np.ndarray, width: int) -> dict[str, np.ndarray]:
    """PCA of standardised rows as a pair of linear maps.

    With ``n`` rows at most ``n - 1`` directions are determined; further ones are random
    orthogonal directions, so that the map is an isometry onto its range and training can use
    them.

    Args:
      x: ``[n, features]`` encoder outputs.
      width: ``d_z``.

    Returns:
      ``in_mean, in_scale`` ``[features]``, ``down`` ``[features, width]`` and ``up`` ``[width,
      features]`` with orthonormal columns and rows, ``out_scale, out_mean`` ``[features]``
      undoing the standardisation.
    """
    mean, std = x.mean(0), x.std(0) + 1e-6
    y = (x - mean) / std
    _, _, vt = np.linalg.svd(y, full_matrices=False)
    basis = vt[: min(width, len(x) - 1)]
    missing = width - len(basis)
    if missing > 0:
        rng = np.random.default_rng(0)
        extra = rng.standard_normal((missing, x.shape[1]))
        extra -= (extra @ basis.T) @ basis
        q, _ = np.linalg.qr(extra.T)
        basis = np.concatenate([basis, q.T])
    return {
        "in_mean": mean, "in_scale": 1 / std, "down": basis.T,
        "up": basis, "out_mean": mean, "out_scale": std,
    }  # fmt: skip


def fit(model: Compressor, params: Mapping[str, Any], reader, batches, rows: int | None = None):
    """Starts ``down`` and ``up`` as principal directions of the encoder's output.

    Only where encoder and reader speak of the same space (kv to kv, hidden to soft); otherwise
    the random start stays (that of ``up`` alone behind an ``encoder.backbone``). Of several soft
    tokens per latent each starts as all would. ``wire.fit=vocabulary`` takes the directions of the
    LLM's input embeddings instead. Where only the LLM's first layers encode, ``up`` is a
    regression: from their latents to the mean keys and values of each span in all layers.
    """
    config = model.config
    foreign = (config.encoder.output == "kv") != (config.adapter.kind == "kv")
    # Of states of a separate encoder only the way in is known.
    apart = model.separate is not None and config.encoder.slots == "states"
    foreign = foreign and not apart and config.adapter.linear  # the others have no way back
    if foreign or config.wire.fit == "random":
        return dict(params)
    if config.wire.fit == "vocabulary":
        found = [np.asarray(reader["embed"], np.float32)]
        return _started(config, params, principal_map(found[0], config.wire.d_z), found)
    rows = rows or 2 * config.wire.d_z
    run = jax.jit(lambda p, r, i, m: model.apply({"params": p}, r, i, m, method="encoder_output"))
    found, whole, count = [], [], 0
    segment = config.segment
    deeper = config.encoder.layers > 0 and config.encoder.output == "kv" and "up" in params
    for batch in batches:
        ids, mask = np.asarray(batch["context"]), np.asarray(batch["context_mask"])
        if ids.shape[1] > segment:
            ids, mask = ids.reshape(-1, segment), mask.reshape(-1, segment)
        raw, valid = run(params, reader, jnp.asarray(ids), jnp.asarray(mask))
        found.append(np.asarray(raw, np.float32)[np.asarray(valid)])
        if deeper:  # private latents stand for no span
            own = np.asarray(_of_spans(model, reader, jnp.asarray(ids), jnp.asarray(mask)))
            real = np.asarray(valid)[:, : own.shape[1]]
            found[-1] = np.asarray(raw, np.float32)[:, : own.shape[1]][real]
            whole.append(own.astype(np.float32)[real])
        count += len(found[-1])
        if count >= rows:
            break
    if count < 2:
        raise DataError("the training data holds fewer than 2 latents: no bottleneck can be fitted")
    fitted = principal_map(np.concatenate(found), config.wire.d_z)
    if deeper:
        fitted |= _deeper(fitted, np.concatenate(found), np.concatenate(whole))
    if apart:
        fitted = {name: fitted[name] for name in ("in_mean", "in_scale", "down")}
    return _started(config, params, fitted, found)


def _of_spans(
    model: Compressor, frozen: Any, ids: Int[Array, "b t"], mask: Bool[Array, "b t"]
) -> Float[Array, "b m f"]:
    """Mean keys (before rotation) and values of each span, in all layers of the LLM."""
    sink = None if model.sink is None else jnp.int32(model.sink)
    kv = prefill(Decoder(model.reader), frozen, ids, mask, sink)
    where = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    flat = flatten_kv(kv, jnp.asarray(inverse_frequencies(model.reader)), where)
    ratio = model.config.ratio
    return span_means(flat, mask, num_latents(ids.shape[1], ratio), ratio)


def _deeper(
    fitted: Mapping[str, np.ndarray], raw: Float[np.ndarray, "n f"], whole: Float[np.ndarray, "n e"]
) -> dict[str, np.ndarray]:
    """The way back from latents of the first layers to what all layers have."""
    z = ((raw - fitted["in_mean"]) * fitted["in_scale"]) @ fitted["down"]
    back = regression(z, whole)
    up = back["in_scale"][:, None] * back["map"]
    mean = back["out_mean"] - back["in_mean"] @ up * back["out_scale"]
    return {"up": up, "out_mean": mean, "out_scale": back["out_scale"]}


def _started(config, params, fitted, found) -> dict[str, Any]:
    """Parameters with the fitted maps, and the size of each number that is to be rounded."""
    if config.wire.levels:
        rows = (np.concatenate(found) - fitted["in_mean"]) * fitted["in_scale"]
        fitted["level_scale"] = LEVELS_AT * (rows @ fitted["down"]).std(0) + 1e-6
    if (n := config.adapter.entries) > 1 and "up" in fitted:
        for name in ("up", "out_mean", "out_scale"):
            fitted[name] = np.tile(fitted[name], n)
    own = {k: jnp.asarray(v, params[k].dtype) for k, v in fitted.items() if k in params}
    return {**params, **own}


def adopt(params: Mapping[str, Any], start: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Takes over every part that ``start`` has; parts it lacks stay fresh.

    Raises:
      CheckpointError: a part exists in both with different shapes.
    """
    out = dict(params)
    for key, value in start.items():
        if key not in params:
            raise CheckpointError(
                f"model.start={name}: its part {key!r} is not in this configuration"
            )
        ours = jax.tree.map(jnp.shape, params[key])
        theirs = jax.tree.map(jnp.shape, value)
        if ours != theirs:
            raise CheckpointError(
                f"model.start={name}: part {key!r} has shapes {theirs}, this configuration {ours}"
            )
        out[key] = jax.tree.map(lambda a, b: jnp.asarray(b, a.dtype), params[key], value)
    return out
