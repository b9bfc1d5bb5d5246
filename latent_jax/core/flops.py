"""How many floating-point operations a function's matrix products take, from its trace alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax


def matmul_flops(fn: Callable[..., Any], *args: Any) -> float:
    """FLOPs of all matrix products that a call makes, a multiply-add counted as two.

    Nothing is compiled or run, and arguments may be abstract. A scan counts as often as it runs
    (XLA's own cost analysis counts its body once); of a `cond` the cheapest branch counts, which
    leaves out what happens rarely, such as the initialisation of a codebook; the body of a `while`
    whose length is not known counts once. Elementwise work is not counted.

    Args:
      fn: a function of arrays.
      *args: its arguments, or their `jax.ShapeDtypeStruct`s.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.ones((4, 4))
      >>> matmul_flops(lambda x: x @ x, x)
      128.0
      >>> matmul_flops(lambda x: jax.lax.fori_loop(0, 3, lambda _, y: x @ y, x), x)
      384.0
    """
    return _count(jax.make_jaxpr(fn)(*args).jaxpr)


def _count(jaxpr: Any) -> float:
    total = 0.0
    for step in jaxpr.eqns:
        name, params = step.primitive.name, step.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left, out = step.invars[0].aval.shape, step.outvars[0].aval.shape
            total += 2.0 * math.prod(out) * math.prod(left[axis] for axis in contracted)
        elif name == "cond":
            total += min(_count(branch.jaxpr) for branch in params["branches"])
        else:
            inner = sum(_count(part) for part in _inside(params))
            total += inner * (params["length"] if name == "scan" else 1)
    return total


def _inside(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            part = getattr(part, "jaxpr", part)  # a closed one holds its jaxpr
            if hasattr(part, "eqns"):
                yield part
