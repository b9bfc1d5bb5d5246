"""Candidates ranked again by how likely the frozen base finds the question behind them.

A language model that has just read the answer expects the question (query likelihood, Ponte & Croft
1998; with a pretrained model, Sachan et al. 2022). Nothing is trained. It reads every candidate, so
it is for the few that a matcher or words have found.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from latent_jax.backbones import Backbone
from latent_jax.backbones.sink import sink_token
from latent_jax.systems.megacontext.reading import read_on

_ROWS = 8  # texts that the base reads at once
# Against the matcher, in standard deviations over the candidates. Of 0, 1 and 2, with 0 the matcher
# alone, 2 was best on eight facts that were made up for this (not those of `data.paraphrases`).
_WEIGHT = 2.0


class Reranker:
    """Reads candidates and the question behind them.

    Args:
      backbone: the base.
      tokens: most of a question that are read, its last ones.
    """

    def __init__(self, backbone: Backbone, tokens: int):
        self.tokens, self._params = tokens, backbone.params
        decoder, sink = backbone.decoder, sink_token(backbone.tokenizer)

        def run(params, texts, question, count):
            b, t = texts.shape
            asked = jnp.broadcast_to(question, (b, len(question)))
            ids = jnp.concatenate([texts, asked], axis=1)
            where = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
            hidden = read_on(decoder, params, sink, None, ids, where)[:, t:-1]
            logits = decoder.apply({"params": params}, hidden, method="unembed")
            log = jnp.take_along_axis(jax.nn.log_softmax(logits), asked[:, 1:, None], -1)[..., 0]
            # The first token only parts the question from the text.
            kept = jnp.arange(1, len(question)) < count
            return -jnp.sum(log * kept, -1) / jnp.maximum(kept.sum(), 1)

        self._run = jax.jit(run)

    def __call__(
        self, question: Int[np.ndarray, " q"], texts: Int[np.ndarray, "n t"]
    ) -> Float[np.ndarray, " n"]:
        """Loss of a question's tokens but the first behind each text, mean, nats."""
        ids = np.asarray(question, np.int32)[-self.tokens :]
        padded, found = np.pad(ids, (0, self.tokens - len(ids))), []
        for at in range(0, len(texts), _ROWS):
            rows = np.asarray(texts[at : at + _ROWS], np.int32)
            full = np.pad(rows, ((0, _ROWS - len(rows)), (0, 0)), mode="edge")
            found.append(np.asarray(self._run(self._params, full, padded, len(ids)))[: len(rows)])
        return np.concatenate(found) if found else np.zeros(0, np.float32)


def fused(
    matching: Float[np.ndarray, " n"], loss: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    """A matcher's scores and the losses of the question, each in its standard deviations.

    Example:
      >>> import numpy as np
      >>> fused(np.array([3.0, 1.0, 2.0]), np.array([2.0, 2.0, 1.0])).argmax().item()
      2
    """
    return _standard(matching) - _WEIGHT * _standard(loss)


def _standard(x: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    return (x - x.mean()) / max(float(x.std()), 1e-6)
