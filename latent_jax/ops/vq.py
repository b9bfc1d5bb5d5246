"""Vector quantisation by one codebook: assignment, gradients, statistics and their moving average.

A codebook is ``code`` (``k d``) with a ``bias`` (``k``): half its squared norms for the Euclidean
distance, zero for the cosine, infinite where a stage has fewer codes than the array has rows. The
nearest code is then ``argmin(bias - x @ code.T)`` in every case, and ``|x|^2`` is never computed.
Everything here is fp32: a distance in half precision picks other codes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

EXACT = jax.lax.Precision.HIGHEST
# Scores held at once when nobody says how many codes a chunk has: 16 MiB of fp32.
_SCORES = 2**22
_SMALLEST_CHUNK = 128


def unit(x: Float[Array, "*b d"], floor: float = 1e-6) -> Float[Array, "*b d"]:
    """``x`` scaled to length 1; lengths below ``floor`` are taken as ``floor``."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), floor)


def bias_of(
    norm: Float[Array, "*s k"], live: Bool[Array, "*s k"] | None = None, cosine: bool = False
) -> Float[Array, "*s k"]:
    """What `nearest` adds to ``-x @ code.T``.

    Args:
      norm: squared norms of the codes, cached.
      live: rows that are codes at all; the others are never chosen.
      cosine: the codes have unit length, so their norms say nothing.
    """
    bias = jnp.zeros_like(norm) if cosine else norm / 2
    return bias if live is None else jnp.where(live, bias, jnp.inf)


def scores(
    x: Float[Array, "n d"], code: Float[Array, "k d"], bias: Float[Array, " k"]
) -> Float[Array, "n k"]:
    """Half the squared distance, less half of ``|x|^2``."""
    return bias - jnp.dot(x, code.T, precision=EXACT)


def chunk_size(n: int, k: int, chunk: int | None = None) -> int:
    """Codes scored at once: as asked, or as many as keep ``n`` rows of scores within 16 MiB."""
    if chunk is None:
        chunk = max(_SMALLEST_CHUNK, _SCORES // max(n, 1))
    return min(k, chunk)


def _chunks(code: Array, bias: Array, size: int) -> tuple[Array, Array, Array]:
    """Pads the codes to whole chunks with ones that are never chosen."""
    k, d = code.shape
    count = -(-k // size)
    code = jnp.pad(code, ((0, count * size - k), (0, 0)))
    bias = jnp.pad(bias, (0, count * size - k), constant_values=jnp.inf)
    return code.reshape(count, size, d), bias.reshape(count, size), jnp.arange(count)


def nearest(
    x: Float[Array, "n d"],
    code: Float[Array, "k d"],
    bias: Float[Array, " k"],
    chunk: int | None = None,
    key: jax.Array | None = None,
    temperature: Float[Array, ""] | float = 0.0,
) -> Int[Array, " n"]:
    """Index of the nearest code; ties go to the lowest.

    Args:
      x: rows.
      code: codes.
      bias: see `bias_of`.
      chunk: codes scored at once, which bounds memory to ``n * chunk`` scores.
      key: with a key, codes are drawn with probability proportional to
        ``exp(-squared distance / temperature)``, by the Gumbel-max trick; 0 is the nearest.
      temperature: in units of squared distance.
    """

    def scored(code: Array, bias: Array, number: Array) -> Array:
        score = scores(x, code, bias)
        if key is None:
            return score
        # Scores are half squared distances, so is the noise.
        noise = jax.random.gumbel(jax.random.fold_in(key, number), score.shape)
        return score - 0.5 * temperature * noise

    n, k = x.shape[0], code.shape[0]
    size = chunk_size(n, k, chunk)
    if size == k:
        return jnp.argmin(scored(code, bias, jnp.int32(0)), -1).astype(jnp.int32)

    def body(best: tuple[Array, Array], part: tuple[Array, Array, Array]):
        score = scored(*part)
        index = jnp.argmin(score, -1).astype(jnp.int32)
        low = jnp.take_along_axis(score, index[:, None], -1)[:, 0]
        closer = low < best[0]
        index = index + size * part[2].astype(jnp.int32)
        return (jnp.where(closer, low, best[0]), jnp.where(closer, index, best[1])), None

    # Made from x so that the carry is sharded like it.
    start = (jnp.full_like(x[:, 0], jnp.inf), jnp.zeros_like(x[:, 0], jnp.int32))
    return jax.lax.scan(body, start, _chunks(code, bias, size))[0][1]


def nearest_many(
    x: Float[Array, "n d"],
    code: Float[Array, "k d"],
    bias: Float[Array, " k"],
    count: int,
    chunk: int | None = None,
) -> tuple[Float[Array, "n c"], Int[Array, "n c"]]:
    """Scores and indices of the ``count`` nearest codes, nearest first."""
    n, k = x.shape[0], code.shape[0]
    size = max(chunk_size(n, k, chunk), count)
    if size >= k:
        low, index = jax.lax.top_k(-scores(x, code, bias), count)
        return -low, index.astype(jnp.int32)

    def body(best: tuple[Array, Array], part: tuple[Array, Array, Array]):
        low, index = jax.lax.top_k(-scores(x, *part[:2]), count)
        index = index.astype(jnp.int32) + size * part[2].astype(jnp.int32)
        low = jnp.concatenate([best[0], low], -1)
        low, where = jax.lax.top_k(low, count)
        return (low, jnp.take_along_axis(jnp.concatenate([best[1], index], -1), where, -1)), None

    start = (jnp.full((n, count), -jnp.inf), jnp.zeros((n, count), jnp.int32))
    low, index = jax.lax.scan(body, start, _chunks(code, bias, size))[0]
    return -low, index


def soft_codes(
    x: Float[Array, "n d"],
    code: Float[Array, "k d"],
    bias: Float[Array, " k"],
    temperature: Float[Array, ""] | float,
    key: jax.Array | None = None,
) -> Float[Array, "n d"]:
    """Mean code under ``softmax((gumbel - squared distance) / temperature)`` (Jang et al. 2017).

    Without a key there is no Gumbel noise: the expectation under the Boltzmann weights.
    """
    logits = -2 * scores(x, code, bias)
    if key is not None:
        logits = logits + temperature * jax.random.gumbel(key, logits.shape)
    weight = jax.nn.softmax(logits / jnp.maximum(temperature, 1e-6), -1)
    return jnp.dot(weight, code, precision=EXACT)


def straight_through(x: Float[Array, "*b d"], q: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """The value of ``q``, bit for bit, with the identity as its Jacobian in ``x``."""
    return jax.lax.stop_gradient(q) + (x - jax.lax.stop_gradient(x))


def rotate(x: Float[Array, "*b d"], q: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """The value of ``q``; its Jacobian in ``x`` rotates and rescales ``x`` onto ``q``.

    Fifty et al. 2024 (arXiv:2410.06424), section 4.2: ``|q|/|x| (I - 2 w w^T + 2 q̂ x̂^T)`` with
    ``w`` the unit vector along ``x̂ + q̂``, all held constant.
    """
    fixed = jax.lax.stop_gradient
    u, v = fixed(unit(x)), fixed(unit(q))
    w = fixed(unit(u + v))
    dot = lambda a, b: jnp.sum(a * b, -1, keepdims=True)  # noqa: E731
    length = jnp.linalg.norm(fixed(q), axis=-1, keepdims=True)
    length = length / jnp.maximum(jnp.linalg.norm(fixed(x), axis=-1, keepdims=True), 1e-6)
    out = (x - 2 * dot(x, w) * w + 2 * dot(x, u) * v) * length
    # The rotation reproduces q up to rounding (not at x = 0 or x = -q): take q's own value.
    return fixed(q) + (out - fixed(out))


def statistics(
    x: Float[Array, "n d"], index: Int[Array, " n"], k: int, matmul: bool = False
) -> tuple[Float[Array, " k"], Float[Array, "k d"]]:
    """How many rows chose each code, and their sums; index -1 counts for nothing.

    Args:
      x: rows; those with index -1 may hold anything, NaN included.
      index: chosen code, or -1.
      k: codes.
      matmul: by a product with one-hot rows instead of a scatter: faster on TPUs, 500 times
        slower on CPUs.
    """
    on = index >= 0
    x = jnp.where(on[:, None], x.astype(jnp.float32), 0.0)
    if matmul:
        chosen = jax.nn.one_hot(index, k, dtype=jnp.float32)
        return chosen.sum(0), jnp.dot(chosen.T, x, precision=EXACT)
    where = jnp.where(on, index, k)  # one bin more, dropped below
    count = jax.ops.segment_sum(on.astype(jnp.float32), where, k + 1)[:k]
    return count, jax.ops.segment_sum(x, where, k + 1)[:k]


def smoothed(
    size: Float[Array, "*s k"], epsilon: float, live: Bool[Array, "*s k"] | None = None
) -> Float[Array, "*s k"]:
    """Laplace-smoothed cluster sizes of the same total mass; 1 where nothing is live."""
    live = jnp.ones(size.shape, bool) if live is None else live
    size = jnp.where(live, size, 0.0)
    mass, codes = size.sum(-1, keepdims=True), live.sum(-1, keepdims=True)
    return jnp.where(live, (size + epsilon) / (mass + codes * epsilon) * mass, 1.0)
