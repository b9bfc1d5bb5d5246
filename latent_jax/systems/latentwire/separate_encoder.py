"""An encoder that is another frozen LLM than the reader: a sentence encoder with its own tokenizer.

Batches, evaluations and wires have texts in the reader's tokens. Each of these is spelled once in
the encoder's own tokens, as a table: where two tokenizers cut a word in different places, the
encoder reads it in the reader's pieces. What a token gets is the mean of its pieces' last states.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from latent_jax import backbones
from latent_jax.backbones.config import DecoderConfig
from latent_jax.backbones.decoder import Decoder
from latent_jax.backbones.first_layers import first_config, first_params
from latent_jax.backbones.sink import sink_kv, sink_token
from latent_jax.core.errors import CheckpointError, ConfigError
from latent_jax.systems.latentwire.model_config import ModelConfig

#: Its name beside the reader's parameters, in what is frozen.
PART = "separate"


@dataclasses.dataclass(frozen=True)
class Body:
    """What is compiled of a separate encoder.

    Attributes:
      config: its architecture, of the layers that encode.
      sink: token before its text; None for none.
    """

    config: DecoderConfig
    sink: int | None = None


@dataclasses.dataclass(frozen=True)
class Separate:
    """A frozen LLM that encodes what another reads.

    Attributes:
      backbone: the LLM, of whose layers only those that encode are held.
      body: what is compiled of it.
      pieces: its tokens for each of the reader's, ``[vocab n]``; -1 where there are no more.
    """

    backbone: backbones.Backbone
    body: Body
    pieces: Int[Array, "v n"]

    @property
    def frozen(self) -> dict[str, Any]:
        """What of it is frozen, as arrays."""
        return {"params": self.backbone.params, "pieces": self.pieces}

    def placed(self, frozen: Mapping[str, Any]) -> Separate:
        """The same with the arrays of `beside`, wherever they lie."""
        found = frozen[PART]
        backbone = dataclasses.replace(self.backbone, params=found["params"])
        return dataclasses.replace(self, backbone=backbone, pieces=found["pieces"])


def open_encoder(
    config: ModelConfig,
    reader: backbones.Backbone,
    backbone: backbones.Backbone | None = None,
    sha256: str = "",
) -> Separate | None:
    """Loads ``encoder.backbone`` beside the reader; None where the reader encodes itself.

    Args:
      config: the compressor's shape.
      reader: the LLM whose tokens texts come in.
      backbone: the encoder, if it is loaded already.
      sha256: of the weights that the compressor was trained on, if known.

    Raises:
      BackboneError: it cannot be loaded.
      CheckpointError: it is another than the compressor was trained on.
      ConfigError: it has fewer layers than are asked for, or reads less than a segment.
    """
    e = config.encoder
    if e.backbone is None:
        if e.layers > reader.config.num_layers:
            raise ConfigError(
                f"model.encoder.layers={e.layers}: the reader has {reader.config.num_layers}"
            )
        return None
    found = backbone or backbones.load(e.backbone, dtype=reader.dtype)
    check_weights(e.backbone, found.sha256, sha256)
    own = found.config
    if e.layers > own.num_layers:
        raise ConfigError(
            f"encoder.layers={e.layers}: encoder.backbone={e.backbone} has {own.num_layers}"
        )
    if config.segment > own.max_position:
        raise ConfigError(
            f"model.segment={config.segment}: encoder.backbone={e.backbone} reads "
            f"{own.max_position} tokens"
        )
    sink = sink_token(found.tokenizer) if config.sink else None
    table = respelled(reader.tokenizer, found.tokenizer, reader.config.vocab_size, e.pieces)
    found = dataclasses.replace(found, params=first_params(found.params, e.layers))
    return Separate(found, Body(first_config(own, e.layers), sink), jnp.asarray(table))


def check_weights(name: str, here: str, trained: str) -> None:
    """Refuses an encoder with other weights than a compressor was trained on, where they are known.

    Raises:
      CheckpointError: the digests differ.
    """
    if trained not in ("", here):
        raise CheckpointError(
            f"encoder.backbone={name}: the compressor was trained on other weights "
            f"({trained[:12]}) than the model that is here has ({here[:12]})"
        )


def respelled(reader: Any, own: Any, size: int, most: int) -> Int[np.ndarray, "v n"]:
    """Tokens of one vocabulary in those of another, as many columns as the longest one takes.

    A token that both have by the same name is itself. Half a character, which no text is made of
    alone, becomes what the encoder's tokenizer makes of the replacement character.

    Args:
      reader: tokenizer of the texts.
      own: of the encoder.
      size: rows of the reader's vocabulary.
      most: pieces of a token; what is longer is cut.
    """
    rows: list[list[int]] = []
    for token in range(size):
        name = reader.id_to_token(token)
        same = None if name is None else own.token_to_id(name)
        if same is not None:
            rows.append([same])
        elif name is None:  # a row of the table that the tokenizer does not use
            rows.append([])
        else:
            rows.append(own.encode(reader.decode([token], skip_special=False))[:most])
    table = np.full((size, max(1, *map(len, rows))), -1, np.int32)
    for token, row in enumerate(rows):
        table[token, : len(row)] = row
    return table


def beside(reader: Any, separate: Separate | None) -> Any:
    """The reader's parameters, and in the same tree those of what encodes for it, if any."""
    return reader if separate is None else {**reader, PART: separate.frozen}


def apart(frozen: Mapping[str, Any]) -> dict[str, Any]:
    """The reader's parameters alone."""
    return {name: tree for name, tree in frozen.items() if name != PART}


def separate_states(
    body: Body, frozen: Mapping[str, Any], ids: Int[Array, "b t"], mask: Bool[Array, "b t"]
) -> Float[Array, "b t d"]:
    """Per token of the reader's, the mean last state of the encoder's tokens that spell it.

    Args:
      body: the encoder.
      frozen: of `beside`.
      ids: right-padded, the reader's.
      mask: real tokens.

    Returns:
      States through which no gradient goes; zeros where a token is spelled by none.
    """
    known, (b, t) = frozen[PART], ids.shape
    pieces = known["pieces"][ids]
    there = (pieces >= 0) & mask[..., None]
    flat, n = there.reshape(b, -1), pieces.shape[-1]
    decoder, params = Decoder(body.config, parent=None), {"params": known["params"]}
    x = decoder.apply(params, jnp.maximum(pieces, 0).reshape(b, -1), method="embed")
    first = None
    if body.sink is not None:
        first = sink_kv(decoder, known["params"], jnp.int32(body.sink), b)
    # Its position is its number in the text: places of the table without a piece take no room.
    where = jnp.maximum(jnp.cumsum(flat, 1) - 1, 0)
    hidden = decoder.apply(params, x, where, flat, prefix=first).hidden
    hidden = hidden.astype(jnp.float32).reshape(b, t, n, -1)
    total = jnp.where(there[..., None], hidden, 0).sum(2)
    return jax.lax.stop_gradient(total / jnp.maximum(there.sum(2), 1)[..., None])
