"""The encoder's layers as parameters of their own (``encoder.train: full``).

What is trained, checkpointed and exported is by how much they differ from the frozen LLM's, at
first by nothing: weight decay then pulls towards the LLM and not towards zero, and an export
rounds no more than what training moved. The LLM that reads is left as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import unfreeze

from latent_jax.backbones.config import DecoderConfig
from latent_jax.backbones.decoder import Decoder

#: Name of them among a compressor's parameters, and of the group that they are trained in.
PART = "encoder"


@functools.lru_cache(maxsize=16)
def _shapes(config: DecoderConfig, hidden: bool) -> Any:
    body = Decoder(config, parent=None)
    x = jax.ShapeDtypeStruct((1, 2, config.hidden_size), jnp.float32)
    found = jax.eval_shape(lambda x: body.init(jax.random.key(0), x)["params"], x)
    parts = ("layers", "final_norm") if hidden else ("layers",)
    return {name: found[name] for name in parts}


def blank(config: DecoderConfig, hidden: bool) -> dict[str, Any]:
    """Differences of nothing.

    Args:
      config: the layers that encode.
      hidden: whether their last states are wanted, and so the norm behind them.
    """
    return jax.tree.map(lambda x: jnp.zeros(x.shape), _shapes(config, hidden))


def added(frozen: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The LLM's parameters, which get no gradient, with the differences on top, in fp32.

    Args:
      frozen: of the layers that encode.
      own: of `blank`'s shapes.
    """
    held = jax.lax.stop_gradient({name: frozen[name] for name in own})
    own = unfreeze(own)  # Linen's
    own = jax.tree.map(lambda x, d: x.astype(jnp.float32) + d, held, own)
    return {**frozen, **own}
