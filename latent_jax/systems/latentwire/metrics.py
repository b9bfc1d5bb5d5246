"""Scores of answers and reconstructions: masked (sum, count) pairs or one value per example."""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from latent_jax.core.types import Mean
from latent_jax.data.answers import exact_match, f1, normalise, token_f1

__all__ = [
    "agreement", "bleu", "exact_match", "f1", "in_top_k", "nll", "normalise", "token_f1",
    "token_nll",
]  # fmt: skip


def token_nll(logits: Float[Array, "b t v"], targets: Int[Array, "b t"]) -> Float[Array, "b t"]:
    """Negative log-likelihood of each target, fp32."""
    logp = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return -jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]


def nll(
    logits: Float[Array, "b t v"], targets: Int[Array, "b t"], mask: Bool[Array, "b t"]
) -> Mean:
    """NLL per gold token (nats)."""
    return Mean.of(token_nll(logits, targets), mask)


def in_top_k(logits: Float[Array, "b v"], targets: Int[Array, " b"], k: int) -> Bool[Array, " b"]:
    """Whether fewer than ``k`` tokens score above the target (ties count for the target)."""
    gold = jnp.take_along_axis(logits, targets[:, None], axis=-1)
    return (logits > gold).sum(-1) < k


def agreement(
    guess: Int[Array, "b t"], gold: Int[Array, "b t"], mask: Bool[Array, "b t"]
) -> dict[str, np.ndarray]:
    """Position-wise agreement of free-running tokens with the text, per example.

    Args:
      guess: generated tokens, at least as many as the text has (anything beyond is ignored).
      gold: the text's tokens, right-padded.
      mask: which of them are real.

    Returns:
      ``correct`` and ``count`` (tokens), ``prefix`` (tokens before the first miss), ``exact`` (all
      of them right).
    """
    guess, gold, mask = np.asarray(guess), np.asarray(gold), np.asarray(mask, bool)
    right = (guess[:, : gold.shape[1]] == gold) & mask
    # Padding lies to the right: counting it as right would only matter after the last real token.
    run = np.cumprod(right | ~mask, axis=1).astype(bool) & mask
    count = mask.sum(1)
    return {
        "correct": right.sum(1), "count": count,
        "prefix": run.sum(1), "exact": (right.sum(1) == count) & (count > 0),
    }  # fmt: skip


def bleu(guess: Sequence[int], gold: Sequence[int], order: int = 4) -> float:
    """Sentence BLEU on token ids with add-one smoothing above unigrams.

    Papineni et al. 2002 with the smoothing of Lin & Och 2004 (NLTK's ``method2``), one reference.

    Example:
      >>> bleu([1, 2, 3, 4], [1, 2, 3, 4]), bleu([5], [1])
      (1.0, 0.0)
    """
    guess, gold = list(guess), list(gold)
    if not guess or not gold:
        return 0.0
    total = 0.0
    for n in range(1, order + 1):
        ours = collections.Counter(tuple(guess[i : i + n]) for i in range(len(guess) - n + 1))
        theirs = collections.Counter(tuple(gold[i : i + n]) for i in range(len(gold) - n + 1))
        same, count = sum((ours & theirs).values()), sum(ours.values())
        if n == 1 and same == 0:
            return 0.0
        smooth = int(n > 1)
        total += math.log((same + smooth) / (count + smooth))
    brevity = min(0.0, 1.0 - len(gold) / len(guess))
    return math.exp(brevity + total / order)
