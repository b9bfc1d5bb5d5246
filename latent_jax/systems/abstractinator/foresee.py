"""The small byte model whose uncertainty cuts segments."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.scipy.stats import norm
from jaxtyping import Array, Bool, Float, Int

from latent_jax.systems.abstractinator.config import EntropyConfig
from latent_jax.systems.abstractinator.layers import Stack, sliding_mask
from latent_jax.systems.abstractinator.tokenizer import BOS, VOCAB

# A byte is one of 256 points: without a floor its density, and the loss, would have no bound.
_NARROWEST = 0.05


class Gaussian(NamedTuple):
    """A prediction of each byte's embedding, and that embedding.

    Attributes:
      mean: of each number.
      scale: standard deviation of each number.
      target: the embedding, at zero mean and unit variance over its numbers, a constant.
    """

    mean: Float[Array, "b t c"]
    scale: Float[Array, "b t c"]
    target: Float[Array, "b t c"]

    def nats(self) -> Float[Array, "b t"]:
        """Minus the log density, per number of the embedding."""
        return -jnp.mean(norm.logpdf(self.target, self.mean, self.scale), -1)

    def bits(self) -> Float[Array, "b t"]:
        """Differential entropy, per number of the embedding."""
        return jnp.mean(jnp.log2(self.scale), -1) + 0.5 * jnp.log2(2 * jnp.pi * jnp.e)


class Foreseen(NamedTuple):
    """What is foreseen of each byte from those before it; None where there is no such head."""

    logits: Float[Array, "b t v"] | None
    gaussian: Gaussian | None

    def bits(self, gaussian: bool) -> Float[Array, "b t"]:
        """Entropy of a head's prediction: of a byte, or per number of its embedding."""
        if gaussian:
            return self.gaussian.bits()
        log_p = jax.nn.log_softmax(self.logits)
        return -jnp.sum(jnp.exp(log_p) * log_p, -1) / jnp.log(2.0)


class EntropyModel(nn.Module):
    """A causal sliding-window transformer over bytes.

    Attributes:
      config: its size and heads.
    """

    config: EntropyConfig

    @nn.compact
    def __call__(self, ids: Int[Array, "b t"], valid: Bool[Array, "b t"]) -> Foreseen:
        """Predictions of each byte, from the bytes before it."""
        c = self.config
        table = nn.Embed(VOCAB, c.width, name="bytes")
        before = jnp.pad(ids[:, :-1], ((0, 0), (1, 0)), constant_values=BOS)
        stack = Stack(c.layers, c.width, c.heads, c.ff, name="stack")
        x = stack(table(before), sliding_mask(valid, c.reach))
        logits = None if c.head == "gaussian" else nn.Dense(256, name="head")(x)
        if c.head == "logits":
            return Foreseen(logits, None)
        mean, spread = jnp.split(nn.Dense(2 * c.width, name="gaussian")(x), 2, -1)
        # Held: embeddings that follow their own prediction would all become the same.
        target = jax.lax.stop_gradient(jax.nn.standardize(table(ids)))
        return Foreseen(logits, Gaussian(mean, jax.nn.softplus(spread) + _NARROWEST, target))
