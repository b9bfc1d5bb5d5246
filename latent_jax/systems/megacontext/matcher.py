"""Where in a history a question is answered: late interaction over the frozen base's own states.

Every token of a question looks for its best match among the tokens of a block, and the matches are
added up with weights (ColBERT, Khattab & Zaharia 2020). The tokens are what the frozen base made of
them in a few of its middle layers, so that other words can match; two linear maps are trained. A
block's vectors are stored as int8.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int8

from latent_jax.backbones import Backbone
from latent_jax.backbones.decoder import Decoder
from latent_jax.backbones.first_layers import first_config, first_params
from latent_jax.backbones.sink import sink_token
from latent_jax.backbones.streams import streams
from latent_jax.core import trees
from latent_jax.core.errors import ConfigError
from latent_jax.core.types import Mean
from latent_jax.systems.megacontext.match_cache import Kept
from latent_jax.systems.megacontext.model_config import MatcherConfig
from latent_jax.systems.megacontext.policies import bm25, in_pairs, of_blocks
from latent_jax.systems.megacontext.reranker import Reranker, fused

_ROWS = 8  # texts that the base reads at once
_KEPT = 1 << 14  # windows whose vectors are kept
_AT_ONCE = 64  # windows that are kept together
_FULL = 127.0  # int8 of a vector's number 1
_NEVER = -1e9


class States:
    """What the base makes of tokens in some of its layers, each at unit root mean square.

    Args:
      backbone: the base; layers behind the last of ``layers`` are not run.
      layers: whose inputs are taken; the last is taken behind the final norm.
    """

    def __init__(self, backbone: Backbone, layers: Sequence[int]):
        last = max(layers)
        if last > backbone.config.num_layers:
            raise ConfigError(
                f"model.matcher.layers={list(layers)}: the base has {backbone.config.num_layers}"
            )
        self.width = len(layers) * backbone.config.hidden_size
        self._params = first_params(backbone.params, last)
        decoder = Decoder(first_config(backbone.config, last))
        sink = sink_token(backbone.tokenizer)

        def run(params, ids, mask):
            begin = jnp.full((len(ids), 1), sink, jnp.int32)
            ids = jnp.concatenate([begin, ids], axis=1)
            mask = jnp.concatenate([jnp.ones((len(ids), 1), bool), mask], axis=1)
            x = decoder.apply({"params": params}, ids, method="embed")
            found = streams(decoder, params, x, layers, None, mask)[0][:, 1:].astype(jnp.float32)
            found *= jax.lax.rsqrt(jnp.mean(found**2, -1, keepdims=True) + 1e-6)
            return found.reshape(*found.shape[:2], -1).astype(jnp.float16)

        self._run = jax.jit(run)

    def __call__(
        self, ids: Int[np.ndarray, "n t"], mask: Bool[np.ndarray, "n t"]
    ) -> Iterator[Float[np.ndarray, "t f"]]:
        """Of right-padded texts, one after another, as float16."""
        for at in range(0, len(ids), _ROWS):
            rows = [np.asarray(x[at : at + _ROWS]) for x in (ids, mask)]
            room = ((0, _ROWS - len(rows[0])), (0, 0))
            found = np.asarray(self._run(self._params, *(np.pad(x, room) for x in rows)))
            yield from found[: len(rows[0])]


class Matcher(nn.Module):
    """Two linear maps, and how much each token of a question counts.

    Attributes:
      width: of a stored vector.
    """

    width: int

    def setup(self):
        small = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        self.question = nn.Dense(self.width, use_bias=False, kernel_init=small)
        self.history = nn.Dense(self.width, use_bias=False, kernel_init=small)
        self.weight = nn.Dense(1, kernel_init=nn.initializers.zeros)

    def ask(
        self, states: Float[Array, "b q f"], mask: Bool[Array, "b q"]
    ) -> tuple[Float[Array, "b q w"], Float[Array, "b q"]]:
        """Unit vectors of a question's tokens, and their weights."""
        states = states.astype(jnp.float32)
        weight = jax.nn.softplus(self.weight(states)[..., 0])
        return _unit(self.question(states)), weight * mask

    def store(self, states: Float[Array, "b t f"]) -> Float[Array, "b t w"]:
        """Unit vectors of a history's tokens."""
        return _unit(self.history(states.astype(jnp.float32)))

    def __call__(self, states: Float[Array, "b t f"]) -> Array:
        """Touches every parameter; used for initialisation."""
        asked, weight = self.ask(states, jnp.ones(states.shape[:2], bool))
        return interaction(asked, weight, self.store(states), jnp.ones(states.shape[:2], bool), 1)


def _unit(x: Float[Array, "*b w"]) -> Float[Array, "*b w"]:
    return x * jax.lax.rsqrt(jnp.sum(x**2, -1, keepdims=True) + 1e-6)


def interaction(
    asked: Float[Array, "b q w"], weight: Float[Array, "b q"], stored: Float[Array, "n t w"],
    real: Bool[Array, "n t"], block: int,
) -> Float[Array, "b n k"]:  # fmt: skip
    """Weighted sum over a question's tokens of the best cosine in each block and the one after it.

    Args:
      asked: unit vectors of questions.
      weight: of their tokens.
      stored: unit vectors of texts of ``k`` blocks.
      real: which of their tokens there are.
      block: tokens of a block.
    """
    cosine = jnp.einsum("bqw,ntw->bqnt", asked, stored)
    cosine = jnp.where(real[None, None], cosine, -1.0)
    best = cosine.reshape(*cosine.shape[:3], -1, block).max(-1)
    after = jnp.concatenate([best[..., 1:], best[..., -1:]], axis=-1)
    return jnp.einsum("bq,bqnk->bnk", weight, jnp.maximum(best, after))


def matching(
    matcher: Matcher, params: Any, batch: Mapping[str, Any], block: int
) -> tuple[Mean, Mean]:
    """Contrastive loss of questions over all blocks of a batch, nats per question.

    Blocks beside the fact's count neither way; nor do those of the same passage in other rows.

    Args:
      batch: see `match_data.MatchRows`.

    Returns:
      The loss, and the share of questions whose best block holds the fact.
    """
    apply = {"params": params}
    mask = batch["question_mask"]
    asked, weight = matcher.apply(apply, batch["question"], mask, method="ask")
    texts = jnp.concatenate([batch["passage"], batch["other"]])
    real = jnp.concatenate([batch["passage_mask"], jnp.ones(batch["other"].shape[:2], bool)])
    stored = matcher.apply(apply, texts, method="store")
    score = interaction(asked, weight, stored, real, block)
    b, n, k = score.shape
    fact = batch["fact"] & real[:b].reshape(b, k, block).any(-1)
    here = jnp.arange(b)
    own = jnp.zeros(score.shape, bool).at[here, here].set(fact)
    beside = own | jnp.pad(own, ((0, 0), (0, 0), (0, 1)))[..., 1:]
    beside |= jnp.pad(own, ((0, 0), (0, 0), (1, 0)))[..., :-1]
    again = (batch["same"][:, None] == batch["same"]) & (here[:, None] != here)
    again = jnp.pad(again, ((0, 0), (0, n - b)))[..., None]
    empty = ~real.reshape(n, k, block).any(-1)
    score = jnp.where((beside & ~own) | again | empty, _NEVER, score).reshape(b, -1)
    own = own.reshape(b, -1)
    counts = own.any(1)
    lost = jax.nn.logsumexp(score, -1) - jax.nn.logsumexp(jnp.where(own, score, _NEVER), -1)
    right = jnp.take_along_axis(own, score.argmax(-1)[:, None], 1)[:, 0]
    total = counts.sum().astype(jnp.float32)
    return Mean(jnp.sum(lost * counts), total), Mean(jnp.sum(right & counts), total)


def whitened(states: Float[np.ndarray, "n f"], width: int) -> Float[np.ndarray, "f w"]:
    """Principal directions of tokens' states, each at unit variance: where both maps start."""
    x = np.asarray(states, np.float32)
    _, size, basis = np.linalg.svd(x - x.mean(0), full_matrices=False)
    return (basis[:width] / (size[:width, None] / np.sqrt(len(x)) + 1e-3)).T


class Finder:
    """Scores the blocks of a history for a question; vectors of windows are kept.

    Args:
      backbone: the base.
      config: of the matcher.
      block: tokens of a block.
      params: of the matcher.
      path: store beside which windows' vectors are kept from one process to the next
        (`match_cache.Kept`).
    """

    def __init__(
        self, backbone: Backbone, config: MatcherConfig, block: int, params: Any,
        path: str | Path | None = None,
    ):  # fmt: skip
        self.config, self.block, self._params = config, block, {"params": params}
        self.states = States(backbone, config.layers)
        self._windows: OrderedDict[bytes, np.ndarray] = OrderedDict()
        matcher = Matcher(config.width)
        self._ask = jax.jit(lambda p, x, m: matcher.apply(p, x, m, method="ask"))
        self._store = jax.jit(
            lambda p, x: jnp.round(matcher.apply(p, x, method="store") * _FULL).astype(jnp.int8)
        )
        self._score = jax.jit(_pairs)
        self._reranker = Reranker(backbone, config.question)
        self.kept = None
        if path is not None:
            made = digest(params, backbone.sha256, config.layers)
            self.kept = Kept(path, made, self.window, config.width)
            self._windows.update(self.kept.read())

    @property
    def window(self) -> int:
        """Tokens that the base reads together."""
        return self.config.window * self.block

    def index(self, ids: Int[np.ndarray, " t"]) -> Int8[np.ndarray, "n block w"]:
        """Vectors of a history of whole blocks."""
        rows = [ids[at : at + self.window] for at in range(0, len(ids), self.window)]
        keys = [_key(row) for row in rows]
        known = {key: self._windows[key] for key in keys if key in self._windows}
        new = {key: row for key, row in zip(keys, rows, strict=True) if key not in known}
        for at in range(0, len(new), _AT_ONCE):  # what is read of a long history outlives a kill
            known |= self._read_windows(dict(itertools.islice(new.items(), at, at + _AT_ONCE)))
        parts = [known[key][: len(row)] for key, row in zip(keys, rows, strict=True)]
        return np.concatenate(parts).reshape(-1, self.block, self.config.width)

    def score(
        self, question: Int[np.ndarray, " q"], index: Int8[np.ndarray, "n block w"]
    ) -> Float[np.ndarray, " n"]:
        """How well each block, with the one beside it, matches a question's last tokens."""
        return of_blocks(self._matching(question, index), len(index))

    def rank(
        self, question: Int[np.ndarray, " q"], ids: Int[np.ndarray, " t"], again: bool = True
    ) -> Float[np.ndarray, " n"]:
        """Scores the blocks of a history; the best ones are read again if `rerank` says so, unless
        ``again`` is false.

        What is read again are the best pairs of blocks by the matcher, and a quarter as many by
        BM25, which knows names and numbers better; a pair without a word of the question is none
        of those. They come before all others.
        """
        index = self.index(ids)
        found, count = self._matching(question, index), self.config.rerank * again
        if count and len(found):
            texts = in_pairs(np.asarray(ids).reshape(len(index), -1))
            words = bm25(texts, question[-self.config.question :])
            named = np.argsort(-words, kind="stable")[: max(count // 4, 1)]
            best = np.argsort(-found, kind="stable")[:count]
            best = np.unique(np.concatenate([best, named[words[named] > 0]]))
            again = fused(found[best], self._reranker(question, texts[best]))
            found = found - found.max() - 1
            found[best] = again - again.min()
        return of_blocks(found, len(index))

    def _matching(self, question, index) -> Float[np.ndarray, " k"]:
        """Of each block with the one behind it: weighted sum of every token's best match."""
        size = self.config.question
        ids = np.asarray(question, np.int32)[-size:][None]
        mask = np.arange(size)[None] < ids.shape[1]
        ids = np.pad(ids, ((0, 0), (0, size - ids.shape[1])))
        asked, weight = self._ask(self._params, next(self.states(ids, mask))[None], mask)
        room = (1 << max(len(index) - 1, 1).bit_length()) - len(index)
        best = self._score(asked[0], weight[0], np.pad(index, [(0, room), (0, 0), (0, 0)]))
        best = np.asarray(best)[:, : len(index)]
        if best.shape[1] > 1:
            best = np.maximum(best[:, :-1], best[:, 1:])
        return np.asarray(weight[0]) @ best

    def _read_windows(self, new: Mapping[bytes, np.ndarray]) -> dict[bytes, np.ndarray]:
        mask = np.stack([np.arange(self.window) < len(row) for row in new.values()])
        padded = np.stack([np.pad(row, (0, self.window - len(row))) for row in new.values()])
        found = {
            key: np.asarray(self._store(self._params, states[None])[0])
            for key, states in zip(new, self.states(padded, mask), strict=True)
        }
        self._keep({key: x for key, x in found.items() if len(new[key]) == self.window})
        return found

    def _keep(self, found: Mapping[bytes, np.ndarray]) -> None:
        self._windows.update(found)
        while len(self._windows) > _KEPT:
            self._windows.popitem(last=False)
        if self.kept is not None and found:
            self.kept.add(found)


def _pairs(
    asked: Float[Array, "q w"], weight: Float[Array, " q"], index: Int8[Array, "n block w"]
) -> Float[Array, "q n"]:
    """Best cosine of every token of a question in every block."""
    chunk = min(len(index), 256)

    def some(x):
        return jnp.einsum("qw,ntw->qnt", asked, x.astype(jnp.float32)).max(-1) / _FULL

    parts = jax.lax.map(some, index.reshape(-1, chunk, *index.shape[1:]))
    return jnp.moveaxis(parts, 1, 0).reshape(len(asked), -1)


def _key(ids: Int[np.ndarray, " t"]) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(ids, np.int32).tobytes(), digest_size=16).digest()


def digest(params: Any, base: str, layers: Sequence[int]) -> str:
    """Names what makes vectors, short: a matcher's parameters, and the base and layers it reads."""
    made = hashlib.sha256(f"{base} {list(layers)} ".encode())
    for name, leaf in sorted(trees.flatten(params).items()):
        made.update(name.encode())
        made.update(np.asarray(leaf, np.float32).tobytes())
    return made.hexdigest()[:16]
