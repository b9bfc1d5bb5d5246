"""A frozen language model: weights, architecture and tokenizer behind one small interface."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from latent_jax.backbones.config import DecoderConfig
from latent_jax.backbones.decoder import Decoder
from latent_jax.backbones.tokenizer import Tokenizer
from latent_jax.core.errors import BackboneError


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A loaded language model.

    Attributes:
      name: what it was loaded as.
      config: architecture.
      params: the decoder's parameter tree (kernels [in, out], stacked over layers).
      tokenizer: text ↔ ids.
      sha256: digest of the files the weights come from.
      decoder: the Flax module that `params` belong to.
    """

    name: str
    config: DecoderConfig
    params: Any = dataclasses.field(repr=False)
    tokenizer: Tokenizer = dataclasses.field(repr=False)
    sha256: str
    decoder: Decoder = dataclasses.field(repr=False)

    @property
    def dtype(self) -> jnp.dtype:
        """Of the weights, which is also the compute dtype of `embed` and `logits`."""
        return self.params["embed"].dtype

    def embed(self, ids: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """Input embeddings of token ids."""
        self._check(ids)
        return _embed(self.decoder, self.params, jnp.asarray(ids, jnp.int32))

    def logits(
        self, ids: Int[Array, "b t"], mask: Bool[Array, "b t"] | None = None
    ) -> Float[Array, "b t v"]:
        """Next-token logits at every position, fp32.

        Args:
          ids: token ids.
          mask: valid tokens; padding may be on the left or right. All are valid by default.

        Raises:
          BackboneError: an id outside the vocabulary, or more tokens than the context window.
        """
        self._check(ids)
        ids = jnp.asarray(ids, jnp.int32)
        mask = jnp.ones(ids.shape, bool) if mask is None else jnp.asarray(mask, bool)
        return _logits(self.decoder, self.params, ids, mask)

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        max_new_tokens: int = 64,
        **options: Any,
    ) -> Any:
        """Continues prompts; options and result are `generate_text.generate_text`'s."""
        from latent_jax.backbones.generate_text import generate_text  # it needs Backbone's type

        return generate_text(self, prompts, max_new_tokens=max_new_tokens, **options)

    def _check(self, ids: Any) -> None:
        """Refuses ids that the tables would silently turn into NaN, where they are known."""
        if isinstance(ids, jax.Array):  # traced, or on a device: looking would wait for it
            shape = ids.shape
        else:
            ids = np.asarray(ids)
            shape = ids.shape
            if ids.size and not 0 <= ids.min() <= ids.max() < self.config.vocab_size:
                bad = ids.min() if ids.min() < 0 else ids.max()
                raise BackboneError(
                    f"{self.name}: token id {bad} is outside the vocabulary of "
                    f"{self.config.vocab_size}."
                )
        if len(shape) != 2:
            raise BackboneError(f"{self.name}: ids of shape {shape}; [batch, tokens] is needed.")
        if shape[1] > self.config.max_position:
            raise BackboneError(
                f"{self.name}: {shape[1]} tokens exceed the context window of "
                f"{self.config.max_position}; shorten the text."
            )

    def parameter_count(self) -> int:
        """Number of weights."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))


@functools.partial(jax.jit, static_argnums=0)
def _embed(decoder: Decoder, params: Any, ids: Array) -> Array:
    return decoder.apply({"params": params}, ids, method="embed")


@functools.partial(jax.jit, static_argnums=0)
def _logits(decoder: Decoder, params: Any, ids: Array, mask: Array) -> Array:
    variables = {"params": params}
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    embeds = decoder.apply(variables, ids, method="embed")
    hidden = decoder.apply(variables, embeds, positions, mask).hidden
    return decoder.apply(variables, hidden, method="unembed")
