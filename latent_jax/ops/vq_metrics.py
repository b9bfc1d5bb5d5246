"""How a quantiser uses its codes, from the indices of the present batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def entropy(count: Float[Array, "*s k"]) -> Float[Array, "*s"]:
    """Entropy (nats) of counts; 0 of none."""
    total = jnp.maximum(count.sum(-1, keepdims=True), 1.0)
    share = count / total
    return -jnp.sum(share * jnp.log(jnp.where(share > 0, share, 1.0)), -1)


def histogram(indices: Int[Array, "*b s"], k: int) -> Float[Array, "s k"]:
    """How often each stage chose each code. Histograms of batches add up."""
    flat = indices.reshape(-1, indices.shape[-1])
    stages = flat.shape[-1]
    where = jnp.where(flat >= 0, flat + k * jnp.arange(stages), k * stages)
    count = jnp.bincount(where.reshape(-1), length=k * stages + 1)[:-1]
    return count.reshape(stages, k).astype(jnp.float32)


def usage(
    count: Float[Array, "s k"], live: Bool[Array, "s k"] | None = None
) -> dict[str, Float[Array, " s"]]:
    """Figures per stage of (pooled) histograms.

    Returns:
      ``perplexity`` (``exp`` of the entropy), ``entropy_ratio`` (entropy over ``log k``, 1 for a
      single code), ``dead`` (share of codes that nothing chose).
    """
    live = jnp.ones(count.shape, bool) if live is None else live
    codes = live.sum(-1)
    h = entropy(count)
    return {
        "perplexity": jnp.exp(h),
        "entropy_ratio": jnp.where(codes > 1, h / jnp.log(jnp.maximum(codes, 2)), 1.0),
        "dead": jnp.sum(live & (count == 0), -1) / codes,
    }


def joint_perplexity(indices: Int[Array, "*b s"]) -> Float[Array, ""]:
    """Perplexity of whole rows of digits; at most the number of rows, and of theirs product.

    Rows are told apart by two independent 32-bit hashes: composed ids overflow. Rows whose first
    digit is -1 are padding.
    """
    flat = indices.reshape(-1, indices.shape[-1])
    keep = flat[:, 0] >= 0
    words = (flat + 1).astype(jnp.uint32)

    def mix(seed: int, prime: int) -> Array:
        def body(h, word):
            h = (h ^ word) * jnp.uint32(prime)
            return h ^ (h >> 15), None

        start = jnp.full(flat.shape[0], seed, jnp.uint32)
        return jax.lax.scan(body, start, words.T)[0]

    first, second = mix(0x811C9DC5, 0x01000193), mix(0x9E3779B9, 0x85EBCA6B)
    order = jnp.lexsort((second, first, ~keep))
    first, second, keep = first[order], second[order], keep[order]
    new = (first[1:] != first[:-1]) | (second[1:] != second[:-1]) | (keep[1:] != keep[:-1])
    group = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(new.astype(jnp.int32))])
    count = jax.ops.segment_sum(keep.astype(jnp.float32), group, flat.shape[0])
    return jnp.exp(entropy(count))
