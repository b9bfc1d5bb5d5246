"""One group's training step on its codebooks, as pure functions of a `VQConfig`."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from latent_jax.nn.vq_config import VQConfig
from latent_jax.ops import rvq, rvq_search, vq, vq_init, vq_state
from latent_jax.ops.vq_state import Codebooks


class Knobs(NamedTuple):
    """The schedules' values at one step."""

    step: Int[Array, ""]
    ema: Float[Array, ""]
    bypass: Float[Array, ""]
    soft: Float[Array, ""]
    soft_temperature: Float[Array, ""]
    temperature: Float[Array, ""]


def knobs(config: VQConfig, step: Int[Array, ""]) -> Knobs:
    """Evaluates the schedules."""
    names = Knobs._fields[1:]
    return Knobs(jnp.asarray(step, jnp.int32), *(getattr(config, name)(step) for name in names))


def live_mask(sizes: tuple[int, ...]) -> np.ndarray:
    """Which rows of ``(stages, max(sizes))`` are codes."""
    return np.arange(max(sizes)) < np.asarray(sizes)[:, None]


def stages_of(
    config: VQConfig, state: Codebooks, live: Bool[Array, "s k"], depth: int
) -> rvq.Stages:
    """What a pass reads; a shared codebook stands at every stage."""
    bias = vq.bias_of(state.norm, jnp.asarray(live), config.distance == "cosine")
    stages = rvq.Stages(state.code, bias, state.ready)
    if not config.shared:
        return stages
    return jax.tree.map(lambda a: jnp.broadcast_to(a, (depth, *a.shape[1:])), stages)


def initialise(
    config: VQConfig,
    state: Codebooks,
    live: Bool[Array, "s k"],
    x: Float[Array, "n d"],
    keep: Bool[Array, " n"],
    key: jax.Array,
    depth: int,
) -> Codebooks:
    """Gives the first stage that has none its codes from this batch's residuals.

    One stage per call: what the next stage sees has then really passed this one.
    """
    live = jnp.asarray(live)
    cosine = config.distance == "cosine"

    def first(state: Codebooks) -> Codebooks:
        at = jnp.argmin(state.ready)
        stages = stages_of(config, state, live, depth)
        passed = rvq.run(x, stages, keep, cosine=cosine, chunk=config.chunk, collect=False)
        iters = config.kmeans_iters if config.init == "kmeans" else 0
        code = vq_init.first_codes(key, passed.gap, keep, live[at], iters, config.chunk, cosine)
        new = vq_state.fresh(code[None], live[at][None], True)
        new = new._replace(resets=state.resets[at][None])
        return jax.tree.map(lambda old, part: old.at[at].set(part[0]), state, new)

    return jax.lax.cond(~state.ready.all() & keep.any(), first, lambda state: state, state)


def depths(
    config: VQConfig, key: jax.Array, rows: int, stages: int
) -> Int[Array, " n"]:
    """Number of stages of each row under quantise dropout."""
    cut, many = jax.random.split(key)
    low = min(config.dropout_keep, stages)
    number = jax.random.randint(many, (rows,), low, stages + 1)
    return jnp.where(jax.random.uniform(cut, (rows,)) < config.dropout, number, stages)


def candidates(
    config: VQConfig, codes: int, stages: int, depth: Int[Array, " n"] | None,
    keep: Bool[Array, " n"], key: jax.Array,
) -> tuple[Int[Array, "s m"], Bool[Array, "s m"]]:  # fmt: skip
    """Rows whose residuals may become codes: as many per stage as may restart at once."""
    most = max(1, math.floor(config.reset.share * codes))
    most = math.ceil(most / stages) if config.shared else most

    def pick(stage: Array) -> tuple[Array, Array]:
        on = keep if depth is None else keep & (stage < depth)
        return vq_init.pick_rows(jax.random.fold_in(key, stage), on, min(most, keep.shape[0]))

    return jax.lax.map(pick, jnp.arange(stages))


def quantise(
    config: VQConfig,
    state: Codebooks,
    live: Bool[Array, "s k"],
    x: Float[Array, "n d"],
    keep: Bool[Array, " n"],
    at: Knobs,
    key: jax.Array,
    stages: int,
    train: bool,
    weights: Float[Array, " s"],
    collect: bool,
) -> tuple[rvq.Pass, Bool[Array, "s m"]]:
    """Searches and quantises one batch.

    Returns:
      The pass, and which of its candidates are real rows.
    """
    drop, draw, pick = jax.random.split(key, 3)
    table = stages_of(config, state, live, stages)
    depth = depths(config, drop, x.shape[0], stages) if train and config.dropout else None
    shared = {"depth": depth, "chunk": config.chunk}
    cosine = config.distance == "cosine"
    rows, valid = None, jnp.zeros((stages, 0), bool)
    if collect and config.reset.fraction:
        rows, valid = candidates(config, live.shape[1], stages, depth, keep, pick)
    given = None
    width = config.beam if train else config.eval_beam
    if width > 1:
        if cosine:
            given = rvq_search.beam(vq.unit(x), table, keep, width, **shared)
        else:
            given = rvq_search.beam(x, table, keep, width, **shared)
    found = rvq.run(
        x,
        table,
        keep,
        given=given,
        cosine=cosine,
        key=draw,
        temperature=at.temperature if train and config.temperature.used else None,
        soft=rvq.Soft(at.soft, at.soft_temperature) if train and config.soft.used else None,
        weights=weights,
        rows=rows,
        collect=collect,
        matmul=uses_matmul(config),
        **shared,
    )
    if collect and config.target == "joint":
        found = found._replace(total=rvq.joint_statistics(found, table.code, uses_matmul(config)))
    return found, valid


def uses_matmul(config: VQConfig) -> bool:
    """Whether statistics are products: on TPUs scatters are the slow ones."""
    if config.statistics == "auto":
        return jax.default_backend() == "tpu"
    return config.statistics == "matmul"


def update(
    config: VQConfig,
    state: Codebooks,
    live: Bool[Array, "s k"],
    found: rvq.Pass,
    valid: Bool[Array, "s m"],
    at: Knobs,
    key: jax.Array,
) -> Codebooks:
    """The codebooks after a batch: averages, then restarts."""
    live = jnp.asarray(live)
    cosine = config.distance == "cosine"
    count, total, rows = found.count, found.total, found.candidates
    if config.shared:
        count, total = count.sum(0, keepdims=True), total.sum(0, keepdims=True)
        # Dead codes take rows in order: without a shuffle the first stage's would always win.
        mix = jax.random.permutation(key, valid.size)
        rows = rows.reshape(1, -1, rows.shape[-1])[:, mix]
        valid = valid.reshape(1, -1)[:, mix]
    state = vq_state.track(state, count, config.decay)
    if config.learn == "ema":
        state = vq_state.ema(
            state, count, total, config.decay, config.epsilon, live, cosine, at.ema
        )
    reset = config.reset
    if not reset.fraction or not valid.size:
        return state
    protected = jnp.broadcast_to(jnp.arange(live.shape[1]) < reset.protect, live.shape)
    gone = vq_state.dead(state, reset.fraction, reset.stale, live, protected)
    gone &= state.ready[:, None] & (at.ema > 0) & (at.step % reset.every == 0)
    return jax.lax.cond(
        gone.any(),
        lambda s: vq_state.restart(
            s, gone, rows, valid, reset.size, config.epsilon, live, cosine
        ),
        lambda s: s,
        state,
    )
