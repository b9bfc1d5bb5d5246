"""A discrete wire: latents as digits, of codes (residual VQ) or of levels (FSQ).

Codebooks are averages and not parameters: they live in Linen's collection ``codebook``. While a
compressor trains it is one of the trainer's collections; whoever only uses a compressor holds one
tree, in which it stands under that name beside the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from latent_jax.core import trees
from latent_jax.core.types import Mean
from latent_jax.nn.residual_vq import ResidualVQ
from latent_jax.nn.vq_config import VQConfig

#: The collection, and its name in a tree of parameters.
COLLECTION = "codebook"
#: Where a training pass leaves its loss and figures.
TOLD = "told"
# What of a codebook is no float; a file of weights holds nothing else.
_TYPES = {"stale": jnp.int32, "resets": jnp.int32, "step": jnp.int32, "ready": jnp.bool_}


def quantiser(width: int, codes: int, stages: int) -> ResidualVQ:
    """The quantiser of latents: codes start at k-means of the first batches, one stage a step."""
    return ResidualVQ(width, codes, stages, VQConfig())


def as_params(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Linen's variables as one tree."""
    found = dict(variables["params"])
    return {**found, COLLECTION: variables[COLLECTION]} if COLLECTION in variables else found


def as_variables(params: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `as_params`; what was stored as fp32 is what it was."""
    if COLLECTION not in params:
        return {"params": params}
    flat = trees.flatten(dict(params[COLLECTION]))
    typed = {
        name: jnp.asarray(x, _TYPES.get(name.rsplit("/", 1)[-1], jnp.float32))
        for name, x in flat.items()
    }
    rest = {k: v for k, v in params.items() if k != COLLECTION}
    return {"params": rest, COLLECTION: trees.unflatten(typed)}


def straight(x: Float[Array, "*b z"], y: Float[Array, "*b z"]) -> Float[Array, "*b z"]:
    """``y`` to the last bit, with the gradient of ``x``."""
    return jax.lax.stop_gradient(y) + (x - jax.lax.stop_gradient(x))


def level_values(levels: int) -> Float[Array, " l"]:
    """What each level of FSQ stands for, before its scale; a table, since a compiled division may
    be rounded otherwise.
    """
    half = levels // 2
    return jnp.asarray((np.arange(levels) - half) / half, jnp.float32)


def told(found: Mapping[str, Any]) -> tuple[dict[str, Mean], dict[str, Any]]:
    """Terms and figures of the collection `TOLD`: ``commitment``, mean squared error of a latent's
    numbers (gradient to the latent alone); ``anchor``, 1 - cosine between what a text's vector says
    of it and its semantic anchor; ``wire_error``, what the codes leave, over the latents'
    variance; ``codes_used``, the perplexity of the first digit.
    """
    kept = found.get(TOLD, {})
    terms = {
        name: Mean(sum(m.sum for m in kept[name]), sum(m.count for m in kept[name]))
        for name in ("commitment", "anchor") if name in kept
    }  # fmt: skip
    return terms, {name: kept[name][-1] for name in ("wire_error", "codes_used") if name in kept}


def bits(codes: int) -> int:
    """Bits of one digit."""
    return max(1, math.ceil(math.log2(codes)))


def digit_bytes(count: int, codes: int) -> int:
    """Bytes that so many digits take.

    Example:
      >>> digit_bytes(3, 1024), digit_bytes(4, 5)
      (4, 2)
    """
    return -(-count * bits(codes) // 8)


def pack_digits(digits: Int[np.ndarray, "*s"], codes: int) -> bytes:
    """Digits one after another, first one highest.

    Example:
      >>> pack_digits(np.array([1, 3, 0, 2]), 4).hex()
      '72'
    """
    flat = np.asarray(digits, np.int64).reshape(-1, 1)
    return np.packbits((flat >> np.arange(bits(codes))[::-1]) & 1).tobytes()


def unpack_digits(data: bytes, count: int, codes: int) -> Int[np.ndarray, " n"]:
    """The first ``count`` digits of `pack_digits`.

    Raises:
      ValueError: another number of bytes, or a digit that no code has.
    """
    if len(data) != digit_bytes(count, codes):
        raise ValueError(f"{len(data)} bytes are not {count} digits of {codes} codes")
    each = bits(codes)
    flat = np.unpackbits(np.frombuffer(data, np.uint8), count=count * each).reshape(count, each)
    found = (flat.astype(np.int64) << np.arange(each)[::-1]).sum(1)
    if found.size and found.max() >= codes:
        raise ValueError(f"digit {found.max()} where there are {codes} codes")
    return found.astype(np.int32)
