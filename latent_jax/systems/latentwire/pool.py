"""Slots as learned linear combinations of the keys and values of their own tokens."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from latent_jax.backbones.config import DecoderConfig
from latent_jax.backbones.decoder import KV, inverse_frequencies
from latent_jax.ops import rope

ArrayT = TypeVar("ArrayT", np.ndarray, Array)


def num_latents(tokens: int, ratio: float) -> int:
    """``ceil(tokens / ratio)``, robust to float error (12 / 1.2 is 10, not 11)."""
    return math.ceil(tokens / ratio - 1e-9)


def real_slots(lengths: Int[ArrayT, "*b"], tokens: int, ratio: float) -> Bool[ArrayT, "*b m"]:
    """Which slots of texts padded to ``tokens`` are real: each text's first ``num_latents``.

    Lengths are compared with whole numbers, worked out beforehand: in fp32 ``slot * ratio`` may
    fall below a length that it reaches.

    Args:
      lengths: NumPy's or JAX's, at most ``tokens``.

    Example:
      >>> real_slots(np.array([0, 3, 4]), 4, 1.5).sum(-1).tolist()
      [0, 2, 3]
    """
    counts = [num_latents(n, ratio) for n in range(tokens + 1)]
    shortest = np.searchsorted(counts, np.arange(counts[-1]), side="right")
    return lengths[..., None] >= shortest


def span_edges(slots: int, ratio: float) -> Int[np.ndarray, " m1"]:
    """The first token of each slot's span, and one behind the last slot's."""
    return np.ceil(np.arange(slots + 1) * ratio - 1e-9).astype(int)


def span_of(tokens: int, ratio: float) -> Int[np.ndarray, " t"]:
    """The slot whose span each token is in, as `span_index` has it."""
    edges = span_edges(num_latents(tokens, ratio), ratio)
    return np.searchsorted(edges, np.arange(tokens), side="right") - 1


def span_index(tokens: int, ratio: float) -> tuple[Int[np.ndarray, "m n"], Bool[np.ndarray, "m n"]]:
    """The tokens of each slot's span in ``n = ceil(ratio)`` places, and which places hold one.

    Slot ``j`` covers tokens ``ceil(j ratio) .. ceil((j + 1) ratio) - 1``.

    Example:
      >>> span_index(5, 2.5)[0].tolist(), span_index(5, 2.5)[1].tolist()
      ([[0, 1, 2], [3, 4, 4]], [[True, True, True], [True, True, False]])
    """
    slots = num_latents(tokens, ratio)
    edge = span_edges(slots, ratio)
    index = edge[:-1, None] + np.arange(math.ceil(ratio - 1e-9))
    real = index < np.minimum(edge[1:, None], tokens)
    return np.minimum(index, tokens - 1), real


def spans(kv: KV, ratio: float) -> KV:
    """A cache cut into spans, one row each: ``[l b t g d]`` → ``[l b*m n g d]``."""
    layers, b, t, heads, width = kv.k.shape
    index, real = span_index(t, ratio)
    (m, n), flat = index.shape, index.reshape(-1)
    shape = (layers, b * m, n, heads, width)
    mask = (kv.mask[:, flat] & real.reshape(-1)).reshape(b * m, n)
    return KV(kv.k[:, :, flat].reshape(shape), kv.v[:, :, flat].reshape(shape), mask)


def span_means(
    text: Float[Array, "b t d"], mask: Bool[Array, "b t"], slots: int, ratio: float
) -> Float[Array, "b m d"]:
    """The mean of each slot's span over its real tokens; 0 where there are none."""
    span = span_of(text.shape[1], ratio)
    weight = (span[None, :] == jnp.arange(slots)[:, None])[None] & mask[:, None, :]
    weight = weight / jnp.maximum(weight.sum(-1, keepdims=True), 1)
    return jnp.einsum("bmt,btd->bmd", weight, text)


class KVPool(nn.Module):
    """Per-layer maps from the keys and values of a slot's tokens to the slot's own.

    In layer ``l`` slot ``j`` gets ``sum_i k[l, token i of span j] @ W_k[l, i]`` and the same with
    values. Keys are taken and given in the frame of the slot's position, so that one set of maps
    serves every span. Nothing deeper than one matrix product lies between loss and maps, so
    they learn several times faster than slots that have to run through the LLM's layers.

    Attributes:
      reader: architecture of the frozen LLM.
      ratio: tokens per slot.
      start: ``mean`` or ``stagger``.
    """

    reader: DecoderConfig
    ratio: float
    start: str = "mean"

    @nn.compact
    def __call__(self, text: KV, valid: Bool[Array, "b m"], positions: Int[Array, "b m"]) -> KV:
        """Pools the cache of texts.

        Args:
          text: keys (rotated) and values of the text, ``[l b t g d]``.
          valid: which slots are real.
          positions: of the slots.
        """
        (b, m), inv_freq = valid.shape, inverse_frequencies(self.reader)
        cut = spans(text, self.ratio)
        layers, _, n, heads, width = cut.k.shape
        size = heads * width
        real = cut.mask[None, :, :, None, None]
        places = jnp.repeat(positions.reshape(-1, 1), n, axis=1)

        def init(key: Any, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
            share = jnp.full((layers, n, heads), 1 / n, dtype)
            if self.start == "stagger":
                kept = (jnp.arange(layers)[:, None] + jnp.arange(heads)) % n
                share = jax.nn.one_hot(kept, n, axis=1, dtype=dtype)
            return jnp.repeat(share, width, axis=-1)[..., None, :] * jnp.eye(size, dtype=dtype)

        def pooled(x: Float[Array, "l bm n g d"], name: str) -> Float[Array, "l b m g d"]:
            maps = self.param(name, init, (layers, n, size, size)).astype(x.dtype)
            x = (x * real).reshape(layers, b, m, n, size)
            return jnp.einsum("lbmni,lnio->lbmo", x, maps).reshape(layers, b, m, heads, width)

        k = pooled(rope.rotate_layers(cut.k, -places, inv_freq), "k")
        return KV(rope.rotate_layers(k, positions, inv_freq), pooled(cut.v, "v"), valid)
