"""Residual quantisation: one scan over the stages, so that depth costs no compile time."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from latent_jax.ops import vq


class Stages(NamedTuple):
    """What a pass reads of each stage.

    Attributes:
      code: codes.
      bias: see `vq.bias_of`.
      ready: stages that quantise; the others are skipped.
    """

    code: Float[Array, "s k d"]
    bias: Float[Array, "s k"]
    ready: Bool[Array, " s"]


class Soft(NamedTuple):
    """Soft assignment: the share of the soft code in what is passed on, and its temperature."""

    weight: Float[Array, ""]
    temperature: Float[Array, ""]


class Pass(NamedTuple):
    """What one pass over the stages found.

    Attributes:
      quantised: sum of the chosen codes.
      indices: chosen codes; -1 at padding, at stages that are dropped or not ready.
      gap: residual after the stages, ``x - quantised``.
      pull: gradient of ``sum(weights * error)`` in ``x``, the codes held constant.
      error: squared distance of the chosen codes to what they stand for, summed over rows.
      distortion: squared length of the residual left behind, summed over rows.
      count: rows of each code.
      total: sum of those rows.
      candidates: residuals that entered each stage, at the rows asked for.
    """

    quantised: Float[Array, "n d"]
    indices: Int[Array, "n s"]
    gap: Float[Array, "n d"]
    pull: Float[Array, "n d"]
    error: Float[Array, " s"]
    distortion: Float[Array, " s"]
    count: Float[Array, "s k"]
    total: Float[Array, "s k d"]
    candidates: Float[Array, "s m d"]


def active(
    keep: Bool[Array, " n"], ready: Bool[Array, ""], depth: Int[Array, " n"] | None, stage: Array
) -> Bool[Array, " n"]:
    """Rows that a stage quantises."""
    on = keep & ready
    return on if depth is None else on & (stage < depth)


def run(
    x: Float[Array, "n d"],
    stages: Stages,
    keep: Bool[Array, " n"],
    *,
    depth: Int[Array, " n"] | None = None,
    given: Int[Array, "n s"] | None = None,
    cosine: bool = False,
    chunk: int | None = None,
    key: jax.Array | None = None,
    temperature: Float[Array, ""] | float | None = None,
    soft: Soft | None = None,
    weights: Float[Array, " s"] | None = None,
    rows: Int[Array, "s m"] | None = None,
    collect: bool = True,
    matmul: bool = False,
) -> Pass:
    """Quantises the residual stage after stage; nothing here is differentiated.

    Gradients are put on from outside (`vq.straight_through`, `losses.attach`): the commitment
    loss has the closed form ``pull``, and storing the residuals of every stage for a backward
    pass would cost ``s * n * d`` floats.

    Args:
      x: finite rows.
      stages: the codebooks.
      keep: rows that are not padding.
      depth: number of stages of each row (quantise dropout); all by default.
      given: indices that are already known, from a search; -1 where there is none.
      cosine: rows are scaled to unit length before they are compared, and codes have it.
      chunk: see `vq.nearest`.
      key: for sampled or soft codes.
      temperature: sample codes instead of taking the nearest.
      soft: blend in the soft code.
      weights: of the stages' errors in ``pull``; 1 by default.
      rows: per stage the rows whose residuals are wanted back.
      collect: gather statistics (``count`` and ``total``); without, they are zero-sized.
      matmul: see `vq.statistics`.
    """
    x = jax.lax.stop_gradient(x.astype(jnp.float32))
    stages = jax.lax.stop_gradient(stages)
    depths, k = stages.code.shape[:2]
    key = jax.random.key(0) if key is None else key
    rows = jnp.zeros((depths, 0), jnp.int32) if rows is None else rows
    weights = jnp.ones(depths) if weights is None else weights
    each = {"stage": jnp.arange(depths), "rows": rows, "of": stages, "weight": weights}
    if given is not None:
        each["given"] = given.T

    def body(carry, each):
        residual, pull = carry
        stage, (code, bias, ready) = each["stage"], each["of"]
        draw = jax.random.fold_in(key, stage)
        on = active(keep, ready, depth, stage)
        seen = vq.unit(residual) if cosine else residual
        if given is not None:
            index = jnp.maximum(each["given"], 0)
            on = on & (each["given"] >= 0)
        elif temperature is None:
            index = vq.nearest(seen, code, bias, chunk)
        else:
            index = vq.nearest(seen, code, bias, chunk, draw, temperature)
        used = code[index]
        if soft is not None:
            # A true branch: once the warm-up is over its product costs nothing.
            mixed = jax.lax.cond(
                soft.weight > 0,
                lambda: vq.soft_codes(
                    seen, code, bias, soft.temperature, jax.random.fold_in(draw, 1)
                ),
                lambda: used,
            )
            used = used + soft.weight * (mixed - used)
        used = jnp.where(on[:, None], used, 0.0)
        gap = jnp.where(on[:, None], seen - used, 0.0)
        grad = 2 * gap
        if cosine:  # through the scaling: (I - u u^T) / |r|
            length = jnp.maximum(jnp.linalg.norm(residual, axis=-1, keepdims=True), 1e-6)
            grad = (grad - seen * jnp.sum(seen * grad, -1, keepdims=True)) / length
        index = jnp.where(on, index, -1)
        left = residual - used
        out = {
            "index": index,
            "error": jnp.sum(gap**2),
            "distortion": jnp.sum(jnp.where(keep[:, None], left, 0.0) ** 2),
            "candidates": seen[each["rows"]],
        }
        if collect:
            out["count"], out["total"] = vq.statistics(seen, index, k, matmul)
        return (left, pull + each["weight"] * grad), out

    start = (jnp.where(keep[:, None], x, 0.0), jnp.zeros_like(x))
    (gap, pull), out = jax.lax.scan(body, start, each)
    empty = jnp.zeros((depths, 0))
    return Pass(
        quantised=start[0] - gap if soft is not None else decode(out["index"].T, stages.code),
        indices=out["index"].T,
        gap=gap,
        pull=pull,
        error=out["error"],
        distortion=out["distortion"],
        count=out.get("count", empty),
        total=out.get("total", empty[..., None]),
        candidates=out["candidates"],
    )


def decode(
    indices: Int[Array, "*b s"], code: Float[Array, "s k d"]
) -> Float[Array, "*b d"]:
    """Sum of the codes; an index of -1 adds nothing.

    Both training and decoding of stored codes come through here: the same digits give the same
    bits.
    """

    def body(total, stage):
        index, code = stage
        part = code[jnp.maximum(index, 0)]
        return total + jnp.where((index >= 0)[..., None], part, 0.0), None

    by_stage = jnp.moveaxis(indices, -1, 0)
    start = jnp.zeros((*indices.shape[:-1], code.shape[-1]), code.dtype)
    return jax.lax.scan(body, start, (by_stage, code))[0]


def joint_statistics(
    found: Pass, code: Float[Array, "s k d"], matmul: bool = False
) -> Float[Array, "s k d"]:
    """Sums towards which the codes move when every stage answers for the *final* error.

    Given all indices, the code that minimises ``|x - sum of codes|^2`` with the other stages fixed
    is the mean of ``gap + code`` over its rows (one coordinate step of additive quantisation,
    Babenko and Lempitsky 2014), where the stage-wise rule takes the mean of its own input.
    """

    def body(_, stage):
        index, code, count = stage
        return None, vq.statistics(found.gap, index, code.shape[0], matmul)[1] + (
            count[:, None] * code
        )

    return jax.lax.scan(body, None, (found.indices.T, code, found.count))[1]
