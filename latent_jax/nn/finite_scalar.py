"""FSQ and LFQ as Linen modules with the interface of `ResidualVQ`: no codebook to learn."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from latent_jax.core.errors import ConfigError
from latent_jax.core.types import Mean
from latent_jax.nn.vq_outputs import Quantized
from latent_jax.ops import fsq as ops
from latent_jax.ops import vq_metrics

# A histogram of more codes than this says little and costs much.
_MOST_BINS = 2**16


def _check(module: nn.Module, x: Array, mask: Array | None) -> None:
    name = type(module).__name__
    if x.shape[-1] != module.dim:
        raise ConfigError(f"{name}: got vectors of width {x.shape[-1]}, dim is {module.dim}")
    if mask is not None and mask.shape != x.shape[:-1]:
        raise ConfigError(f"{name}: mask {mask.shape} does not fit {x.shape[:-1]} vectors")
    if module.stages < 1:
        raise ConfigError(f"{name}: stages={module.stages} must be at least 1")


def _figures(indices: Array, codes: int, error: Mean) -> dict[str, Any]:
    out: dict[str, Any] = {"quantisation_error": error}
    out["joint_perplexity"] = vq_metrics.joint_perplexity(indices)
    if codes <= _MOST_BINS:
        count = vq_metrics.histogram(indices, codes)
        out |= {**vq_metrics.usage(count), "usage": count}
        out["perplexity_product"] = jnp.prod(out["perplexity"])
    return jax.lax.stop_gradient(out)


class _Projected(nn.Module):
    """Projection to the quantiser's few dimensions and back; none where they are ``dim``.

    A quantiser adds its own fields, ``stages`` among them.
    """

    dim: int

    @property
    def digits(self) -> int:
        """Indices per vector."""
        return self.stages

    def _project(self, inner: int) -> None:
        if inner != self.dim:
            self.project_in, self.project_out = nn.Dense(inner), nn.Dense(self.dim)

    def _enter(self, x: Array, mask: Array | None, inner: int) -> tuple[Array, Array]:
        _check(self, x, mask)
        keep = jnp.ones(x.shape[:-1], bool) if mask is None else mask.astype(bool)
        z = jnp.where(keep[..., None], x.astype(jnp.float32), 0.0)
        return (self.project_in(z) if inner != self.dim else z), keep

    def _leave(self, value: Array, keep: Array, inner: int, dtype: Any) -> Array:
        out = self.project_out(value) if inner != self.dim else value
        return jnp.where(keep[..., None], out, 0.0).astype(dtype)


class FSQ(_Projected):
    """Finite scalar quantisation (Mentzer et al. 2023).

    Attributes:
      dim: width of the vectors.
      levels: values of each quantised dimension; their product is the number of codes.
      stages: depth; every stage after the first refines the cell of the one before.
    """

    levels: tuple[int, ...] = (8, 5, 5, 5)
    stages: int = 1

    def setup(self) -> None:
        if len(self.levels) < 1 or min(self.levels) < 3 or math.prod(self.levels) >= 2**31:
            raise ConfigError(
                f"FSQ: levels={self.levels} must be at least 3 each (LFQ has 2), with a product "
                "below 2^31"
            )
        self._project(len(self.levels))

    @property
    def codes(self) -> int:
        """Codes per stage."""
        return math.prod(self.levels)

    def decode(self, indices: Int[Array, "*b s"]) -> Float[Array, "*b d"]:
        """Vectors of digits."""
        value = ops.fsq_decode(indices, self.levels)
        return self.project_out(value) if len(self.levels) != self.dim else value

    def __call__(
        self,
        x: Float[Array, "*b d"],
        mask: Bool[Array, "*b"] | None = None,
        train: bool = False,
        frozen: bool = False,
        step: Int[Array, ""] | int | None = None,
    ) -> Quantized:
        """Quantises ``x``; see `ResidualVQ` (training changes nothing, there is no loss)."""
        inner = len(self.levels)
        z, keep = self._enter(x, mask, inner)
        value, indices = ops.fsq(z, self.levels, self.stages)
        indices = jnp.where(keep[..., None], indices, -1)
        half = jnp.asarray([n // 2 for n in self.levels], jnp.float32)
        gap = value - ops.fsq_bound(z, self.levels) / half
        figures = _figures(indices, self.codes, Mean.of(gap**2, keep[..., None]))
        out = self._leave(value, keep, inner, x.dtype)
        return Quantized(out, indices, jnp.float32(0.0), {}, figures)


class LFQ(_Projected):
    """Lookup-free quantisation (Yu et al. 2023): one bit per dimension and stage.

    Attributes:
      dim: width of the vectors.
      bits: quantised dimensions.
      stages: depth; the codes of stage ``s`` are scaled by ``2^-s``.
      commitment: weight of the squared distance to the code.
      entropy: weight of (entropy per row - ``diversity`` * entropy of the mean).
      diversity: weight of the second within the first.
      temperature: of the soft bits.
    """

    bits: int = 10
    stages: int = 1
    commitment: float = 0.25
    entropy: float = 0.1
    diversity: float = 1.0
    temperature: float = 1.0

    def setup(self) -> None:
        if not 1 <= self.bits <= 30:
            raise ConfigError(f"LFQ: bits={self.bits} must be in 1 to 30")
        self._project(self.bits)

    @property
    def codes(self) -> int:
        """Codes per stage."""
        return 2**self.bits

    def decode(self, indices: Int[Array, "*b s"]) -> Float[Array, "*b d"]:
        """Vectors of digits."""
        value = ops.lfq_decode(indices, self.bits)
        return self.project_out(value) if self.bits != self.dim else value

    def __call__(
        self,
        x: Float[Array, "*b d"],
        mask: Bool[Array, "*b"] | None = None,
        train: bool = False,
        frozen: bool = False,
        step: Int[Array, ""] | int | None = None,
    ) -> Quantized:
        """Quantises ``x``; see `ResidualVQ`."""
        z, keep = self._enter(x, mask, self.bits)
        value, indices = ops.lfq(z, self.stages)
        indices = jnp.where(keep[..., None], indices, -1)
        gap = Mean.of((z - jax.lax.stop_gradient(value)) ** 2, keep[..., None])
        losses = {"commitment": gap}
        loss = self.commitment * gap.value
        if train and self.entropy:
            flat, on = z.reshape(-1, self.bits), keep.reshape(-1)
            each, mean = ops.lfq_entropy(flat, on, self.temperature)
            rows = on.sum().astype(jnp.float32)
            losses["entropy"] = Mean((each - self.diversity * mean) * rows, rows)
            loss = loss + self.entropy * losses["entropy"].value
        out = self._leave(value, keep, self.bits, x.dtype)
        return Quantized(out, indices, loss, losses, _figures(indices, self.codes, gap))
