"""Where the learned keys and values that ask for a text begin: at words that ask for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from latent_jax.backbones.decoder import Decoder, inverse_frequencies
from latent_jax.ops import rope
from latent_jax.systems.latentwire.config import TASKS
from latent_jax.systems.latentwire.losses import raw_text
from latent_jax.systems.latentwire.model import Compressor, read

#: They are repeated to as many tokens as there are entries.
WORDS = "\nThe same text again, word for word:\n"


def start(
    model: Compressor,
    params: Mapping[str, Any],
    frozen: Any,
    tokenizer: Any,
    batch: Mapping[str, Array],
) -> dict[str, Array]:
    """What `Compressor.instructed` and the task's vector begin as.

    The entries are the mean keys and values of `WORDS` behind some texts; the vector, which the
    reader sees last, is the token before every text: what follows that token is how a text begins.

    Args:
      model: with ``rebuild_entries``.
      params: measured, so that the entries can be put in its units.
      frozen: parameters of the reader.
      tokenizer: its tokenizer.
      batch: with ``context`` and ``context_mask``.
    """
    body, n = Decoder(model.reader), model.config.rebuild_entries
    ids, mask = jnp.asarray(batch["context"]), jnp.asarray(batch["context_mask"])
    words = np.resize(np.asarray(tokenizer.encode(WORDS), np.int32), n)
    x = jnp.asarray(frozen["embed"])[words]
    prefix = raw_text(body, frozen, ids, mask, model.sink)
    said = read(
        body, frozen, prefix, jnp.broadcast_to(x, (len(ids), *x.shape)),
        jnp.ones((len(ids), n), bool),
    ).kv  # fmt: skip
    where = prefix.start[:, None] + jnp.arange(n)
    k = rope.rotate_layers(said.k, -where, jnp.asarray(inverse_frequencies(model.reader)))
    rows = jnp.concatenate([k, said.v], axis=-1).astype(jnp.float32).mean(1)
    asking = (rows - params["centre"][:, None]) / params["spread"][:, None]
    tasks = jnp.asarray(params["tasks"])
    if model.sink is not None:
        tasks = tasks.at[TASKS.index("reconstruct")].set(frozen["embed"][model.sink])
    return {"asking": asking, "tasks": tasks}
