"""Low-rank deltas (Hu et al. 2021) for the stacked layers of a frozen decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class LoRA(nn.Module):
    """Trainable low-rank deltas; they change nothing at initialisation.

    Attributes:
      shapes: ``{projection: (in, out)}`` of what is adapted.
      num_layers: layers stacked along the leading axis.
      rank: inner width.
      alpha: the delta is ``alpha / rank * a @ b``.

    A call returns ``{projection: {'a': [l, in, r], 'b': [l, r, out]}}`` with the scale in ``b``.
    """

    shapes: Mapping[str, tuple[int, int]]
    num_layers: int
    rank: int
    alpha: float

    @nn.compact
    def __call__(self) -> dict[str, dict[str, jax.Array]]:
        scale = self.alpha / self.rank
        tree = {}
        for name, (fan_in, fan_out) in self.shapes.items():
            init = nn.initializers.normal(fan_in**-0.5)
            a = self.param(f"{name}_a", init, (self.num_layers, fan_in, self.rank))
            zeros = nn.initializers.zeros
            b = self.param(f"{name}_b", zeros, (self.num_layers, self.rank, fan_out))
            tree[name] = {"a": a, "b": b * jnp.asarray(scale, b.dtype)}
        return tree


def placed(deltas: Any, layers: int, first: int = 0) -> Any:
    """Deltas of some layers as deltas of all: the others' are 0.

    Args:
      deltas: of consecutive layers, stacked along the leading axis.
      layers: of the decoder.
      first: the first that they belong to.
    """

    def padded(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(first, layers - first - x.shape[0]), (0, 0), (0, 0)])

    return jax.tree.map(padded, deltas)


@jax.jit
def merged(params: Any, deltas: Any) -> Any:
    """A decoder's parameters with deltas ``{projection: {'a', 'b'}}`` of all layers added to its
    kernels, in their precision.
    """
    layers = dict(params["layers"])
    for name, delta in deltas.items():
        kernel = layers[name]["kernel"]
        add = jnp.einsum("lir,lro->lio", delta["a"], delta["b"])
        layers[name] = {
            **layers[name], "kernel": (kernel.astype(jnp.float32) + add).astype(kernel.dtype)
        }  # fmt: skip
    return {**params, "layers": layers}
