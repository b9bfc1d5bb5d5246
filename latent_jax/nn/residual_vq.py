"""Residual vector quantisation as a Linen module."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from latent_jax.core.errors import ConfigError
from latent_jax.core.types import Mean
from latent_jax.nn import vq_outputs, vq_step
from latent_jax.nn.vq_config import VQConfig
from latent_jax.nn.vq_outputs import Quantized
from latent_jax.ops import rvq, vq, vq_state
from latent_jax.ops.vq_state import Codebooks


class ResidualVQ(nn.Module):
    """Quantises vectors by a sum of codes, one per stage.

    Codebooks and their statistics live in the collection ``codebook``, in fp32. They move when
    ``train`` is true and the collection is mutable, and otherwise keep every bit. Codebooks learned
    by gradient are the parameter ``codebook``; the collection then holds what initialisation and
    restarts added to it.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from latent_jax import ResidualVQ
      >>> class AutoEncoder(nn.Module):
      ...   @nn.compact
      ...   def __call__(self, x, train=False):
      ...     out = ResidualVQ(dim=4, codes=8, stages=2)(nn.Dense(4)(x), train=train)
      ...     return nn.Dense(x.shape[-1])(out.quantized), out.indices, out.loss
      >>> model, x = AutoEncoder(), jax.random.normal(jax.random.key(0), (32, 6))
      >>> variables = jax.jit(model.init)(jax.random.key(1), x)
      >>> step = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["codebook"]))
      >>> (y, indices, loss), moved = step(variables, x)
      >>> y.shape, indices.shape
      ((32, 6), (32, 2))

    Attributes:
      dim: width of the vectors.
      codes: codes per stage, or a tuple with the size of each stage.
      stages: depth.
      config: everything else.

    Random choices (sampling, dropout, initialisation, restarts) use the stream ``codes`` where one
    is given, and otherwise the config's seed with the number of training steps so far.

    Raises:
      ConfigError: impossible sizes, or an input of another width.
    """

    dim: int
    codes: int | tuple[int, ...] = 1024
    stages: int = 8
    config: VQConfig = VQConfig()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Codes of each stage."""
        if isinstance(self.codes, int):
            return (self.codes,) * self.stages
        return tuple(self.codes)

    @property
    def digits(self) -> int:
        """Indices per vector."""
        return self.stages * self.config.groups

    def _check(self) -> None:
        c = self.config
        if self.dim < 1 or self.stages < 1 or len(self.sizes) < 1 or min(self.sizes) < 1:
            raise ConfigError(
                f"ResidualVQ: dim={self.dim}, stages={self.stages} and codes={self.codes} must be "
                "at least 1"
            )
        if len(self.sizes) != self.stages:
            raise ConfigError(f"ResidualVQ: {self.stages} stages, but codes={self.codes}")
        if c.code_dim is None and self.dim % c.groups:
            raise ConfigError(f"ResidualVQ: groups={c.groups} must divide dim={self.dim}")
        if c.shared and len(set(self.sizes)) > 1:
            raise ConfigError("ResidualVQ: a shared codebook needs stages of one size")
        if c.stage_weights and len(c.stage_weights) != self.stages:
            raise ConfigError(
                f"ResidualVQ: {len(c.stage_weights)} stage_weights for {self.stages} stages"
            )
        if max(c.beam, c.eval_beam) > min(self.sizes):
            raise ConfigError(
                f"ResidualVQ: beam={max(c.beam, c.eval_beam)} is wider than {min(self.sizes)} codes"
            )
        if c.reset.protect > min(self.sizes):
            raise ConfigError(
                f"ResidualVQ: reset.protect={c.reset.protect} of {min(self.sizes)} codes"
            )

    def setup(self) -> None:
        self._check()
        c, groups = self.config, self.config.groups
        self.width = c.code_dim or self.dim // groups
        self.live = vq_step.live_mask(self.sizes[:1] if c.shared else self.sizes)
        if c.code_dim is not None:
            self.project_in = nn.Dense(groups * self.width)
            self.project_out = nn.Dense(self.dim)
        shape = (groups, *self.live.shape, self.width)
        live = jnp.asarray(self.live)[..., None]

        def draw(key: jax.Array) -> Array:
            code = jax.random.normal(key, shape) * self.width**-0.5
            return jnp.where(live, vq.unit(code) if c.distance == "cosine" else code, 0.0)

        self.gradient = c.learn == "gradient"
        if self.gradient:
            self.param_code = self.param("codebook", draw)
        ready = c.init == "random"
        drawn = ready and not self.gradient and self.is_initializing()
        start = draw(self.make_rng("params")) if drawn else jnp.zeros(shape)
        fresh = jax.vmap(lambda code: vq_state.fresh(code, jnp.asarray(self.live), ready))(start)
        self.held = {
            ("offset" if self.gradient and name == "code" else name): self.variable(
                "codebook", "offset" if self.gradient and name == "code" else name, lambda v=v: v
            )
            for name, v in fresh._asdict().items()
            if not (self.gradient and name in ("norm", "size", "total"))
        }
        self.count = self.variable("codebook", "step", jnp.zeros, (), jnp.int32)

    def read(self) -> Codebooks:
        """The codebooks, each array with the groups in front."""
        held = {name: v.value for name, v in self.held.items()}
        if not self.gradient:
            return Codebooks(**held)
        code = self.param_code + held.pop("offset")
        sizes = jnp.broadcast_to(jnp.asarray(self.live, jnp.float32), code.shape[:-1])
        fixed = jax.lax.stop_gradient(code)
        return Codebooks(code=code, norm=vq_state.norms(code), size=sizes, total=fixed, **held)

    def _write(self, old: Codebooks, new: Codebooks) -> None:
        for name, variable in self.held.items():
            if name == "offset":
                moved = new.code - jax.lax.stop_gradient(self.param_code)
                moved = jnp.where(new.code == old.code, variable.value, moved)
                variable.value = jax.lax.stop_gradient(moved)
            else:
                variable.value = jax.lax.stop_gradient(getattr(new, name))

    def codebooks(self) -> Float[Array, "g s k d"]:
        """The codes of every group and stage, as they are looked up."""
        code = self.read().code
        shape = (code.shape[0], self.stages, *code.shape[2:])
        return jnp.broadcast_to(code, shape) if self.config.shared else code

    def decode(self, indices: Int[Array, "*b s"]) -> Float[Array, "*b d"]:
        """Vectors of digits; an index of -1 adds nothing. Codes are constants here.

        Raises:
          ConfigError: another number of digits.
        """
        if indices.shape[-1] != self.digits:
            raise ConfigError(f"decode: {indices.shape[-1]} digits where there are {self.digits}")
        code = jax.lax.stop_gradient(self.codebooks())
        parts = [
            rvq.decode(indices[..., g * self.stages : (g + 1) * self.stages], code[g])
            for g in range(self.config.groups)
        ]
        out = jnp.concatenate(parts, -1)
        return out if self.config.code_dim is None else self.project_out(out)

    def encode(
        self, x: Float[Array, "*b d"], mask: Bool[Array, "*b"] | None = None
    ) -> Int[Array, "*b s"]:
        """Digits of vectors, in evaluation mode."""
        return self(x, mask).indices

    def __call__(
        self,
        x: Float[Array, "*b d"],
        mask: Bool[Array, "*b"] | None = None,
        train: bool = False,
        frozen: bool = False,
        step: Int[Array, ""] | int | None = None,
    ) -> Quantized:
        """Quantises ``x``.

        Args:
          x: vectors; the compute is fp32 whatever their type.
          mask: True at vectors that count; the others enter no average, loss or metric.
          train: training behaviour; the codebooks move if their collection is mutable.
          frozen: keep the codebooks as they are, even in training.
          step: of the schedules; by default the number of training steps so far.
        """
        c = self.config
        if x.shape[-1] != self.dim:
            raise ConfigError(f"ResidualVQ: got vectors of width {x.shape[-1]}, dim is {self.dim}")
        if mask is not None and mask.shape != x.shape[:-1]:
            raise ConfigError(f"ResidualVQ: mask {mask.shape} does not fit {x.shape[:-1]} vectors")
        lead = x.shape[:-1]
        keep = jnp.ones(lead, bool) if mask is None else mask.astype(bool)
        keep = keep.reshape(-1)
        # A select, not a product: a NaN in padding must reach nothing.
        z = jnp.where(keep[:, None], x.reshape(-1, self.dim).astype(jnp.float32), 0.0)
        if c.code_dim is not None:
            z = jnp.where(keep[:, None], self.project_in(z), 0.0)
        z = z.reshape(-1, c.groups, self.width).swapaxes(0, 1)
        moving = train and not frozen and not self.is_initializing()
        moving = moving and self.is_mutable_collection("codebook")
        step = self.count.value if step is None else step
        at = vq_step.knobs(c, step)
        if self.has_rng("codes"):
            key = self.make_rng("codes")
        else:
            key = jax.random.fold_in(jax.random.key(c.seed), self.count.value)
        old = self.read()
        weights = jnp.asarray(c.stage_weights or (1.0,) * self.stages, jnp.float32)
        # Codebooks by gradient need the statistics for their loss; frozen ones for nothing.
        collect = moving or (train and self.gradient)

        def group(state: Codebooks, z: Array, key: jax.Array):
            first, draw, mix = jax.random.split(key, 3)
            if moving and c.init != "random":
                state = vq_step.initialise(c, state, self.live, z, keep, first, self.stages)
            found, valid = vq_step.quantise(
                c, state, self.live, z, keep, at, draw, self.stages, train, weights, collect
            )
            table = vq_step.stages_of(c, state, self.live, self.stages)
            losses = vq_outputs.losses(
                c, table, self.live, self.sizes, z, keep, found, weights, train
            )
            if moving:
                state = vq_step.update(c, state, self.live, found, valid, at, mix)
            return state, found, losses

        if c.groups == 1:
            lifted = group(*jax.tree.map(lambda a: a[0], (old, z)), key)
            new, found, losses = jax.tree.map(lambda a: a[None], lifted)
        else:
            keys = jax.random.split(key, c.groups)
            new, found, losses = jax.lax.map(lambda each: group(*each), (old, z, keys))
        losses = {name: Mean(m.sum.sum(), m.count.sum()) for name, m in losses.items()}
        if moving:
            self._write(old, new)
            self.count.value = self.count.value + 1

        value = found.quantised
        if train and c.bypass.used:
            value = value + at.bypass * (z - value)
        out = vq.rotate(z, value) if c.rotation else vq.straight_through(z, value)
        out = out.swapaxes(0, 1).reshape(-1, c.groups * self.width)
        if c.code_dim is not None:
            out = self.project_out(out)
        out = jnp.where(keep[:, None], out, 0.0).reshape(*lead, self.dim).astype(x.dtype)
        indices = jnp.moveaxis(found.indices, 0, 1).reshape(*lead, self.digits)
        loss = sum(getattr(c, n)(step) * m.value for n, m in losses.items() if n != "codebook")
        loss = loss + losses["codebook"].value if self.gradient else loss
        metrics = vq_outputs.metrics(c, self.live, self.sizes, found, keep, indices, new)
        return Quantized(out, indices, loss, losses, metrics)
