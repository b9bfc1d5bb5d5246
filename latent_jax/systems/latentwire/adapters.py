"""What stands between the linear map of the wire and the reader: residuals, size, vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from latent_jax.ops.vq import straight_through
from latent_jax.systems.latentwire.adapter_config import AdapterConfig
from latent_jax.systems.latentwire.codes import as_variables

#: Weight of the squared error beside the cosine, in losses on embeddings.
ERROR = 0.1


def rms(x: Float[Array, "*b d"], mask: Bool[Array, "*b"] | None = None) -> Float[Array, ""]:
    """Root of the mean square over all (masked) rows."""
    square = jnp.square(x.astype(jnp.float32)).mean(-1)
    if mask is None:
        return jnp.sqrt(square.mean())
    return jnp.sqrt((square * mask).sum() / jnp.maximum(mask.sum(), 1))


def calibrate(
    kind: str, y: Float[Array, "b m d"], mask: Bool[Array, "b m"], table: Float[Array, "v d"]
) -> Float[Array, "b m d"]:
    """Brings soft tokens to the size of a vocabulary's embeddings.

    Texts are calibrated one by one: what a reader gets must not depend on who shares its batch.

    Args:
      kind: ``embed_rms``, one factor for a text; ``token_rms``, one for every token, which takes
        away that some tokens are larger than others; ``distribution``, mean and spread of each
        dimension over the text's tokens become the vocabulary's.
      y: soft tokens.
      mask: which are real.
      table: the embeddings.
    """
    table, real = table.astype(jnp.float32), mask[..., None]
    if kind == "embed_rms":
        square = (jnp.square(y).mean(-1) * mask).sum(-1) / jnp.maximum(mask.sum(-1), 1)
        return y * (rms(table) / jnp.sqrt(square + 1e-12))[:, None, None]
    if kind == "token_rms":
        own = jnp.sqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-12)
        return y * rms(table) / own
    count = jnp.maximum(mask.sum(-1), 1)[:, None, None]
    mean = (y * real).sum(1, keepdims=True) / count
    spread = jnp.sqrt((jnp.square(y - mean) * real).sum(1, keepdims=True) / count + 1e-8)
    return (y - mean) / spread * table.std(0) + table.mean(0)


def nearest(
    y: Float[Array, "b m d"], table: Float[Array, "v d"], k: int, temperature: float = 0.05
) -> Float[Array, "b m d"]:
    """Mean of the ``k`` embeddings of largest cosine, weighed by a softmax of the cosines."""
    table = table.astype(jnp.float32)
    unit = lambda x: x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-6)  # noqa: E731
    found, index = jax.lax.top_k(unit(y) @ unit(table).T, k)
    weight = jax.nn.softmax(found / temperature, -1)
    return jnp.einsum("bmk,bmkd->bmd", weight, table[index])


class Adapter(nn.Module):
    """``residual``, ``calibration`` and ``transform`` of an `AdapterConfig`, in this order.

    Attributes:
      config: which of them.
    """

    config: AdapterConfig

    @nn.compact
    def __call__(
        self,
        z: Float[Array, "b m z"],
        y: Float[Array, "b m d"],
        mask: Bool[Array, "b m"],
        table: Float[Array, "v d"] | None,
    ) -> Float[Array, "b m d"]:
        """Adapts what the reader gets.

        Args:
          z: latents, of which ``film`` and ``mlp`` are functions.
          y: what the linear map makes of them.
          mask: which are real.
          table: the reader's input embeddings; None where neither size nor vocabulary matters.
        """
        c, size = self.config, y.shape[-1]
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        if c.residual == "affine":
            factor = self.param("factor", ones, (size,))
            y = y * factor + self.param("shift", zeros, (size,))
        elif c.residual != "none":
            x = nn.LayerNorm(name="norm")(z.astype(jnp.float32))
            if c.residual == "film":
                film = nn.Dense(2 * size, kernel_init=zeros, name="film")(x)
                factor, shift = jnp.split(film, 2, -1)
                y = y * (1 + factor) + shift
            else:
                inner = nn.gelu(nn.Dense(c.hidden, name="inner")(x))
                y = y + nn.Dense(size, kernel_init=zeros, name="outer")(inner)
        if c.calibration == "colour":
            colour = self.param("colour", ones, (size,))
            y = y * colour + self.param("colour_shift", zeros, (size,))
        elif c.calibration != "none":
            y = calibrate(c.calibration, y, mask, table)
        if c.transform == "codebook":
            # Codes start as embeddings, evenly spaced in the vocabulary.
            rows = np.linspace(0, len(table) - 1, c.codes).astype(int)
            codes = self.param("codes", lambda _: table[rows].astype(jnp.float32))
            score = y @ codes.T / jnp.mean(jnp.square(codes).sum(-1))
            y = jax.nn.softmax(score / 0.1, -1) @ codes
        elif c.transform == "nearest":
            y = straight_through(y, nearest(y, table, c.neighbours))
        elif c.transform == "anchor":
            one = jax.lax.stop_gradient(nearest(y, table, 1))
            y = one + c.offset * (y - one)
        return y


def fit_colour(
    model: Any, params: Mapping[str, Any], frozen: Any, batches: Iterable[Mapping[str, Any]],
    rows: int = 2048,
) -> dict[str, Any]:  # fmt: skip
    """Starts ``colour`` where the soft tokens of training texts have the mean and spread of the
    vocabulary in every dimension.

    Args:
      model: the compressor.
      params: its parameters, ``colour`` as initialised.
      frozen: parameters of the LLM.
      batches: of training.
      rows: soft tokens to look at.
    """
    run = jax.jit(lambda p, f, i, m: model.apply(as_variables(p), f, i, m)[1:3])
    found, count = [], 0
    for batch in batches:
        soft, mask = run(params, frozen, batch["context"], batch["context_mask"])
        found.append(np.asarray(soft, np.float32)[np.asarray(mask)])
        count += len(found[-1])
        if count >= rows:
            break
    y, table = np.concatenate(found), np.asarray(frozen["embed"], np.float32)
    factor = table.std(0) / (y.std(0) + 1e-6)
    colour = {"colour": factor, "colour_shift": table.mean(0) - y.mean(0) * factor}
    own = params["adapter"] | {k: jnp.asarray(v) for k, v in colour.items()}
    return {**params, "adapter": own}
