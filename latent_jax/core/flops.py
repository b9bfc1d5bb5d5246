"""Arithmetic of a function, counted in its trace: nothing runs, nothing is compiled."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core
from jax.interpreters.partial_eval import dce_jaxpr


def matmul_flops(
    fn: Callable[..., Any], *args: Any, branch: Callable[[list[float]], float] = max
) -> tuple[float, Any]:
    """Floating-point operations of all matrix products that the first result of ``fn`` needs.

    A product of ``[m, k]`` and ``[k, n]`` is ``2 m n k``; the body of a scan counts once per
    iteration, a recomputation (`jax.checkpoint`) as often as it happens. Element-wise work and
    products whose result nobody uses are left out. For a decoder of ``N`` matrix parameters that
    makes ``2 N`` per token forward and as much again for the gradient of its inputs (``4 N``
    through a frozen one), ``2 N`` more where its own gradient is wanted (``6 N``); attention adds
    ``4 t s d`` per head and layer forward and twice that backward (Kaplan et al. 2020, table 1).

    Args:
      fn: a pure function that returns a pair.
      *args: arrays, or shapes of arrays (`jax.ShapeDtypeStruct`).
      branch: what a `cond` costs, of its branches; ``min`` where the costly one is rare,
        such as the start of a codebook.

    Returns:
      The operations, and the shapes of the second result, which is not counted.

    Example:
      >>> import jax.numpy as jnp
      >>> matmul_flops(lambda a, b: (a @ b, None), jnp.ones((2, 3)), jnp.ones((3, 5)))
      (60.0, None)
    """
    closed, (wanted, rest) = jax.make_jaxpr(fn, return_shape=True)(*args)
    needed = len(jax.tree.leaves(wanted))
    outputs = len(closed.jaxpr.outvars)
    used, _ = dce_jaxpr(closed.jaxpr, [i < needed for i in range(outputs)])
    return _count(used, branch), rest


def _count(jaxpr: Any, branch: Callable[[list[float]], float]) -> float:
    return float(sum(_of(eqn, branch) for eqn in jaxpr.eqns))


def _of(eqn: Any, branch: Callable[[list[float]], float]) -> float:
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
        return 2.0 * depth * math.prod(eqn.outvars[0].aval.shape)
    inner = [_count(sub, branch) for sub in core.jaxprs_in_params(eqn.params)]
    if eqn.primitive.name == "cond":  # one of its branches runs
        return branch(inner)
    times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
    return times * sum(inner)
