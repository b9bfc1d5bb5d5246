"""Where training starts: a small decoder that has the outline of induction heads, and nothing else.

From an unstructured start most of a small model's training passes on a plateau: nothing can be
matched before some head looks at the token before, and no head gains by looking there before
something is matched. A transformer that can look things up has solved this in its first two layers
(Olsson et al. 2022, "In-context learning and induction heads"), so these two start near that
solution. What tokens mean, what follows what, what to ignore and when is learned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from latent_jax.backbones.config import DecoderConfig
from latent_jax.backbones.decoder import inverse_frequencies
from latent_jax.ops import rope

# Length of the table's rows; a state that is all one token has the logit
# sqrt(hidden_size) * length.
ROW_LENGTH = 2.0
# Nats by which a first-layer head prefers its place to far ones.
SHARPNESS = 20.0
# Second layer, per query head: what a query is made of (the token this many places back; 0: its
# own) ...
ASKS = (1, 4, 0, 0, 5, 0)
# ... and per key/value head: the token this many places before a key's. Four heads and two
# take the first of them; the last are for a second token of what is found.
OFFERS = (2, 1, 3)
# Where queries and keys are normalised, what they are multiplied by in the second layer.
MATCH = 2.0


def plain(params: Mapping[str, Any], config: DecoderConfig) -> dict[str, Any]:
    """Longer table rows and smaller residual branches than a freshly initialised decoder's."""
    layers = {name: dict(part) for name, part in params["layers"].items()}
    branch = (2 * config.num_layers) ** -0.5
    for name in ("o", "down"):
        layers[name]["kernel"] = layers[name]["kernel"] * (0.2 * branch)
    rows = params["embed"] / jnp.linalg.norm(params["embed"], axis=-1, keepdims=True)
    return {**params, "embed": ROW_LENGTH * rows, "layers": layers}


def induction(
    params: Mapping[str, Any], config: DecoderConfig, key: jax.Array
) -> dict[str, Any]:
    """`plain`, with the outline of induction heads in the first two layers.

    * Rows of the table share one direction (as those of trained models do): rotary scores of equal
      vectors depend on their distance alone, which is what positional attention needs. Head ``h``
      of the first layer looks ``h + 1`` tokens back and writes what it finds into a subspace of its
      own.
    * Heads of the second layer look for keys that offer what their queries ask for (`ASKS`,
      `OFFERS`), and pass on the token that they find.

    Args:
      params: of `Decoder.init`.
      config: four query and two key/value heads or six and three, at least two layers.
      key: draws the shared direction and the subspaces.
    """
    params = plain(params, config)
    d, heads, groups, width = (
        config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
    )  # fmt: skip
    keys = jax.random.split(key, 3)
    shared = jax.random.normal(keys[0], (d,))
    shared /= jnp.linalg.norm(shared)
    embed = (params["embed"] + ROW_LENGTH * shared) / jnp.sqrt(2.0)
    # A normalised embedding has this much of the shared direction, and as much of its own.
    strength = (d / 2) ** 0.5

    def frames(key, n):
        """``n`` frames of orthonormal directions off the shared one, ``[n, d, width]``."""
        draw = jax.random.normal(key, (n, d, width))
        draw -= shared[:, None] * jnp.einsum("d,ndw->nw", shared, draw)[:, None]
        return jnp.linalg.qr(draw)[0]

    reads, writes = frames(keys[1], groups), frames(keys[2], heads)
    plane = jnp.arange(width) % (width // 2)
    fast = plane < width // 8
    wave = fast * (jnp.arange(width) < width // 2)
    wave = wave * jnp.sqrt(SHARPNESS * width**0.5 / wave.sum())
    back = -(jnp.arange(heads) + 1)[None]
    waves = jnp.broadcast_to(wave, (1, heads, 1, width))
    waves = rope.rotate(waves, back, jnp.asarray(inverse_frequencies(config)))[0, :, 0]

    def columns(parts):
        return jnp.concatenate(list(parts), axis=-1)

    first = {
        "q": jnp.outer(shared, waves.reshape(-1)) / strength,
        "k": jnp.outer(shared, jnp.tile(wave, groups)) / strength,
        # Every head fetches the same part of a token, so that any two can be compared.
        "v": columns([reads[0]] * groups),
        "o": 0.35 * columns(writes).T,
    }
    # Fast planes turn away within a few tokens and cannot match at a distance.
    slow = 1.8 * ~fast
    second = {
        "q": columns(slow * (writes[n - 1] if n else reads[0]) for n in ASKS[:heads]),
        "k": columns(slow * writes[n - 1] for n in OFFERS[:groups]),
        "v": columns(reads),
        "o": 0.5 * columns(reads[h * groups // heads] for h in range(heads)).T,
    }
    layers = {name: dict(part) for name, part in params["layers"].items()}
    for name in first:
        kernel = layers[name]["kernel"]
        for layer, made in enumerate((first[name], second[name])):
            kernel = kernel.at[layer].set(made + 0.2 * kernel[layer])
        layers[name]["kernel"] = kernel
    if config.qk_norm:
        # As long as they are without it.
        length = (SHARPNESS / width**0.5) ** 0.5
        for name in ("q_norm", "k_norm"):
            scale = layers[name]["scale"].at[0].set(length).at[1].set(MATCH)
            layers[name]["scale"] = scale
    return {**params, "embed": embed, "layers": layers}
