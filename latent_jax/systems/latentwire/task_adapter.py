"""Two adapters for one wire: what all tasks are given of it, and what each task adds to that.

The content adapter is the linear map of the wire. Beside it every task has a map of low rank that
starts at nothing: an answer may want other keys than a copy, from the same latents.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class TaskAdapter(nn.Module):
    """Low-rank maps of latents, one per task.

    Attributes:
      tasks: how many there are.
      size: numbers that a latent becomes.
      rank: of each map.
    """

    tasks: int
    size: int
    rank: int

    @nn.compact
    def __call__(
        self, z: Float[Array, "b m z"], task: Int[Array, " b"]
    ) -> Float[Array, "b m e"]:
        """What the task of each text adds.

        Args:
          z: latents.
          task: number of each text's task.
        """
        width = z.shape[-1]
        small = nn.initializers.normal(width**-0.5)
        a = self.param("a", small, (self.tasks, width, self.rank))
        b = self.param("b", nn.initializers.zeros, (self.tasks, self.rank, self.size))
        return jnp.einsum("bmz,bzr,bre->bme", z, a[task], b[task])
