"""A compressor as evaluations take it: bound to its weights, as an argument of what is jitted."""

from __future__ import annotations

from typing import Any, Protocol

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from latent_jax.systems.latentwire.codes import as_variables
from latent_jax.systems.latentwire.config import TASKS
from latent_jax.systems.latentwire.given import Given
from latent_jax.systems.latentwire.model import Prefix, own_slots, split_segments


class Compressed(Protocol):
    """A trained compressor bound to its weights: a pytree, so weights are an argument of jit."""

    def compress(self, ids: Int[Array, "b t"], mask: Bool[Array, "b t"]) -> Any:
        """Right-padded texts → wire (a pytree of arrays with a leading batch axis)."""

    def prefix(self, wire: Any) -> Prefix:
        """Wire → what the reader gets."""

    def received(self, wire: Any) -> Bool[Array, "b m"]:
        """Which latents of a wire the reader is given: real, and not private to others. However
        many entries it makes of one, it is one latent.
        """

    def segments(self, wire: Any) -> Any:
        """A wire with one row per segment of each text, as they were compressed."""

    def task(self, name: str, batch: int) -> Float[Array, "b n d"] | None:
        """Learned embeddings between the latents and the prompt, if any."""

    def instructed(self, given: Given, name: str) -> Given:
        """With the learned keys and values, if any, that a task has in front of those."""


    def for_task(self, name: str) -> Compressed:
        """The same, of which the reader gets what a task makes of the latents."""

    def deltas(self) -> Any:
        """Deltas of the reader's projections that are trained with it; None of a frozen reader."""


@flax.struct.dataclass
class Latents:
    """A `Compressor` module with its parameters and its frozen body; implements `Compressed`."""

    module: Any = flax.struct.field(pytree_node=False)
    params: Any
    frozen: Any
    about: int | None = flax.struct.field(pytree_node=False, default=None)

    def compress(self, ids, mask):
        """See `Compressed.compress`."""
        return self._run(self.frozen, ids, mask, method="compress")

    def prefix(self, wire):
        """See `Compressed.prefix`."""
        number = None
        if self.about is not None:
            number = jnp.full(len(wire.mask), self.about, jnp.int32)
        return self._run(wire, frozen=self.frozen, task=number, method="prefix")

    def received(self, wire):
        """See `Compressed.received`."""
        return own_slots(wire, self.module.config).mask

    def segments(self, wire):
        """See `Compressed.segments`."""
        c = self.module.config
        return split_segments(wire, c.segment, c.ratio, sum(c.private_slots.values()))

    def task(self, name, batch):
        """See `Compressed.task`."""
        number = jnp.full((batch,), TASKS.index(name), jnp.int32)
        return self._run(number, asked=name == "answer", method="lead")

    def instructed(self, given, name):
        """See `Compressed.instructed`."""
        if name != "reconstruct":
            return given
        number = jnp.full(given.start.shape, TASKS.index(name), jnp.int32)
        return self._run(given, number, method="instructed")

    def for_task(self, name):
        """See `Compressed.for_task`."""
        if not self.module.config.adapter.task_rank:
            return self
        return self.replace(about=TASKS.index(name))

    def deltas(self):
        """See `Compressed.deltas`."""
        return self._run(method="deltas")

    def from_digits(self, digits):
        """The latents that digits of a discrete wire stand for."""
        return self._run(jnp.asarray(digits), method="from_digits")

    def _run(self, *args, method, **options):
        return self.module.apply(as_variables(self.params), *args, method=method, **options)


def for_task(latents: Compressed | None, name: str | None) -> Compressed | None:
    """A compressor as a task reads it; what all tasks share where there is none."""
    return latents if latents is None or name is None else latents.for_task(name)
