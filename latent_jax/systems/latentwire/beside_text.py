"""What the reader gets of the latents, beside what it makes of the text itself."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from latent_jax.backbones.decoder import KV
from latent_jax.systems.latentwire import diagnose
from latent_jax.systems.latentwire.api import LatentWire
from latent_jax.systems.latentwire.baselines import span_means
from latent_jax.systems.latentwire.given import prefill
from latent_jax.systems.latentwire.model import Wire, num_latents
from latent_jax.systems.latentwire.pool import spans


def beside_text(
    wire: LatentWire, z: Wire, ids: Int[Array, "b t"], mask: Bool[Array, "b t"]
) -> dict[str, float]:
    """Size and content of a deep prefix's values, or of soft tokens, against the text's own.

    Keys are left out: their large constant part is alike in everything.

    Args:
      wire: the compressor.
      z: latents of the texts.
      ids: the texts, each within one segment, right-padded.
      mask: which tokens are real.

    Returns:
      ``value_ratio`` (mean norm of the values ÷ that of the text's tokens), or for soft tokens
      ``norm_ratio`` and the rest of `diagnose.embedding_statistics` against the vocabulary; and
      ``span_mean_cosine``, to the mean of each latent's span. Nothing for the text's own entries,
      and for what is no entry of a cache.
    """
    if wire.config.encoder.slots == "heads" or wire.config.adapter.kind == "cross":
        return {}  # the text's own entries, which stand for no span; or no entries
    prefix, each = wire.latents.prefix(z), wire.config.adapter.entries
    if each > 1:  # several soft tokens stand for a span
        mean = prefix.embeds.reshape(len(ids), -1, each, prefix.embeds.shape[-1]).mean(2)
        prefix = prefix._replace(embeds=mean, mask=prefix.mask[:, ::each])
    params, ratio = wire.backbone.params, wire.config.ratio
    spans_of = num_latents(ids.shape[1], ratio)  # private latents stand for no span
    real = np.asarray(prefix.mask)[:, :spans_of]
    if prefix.kv is None:
        table = np.asarray(params["embed"], np.float32)
        shown = np.asarray(prefix.embeds, np.float32)[:, :spans_of][real]
        means = span_means(wire.backbone.decoder, params, ids, mask, ratio).embeds
        return {
            "norm_ratio": diagnose.norm_ratio(shown, table),
            **diagnose.embedding_statistics(shown, table),
            "span_mean_cosine": _cosine(shown, np.asarray(means, np.float32)[real]),
        }
    sink = None if wire.sink is None else jnp.int32(wire.sink)
    cache = prefill(wire.backbone.decoder, params, ids, mask, sink)
    cut = spans(cache, ratio)
    means = _rows(KV(cut.k, cut.v * cut.mask[None, :, :, None, None], cut.mask)).sum(1)
    means = means / np.maximum(np.asarray(cut.mask).sum(1), 1)[:, None]
    shown, text = _rows(prefix.kv)[:, :spans_of][real], _rows(cache)[np.asarray(mask)]
    return {
        "value_ratio": diagnose.norm_ratio(shown, text),
        "span_mean_cosine": _cosine(shown, means[real.reshape(-1)]),
    }


def _rows(kv: KV) -> Float[np.ndarray, "b t f"]:
    """Values of all layers, one vector per place."""
    v = np.moveaxis(np.asarray(kv.v, np.float32), 0, 2)
    return v.reshape(*v.shape[:2], -1)


def _cosine(x: Float[np.ndarray, "n f"], y: Float[np.ndarray, "n f"]) -> float:
    """Mean cosine of rows."""
    size = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    return float(((x * y).sum(-1) / np.maximum(size, 1e-12)).mean())
