"""What training and coding cost: operations per byte, counted, and bytes per second, measured."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latent_jax.core import trees
from latent_jax.core.flops import matmul_flops
from latent_jax.systems.abstractinator import losses, recipe
from latent_jax.systems.abstractinator.config import PEERS, AbstractRun
from latent_jax.systems.abstractinator.model import Abstractinator
from latent_jax.train.phases import phase_at

_REPEATS = 3


def flops(system: Any, variables: Mapping[str, Any]) -> dict[str, float]:
    """Counts matrix products (see `core.flops`), for windows without padding.

    Args:
      system: the abstractinator.
      variables: its variables, or their shapes.

    Returns:
      ``flops.train.<model|peer>``: of all steps of this run's phases, forward and backward; the
      model's are those of every phase but the peers'. ``flops.train_per_byte.<phase's data>``: of a
      step, over the bytes of its batch. ``flops.code_per_byte.<model|peer>``: of a pass that gives
      the likelihood of a text; the model's has the ``flops.encode_per_byte`` of its rows in it.
      ``parameters.<model|peer>``.
    """
    config = system.config
    variables = jax.eval_shape(lambda v: v, dict(variables))
    window = config.data.window
    visited = [phase_at(config.train, step) for step in range(config.train.steps)]
    phases, steps = dict(visited), Counter(index for index, _ in visited)
    out: dict[str, float] = {}
    size = config.train.batch_size * window
    for index, count in steps.items():
        phase = phases[index]
        each = _step(system, variables, phase)
        kind = "joint" if phase.data == "main" else phase.data
        out[f"flops.train_per_byte.{kind}"] = each / size
        name = f"flops.train.{kind if kind in PEERS else 'model'}"
        out[name] = out.get(name, 0.0) + each * count
    ids = jax.ShapeDtypeStruct((1, window), jnp.int32)
    valid = jax.ShapeDtypeStruct((1, window), bool)
    for name, fn in _passes(system.model, config).items():
        out[name] = _products(fn, variables, ids, valid) / window
    for name in ("model", *config.peers):
        mine = {
            part: tree for part, tree in variables["params"].items()
            if (part == name if name in PEERS else part not in PEERS)
        }  # fmt: skip
        out[f"parameters.{name}"] = trees.count_params(mine)
    return out


def _step(system: Any, variables: Mapping[str, Any], phase: Any) -> float:
    """Of one training step of a phase."""
    batch = recipe.batch_specs(system.config, phase.data)[0].arrays
    labels = system.param_labels(variables["params"])
    names = trees.flatten(labels)
    params = trees.flatten(variables["params"])
    moving = {
        path: leaf for path, leaf in params.items()
        if (not phase.train or names[path] in phase.train) and names[path] not in phase.freeze
    }  # fmt: skip
    held = {path: leaf for path, leaf in params.items() if path not in moving}
    rest = {name: tree for name, tree in variables.items() if name != "params"}
    keys = {name: jax.random.key(0) for name in system.rng_names}

    def loss(moving: Any, held: Any, rest: Any, batch: Any) -> jax.Array:
        whole = {"params": trees.unflatten({**held, **moving}), **rest}
        terms, _, _ = system.loss_terms(whole, {}, batch, keys, True)
        return sum(term.value for term in terms.values())

    return _products(jax.grad(loss), moving, held, rest, batch)


def _products(fn: Callable[..., Any], *args: Any) -> float:
    """All of a function's matrix products, without the start of a codebook."""
    return matmul_flops(lambda *each: (fn(*each), None), *args, branch=min)[0]


def _passes(model: Abstractinator, config: AbstractRun) -> dict[str, Callable[..., Any]]:
    def code(variables: Any, ids: Any, valid: Any) -> Any:
        every = model.apply(variables, ids, valid, method="pyramid")
        nats = [losses.reconstruction(model, variables, ids, every[0])[0]]
        for i in range(1, len(every)):
            nats.append(losses.rows_below(model, variables, every[i], every[i - 1], i)[0])
        return [*nats, losses.next_rows(model, variables, every[-1]).nats]

    def encode(variables: Any, ids: Any, valid: Any) -> Any:
        return model.apply(variables, ids, valid, method="pyramid")[-1].digits

    def peer(name: str) -> Callable[..., Any]:
        return lambda variables, ids, valid: losses.byte_lm(model, variables, ids, valid, name)

    return {
        "flops.code_per_byte.model": code,
        "flops.encode_per_byte": encode,
        **{f"flops.code_per_byte.{name}": peer(name) for name in config.peers},
    }


def encoding_speed(
    measure: Any, variables: Mapping[str, Any], batches: list[tuple[np.ndarray, np.ndarray]]
) -> float:
    """Bytes per second from text to digits of the highest level; the first batch only compiles."""
    ids, valid = batches[0]
    jax.block_until_ready(measure.digits(variables, ids, valid))
    began = time.perf_counter()
    for at in range(_REPEATS):
        jax.block_until_ready(measure.digits(variables, *batches[at % len(batches)]))
    spent = time.perf_counter() - began
    return sum(int(batches[at % len(batches)][1].sum()) for at in range(_REPEATS)) / spent


def continuations(
    system: Any, variables: Mapping[str, Any], prompts: list[bytes]
) -> tuple[list[dict[str, str]], dict[str, float]]:
    """Greedy continuations of texts, and how fast they came.

    Returns:
      samples: prompt and continuation of each text.
      metrics: ``throughput.generate_bytes_per_second``, all texts at once, without the first row,
        which compiles; nothing where there is no other row.
    """
    count = system.config.eval.continuation
    if not prompts or not count:
        return [], {}
    stream, told = system.stream(variables, prompts, count), [b""] * len(prompts)
    fresh, began = 0, None
    for parts in stream:
        told = [whole + part for whole, part in zip(told, parts, strict=True)]
        if began is None:
            began = time.perf_counter()
        else:
            fresh += sum(map(len, parts))
    spent = time.perf_counter() - began
    samples = [
        {"kind": "continuation", "prompt": prompt.decode("utf-8", errors="replace"),
         "continuation": text.decode("utf-8", errors="replace")}
        for prompt, text in zip(prompts, told, strict=True)
    ]  # fmt: skip
    return samples, {"throughput.generate_bytes_per_second": fresh / spent} if fresh else {}
