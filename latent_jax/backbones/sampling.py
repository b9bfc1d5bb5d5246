"""Next-token choice: greedy, temperature, top-k and nucleus (top-p) sampling.

Every row draws from its own key stream, so what a row produces depends on its own logits, its row
number and the seed only: never on which other rows share the batch.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from latent_jax.core.errors import ConfigError


class SamplingMode(NamedTuple):
    """What of a `Sampling` shapes the compiled program (hashable, a static argument)."""

    greedy: bool
    top_k: int | None
    nucleus: bool


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 is greedy; otherwise logits are divided by it before anything else.
        top_k: keep the k most likely tokens (None: all).
        top_p: keep the smallest set of most likely tokens whose probability reaches p (None:
            all). With `top_k`, the probabilities are those renormalised over the k kept (the
            order used by transformers).

    Raises:
        ConfigError: a value out of range.

    Example:
        >>> Sampling(temperature=0.8, top_k=40).mode
        SamplingMode(greedy=False, top_k=40, nucleus=False)
        >>> Sampling().mode.greedy
        True
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0.0 or self.temperature == float("inf"):
            raise ConfigError(
                f"sampling.temperature is {self.temperature!r}: use 0 for greedy "
                "or a positive number"
            )
        if self.top_k is not None and (isinstance(self.top_k, bool) or int(self.top_k) < 1):
            raise ConfigError(f"sampling.top_k is {self.top_k!r}: use a whole number of at least 1")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ConfigError(
                f"sampling.top_p is {self.top_p!r}: use a number above 0 and at most 1"
            )

    @property
    def mode(self) -> SamplingMode:
        """The static part; temperature and p stay traced, so changing them compiles nothing."""
        greedy = self.temperature == 0.0
        nucleus = self.top_p is not None and self.top_p < 1.0
        return SamplingMode(
            greedy,
            None if greedy or self.top_k is None else int(self.top_k),
            not greedy and nucleus,
        )

    @property
    def values(self) -> tuple[float, float]:
        """The traced part: (temperature, p)."""
        return (float(self.temperature) or 1.0, 1.0 if self.top_p is None else float(self.top_p))


def row_keys(key: Array, rows: Array) -> Array:
    """One independent key per batch row: `fold_in(key, row)`.

    Args:
        key: a PRNG key (typed or raw).
        rows: Int[Array, 'b'], row numbers.

    Returns:
        Keys with leading axis b.
    """
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows)


def nucleus_mask(sorted_logits: Array, top_p: Array | float) -> Array:
    """Which of the descending logits belong to the nucleus.

    Args:
        sorted_logits: Float[Array, 'b n'], descending along the last axis.
        top_p: probability mass to reach.

    Returns:
        Bool[Array, 'b n']: True for the smallest prefix whose probability is at least `top_p`;
        the first entry is always kept.

    Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration".
    """
    probs = jax.nn.softmax(sorted_logits, axis=-1)
    mass_before = jnp.cumsum(probs, axis=-1) - probs
    keep = mass_before < top_p
    return keep.at[..., 0].set(True)


def choose(
    keys: Array, logits: Array, mode: SamplingMode, temperature: Array | float, top_p: Array | float
) -> Array:
    """Choose one token per row.

    Args:
        keys: one key per row (unused when greedy).
        logits: Float[Array, 'b v'].
        mode: static switches of the `Sampling`.
        temperature: traced temperature (> 0).
        top_p: traced nucleus mass.

    Returns:
        Int32[Array, 'b'].
    """
    if mode.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits.astype(jnp.float32) / temperature
    ids = None
    if mode.top_k is not None and mode.top_k < logits.shape[-1]:
        logits, ids = jax.lax.top_k(logits, mode.top_k)
    elif mode.nucleus:
        # Only the nucleus needs the whole vocabulary in order; plain top-k never sorts it.
        ids = jnp.argsort(logits, axis=-1, descending=True)
        logits = jnp.take_along_axis(logits, ids, axis=-1)
    if mode.nucleus:
        logits = jnp.where(nucleus_mask(logits, top_p), logits, -jnp.inf)
    picked = jax.vmap(jax.random.categorical)(keys, logits)
    if ids is not None:
        picked = jnp.take_along_axis(ids, picked[:, None], axis=-1)[:, 0]
    return picked.astype(jnp.int32)


def sample(key: Array, logits: Array, sampling: Sampling = Sampling()) -> Array:  # noqa: B008
    """Choose one token per row from `logits` [b, v]; the convenience form of `choose`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> sample(jax.random.key(0), jnp.array([[0., 3., 1.]])).tolist()
        [1]
    """
    return choose(
        row_keys(key, jnp.arange(logits.shape[0])), logits, sampling.mode, *sampling.values
    )
