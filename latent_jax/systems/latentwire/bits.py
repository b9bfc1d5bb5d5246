"""Quality against bits: the same latents, rounded as the wire would round them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from latent_jax.ops import wire as codec
from latent_jax.ops.bootstrap import difference_interval
from latent_jax.systems.latentwire import baselines
from latent_jax.systems.latentwire.compressed import Compressed

#: Scores that are compared between formats; of answers and of reconstructions.
_QA = ("f1", "em")
_AE = ("token_accuracy", "exact_match", "nll")


class Memory:
    """Wires of batches of texts, as they were before rounding: formats differ in nothing else."""

    def __init__(self):
        self.wires: dict[bytes, Any] = {}

    def encode(self, latents: Compressed, ids: np.ndarray, mask: np.ndarray) -> Any:
        """The wire of a batch, from memory if it was here before."""
        ids, mask = np.asarray(ids), np.asarray(mask)
        key = repr(ids.shape).encode() + ids.tobytes() + mask.tobytes()
        if key not in self.wires:
            made = baselines.encode(latents, jnp.asarray(ids), jnp.asarray(mask))
            self.wires[key] = jax.tree.map(np.asarray, made)  # not in the accelerator's memory
        return jax.tree.map(jnp.asarray, self.wires[key])


@flax.struct.dataclass
class Rounded:
    """A compressor whose latents have travelled in a number format; implements `Compressed`.

    Attributes:
      inner: the compressor.
      centre: taken off before rounding, as `wire.pack` does; None for none.
      form: of `ops.wire.FORMATS`.
      memory: shared by those that round the same texts' wires; None makes every wire anew.
    """

    inner: Compressed
    centre: Float[Array, " z"] | None
    form: str = flax.struct.field(pytree_node=False)
    memory: Memory | None = flax.struct.field(default=None, pytree_node=False)

    def compress(self, ids, mask):
        """See `Compressed.compress`."""
        return self._rounded(self.inner.compress(ids, mask))

    def encode(self, ids, mask):
        """The same outside of a compiled function, by memory."""
        memory = Memory() if self.memory is None else self.memory
        return self._rounded(memory.encode(self.inner, ids, mask))

    def _rounded(self, wire):
        centre = 0.0
        if self.centre is not None and self.form.startswith("int"):
            centre = self.centre
        return wire._replace(z=codec.round_trip(wire.z - centre, self.form) + centre)

    def prefix(self, wire):
        """See `Compressed.prefix`."""
        return self.inner.prefix(wire)

    def received(self, wire):
        """See `Compressed.received`."""
        return self.inner.received(wire)

    def segments(self, wire):
        """See `Compressed.segments`."""
        return self.inner.segments(wire)

    def task(self, name, batch):
        """See `Compressed.task`."""
        return self.inner.task(name, batch)

    def instructed(self, given, name):
        """See `Compressed.instructed`."""
        return self.inner.instructed(given, name)

    def for_task(self, name):
        """See `Compressed.for_task`."""
        return self.replace(inner=self.inner.for_task(name))

    def deltas(self):
        """See `Compressed.deltas`."""
        return self.inner.deltas()


def mean_latent(
    latents: Compressed, batches: Iterable[tuple[Int[Array, "b t"], Bool[Array, "b t"]]]
) -> Float[np.ndarray, " z"] | None:
    """Mean over all latents of some right-padded texts; None without any."""
    total, count = 0.0, 0
    for ids, mask in batches:
        wire = baselines.encode(latents, jnp.asarray(ids), jnp.asarray(mask))
        real = np.asarray(wire.z, np.float64)[np.asarray(wire.mask)]
        total, count = total + real.sum(0), count + len(real)
    return np.asarray(total / count, np.float32) if count else None


def report(
    width: int,
    ratio: float,
    scores: Mapping[str, tuple[Mapping[str, Any], Sequence[float]]],
    exact: Sequence[float],
    seed: int = 0,
) -> dict[str, Any]:
    """``wire.<bits>.*`` of several formats.

    Args:
      width: numbers per latent.
      ratio: text tokens per latent, as measured.
      scores: format → (metrics of the evaluation, F1 of every question).
      exact: F1 of every question with the latents as they are.
      seed: of the intervals.

    Returns:
      ``f1, em, token_accuracy, exact_match, nll`` with intervals, ``f1_loss`` (the paired
      difference to exact latents), and ``bytes_per_token``: scales and payload for one token of
      text, without the header (a few hundred bytes per file).
    """
    out: dict[str, Any] = {}
    for form, (found, f1) in scores.items():
        name = f"wire.{form}"
        out[f"{name}.bytes_per_token"] = sum(codec.sizes(1, width, form)) / ratio
        for key in (*(f"squad.{k}.latent" for k in _QA), *(f"ae.{k}" for k in _AE)):
            if key in found:
                short = f"{name}.{key.split('.')[1]}"
                out[short] = found[key]
                if f"{key}.ci95" in found:
                    out[f"{short}.ci95"] = found[f"{key}.ci95"]
        if len(f1):
            out[f"{name}.f1_loss"] = float(np.mean(exact) - np.mean(f1))
            low, high = difference_interval(np.asarray(exact), np.asarray(f1), seed=seed)
            out[f"{name}.f1_loss.ci95"] = [low, high]
    return out
