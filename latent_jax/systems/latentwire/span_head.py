"""A trained span head: which of the tokens that a reader said are the answer.

A reader that was never taught to be brief says the answer somewhere in a sentence. Start and end of
a span are scored from its last hidden states at the tokens that it said (as BERT does on a passage,
Devlin et al. 2019), normalised over all spans (Lee et al. 2016), on greedy answers to questions of
the training split. Their best span is the one of highest F1 to the gold answers; ties share the
probability (Clark & Gardner 2018).

There is one head for all arms. It learns from the arm ``full_text`` alone: one that had seen
answers from latents could mend what a compressor spoils, and arms with heads of their own would
differ in more than what stands for the text. Like every extraction it stands beside what was said.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from latent_jax.backbones.decoder import Decoder
from latent_jax.data.squad import QAExample
from latent_jax.systems.latentwire import metrics
from latent_jax.systems.latentwire.given import Asked, answer_hidden
from latent_jax.systems.latentwire.prompts import PromptBuilder

#: The arm whose answers it learns from.
TAUGHT_BY = "full_text"
_LR, _DECAY = 1e-2, 1e-2
# One question in so many tells which of so many heads, of equally many steps each, is kept.
_HELD, _LOOKS = 4, 10


class SpanHead(NamedTuple):
    """Linear start and end scores of standardised states.

    Attributes:
      mean, scale: of the states it learned from.
      kernel: of start and end.
      whole: how much starting with the first token counts, and ending with the last.
    """

    mean: Float[Array, " d"]
    scale: Float[Array, " d"]
    kernel: Float[Array, "d 2"]
    whole: Float[Array, " 2"]


class Spoken(NamedTuple):
    """Answers with what there is to choose from.

    Attributes:
      states: the reader's last hidden states at the tokens of each answer.
      mask: which tokens are there.
      f1: of the text of every span, first and last token, to the gold answers; 0 of no span.
    """

    states: Float[Array, "b t d"]
    mask: Bool[Array, "b t"]
    f1: Float[Array, "b t t"]


def pieces(builder: PromptBuilder, ids: Sequence[int]) -> tuple[str, list[int]]:
    """An answer's text (`PromptBuilder.text`), and where in it the tokens begin, then its end; what
    comes after its first line has none.
    """
    kept, text = builder.kept(ids), builder.text(ids)
    decode = builder.tokenizer.decode
    whole = decode(kept)
    blank = len(whole) - len(whole.lstrip())
    ends = [min(max(len(decode(kept[: k + 1])) - blank, 0), len(text)) for k in range(len(kept))]
    begins = [0, *ends]
    count = next((k for k, at in enumerate(ends, 1) if at == len(text)), len(ends))
    return text, begins[: count + 1] if text else [0]


def span_text(said: tuple[str, list[int]], first: int, last: int) -> str:
    """The part of `pieces` from one token to another, both included."""
    text, begins = said
    return text[begins[first] : begins[last + 1]].strip()


def span_scores(
    head: SpanHead, states: Float[Array, "b t d"], mask: Bool[Array, "b t"]
) -> Float[Array, "b t t"]:
    """Score of every span, by its first and last token; -inf of what is none."""
    t = mask.shape[1]
    x = (states.astype(jnp.float32) - head.mean) * head.scale
    start, end = jnp.moveaxis(x @ head.kernel, -1, 0)
    last = mask & (jnp.arange(t) == mask.sum(1, keepdims=True) - 1)
    start = start + head.whole[0] * (jnp.arange(t) == 0)
    end = end + head.whole[1] * last
    real = mask[:, :, None] & mask[:, None] & jnp.triu(jnp.ones((t, t), bool))
    return jnp.where(real, start[:, :, None] + end[:, None], -jnp.inf)


def span_loss(head: SpanHead, spoken: Spoken) -> Float[Array, ""]:
    """Mean over answers of minus the log-probability of their best spans (nats); of answers that
    have nothing right in them, none.
    """
    scores = span_scores(head, spoken.states, spoken.mask).reshape(len(spoken.mask), -1)
    f1 = spoken.f1.reshape(scores.shape)
    top = f1.max(1, keepdims=True)
    right = (f1 == top) & jnp.isfinite(scores)
    counts = top > 0
    scores = jnp.where(counts, scores, 0.0)  # an answer of no token has no finite score
    held = jnp.where(right | ~counts, scores, -jnp.inf)
    nll = jax.nn.logsumexp(scores, axis=1) - jax.nn.logsumexp(held, axis=1)
    return jnp.sum(nll) / jnp.maximum(counts.sum(), 1)


def fit(spoken: Spoken, steps: int, seed: int = 0) -> SpanHead:
    """Trains a head, which starts by keeping whole answers.

    A quarter of the answers is not trained on; of the heads on the way, the one is returned that
    cuts these best, which may be the first.

    Args:
      spoken: answers to questions of the training split.
      steps: of AdamW, each on all of them.
      seed: of that quarter.
    """
    flat = np.asarray(spoken.states, np.float32)[np.asarray(spoken.mask)]
    width = spoken.states.shape[-1]
    mean = flat.mean(0) if len(flat) else np.zeros(width)
    spread = flat.std(0) if len(flat) else np.ones(width)
    fixed = [jnp.asarray(x, jnp.float32) for x in (mean, 1 / (spread + 1e-6))]
    head = SpanHead(*fixed, jnp.zeros((width, 2)), jnp.ones(2))
    order = np.random.default_rng([seed, 29]).permutation(len(spoken.mask))
    held = order[: len(order) // _HELD]
    ours, theirs = (
        Spoken(*(jnp.asarray(x)[at] for x in spoken)) for at in (order[len(held) :], held)
    )
    tx = optax.adamw(_LR, weight_decay=_DECAY)

    @functools.partial(jax.jit, static_argnames="n")
    def run(moved, state, spoken, n):
        def step(carry, _):
            moved, state = carry
            grads = jax.grad(lambda m: span_loss(head._replace(**m), spoken))(moved)
            updates, state = tx.update(grads, state, moved)
            return (optax.apply_updates(moved, updates), state), None

        return jax.lax.scan(step, (moved, state), None, length=n)[0]

    def quality(head):
        at = _best(head, theirs.states, theirs.mask)
        return jnp.take_along_axis(theirs.f1.reshape(len(held), -1), at[:, None], 1).mean()

    moved = {"kernel": head.kernel, "whole": head.whole}
    state, best = tx.init(moved), (float(quality(head)) if len(held) else -1.0, head)
    looks = min(_LOOKS, steps)
    for part in np.array_split(np.arange(steps), looks):
        moved, state = run(moved, state, ours, len(part))
        found = head._replace(**moved)
        score = float(quality(found)) if len(held) else 0.0
        if score > best[0]:
            best = score, found
    return best[1]


@functools.partial(jax.jit, static_argnames=("decoder",))
def said_states(
    decoder: Decoder, params: Any, asked: Asked, ids: Int[Array, "b t"], lengths: Int[Array, " b"]
) -> Float[Array, "b t d"]:
    """The reader's last hidden states at tokens that it said itself."""
    more = jnp.pad(ids, [(0, 0), (0, 1)])
    there = jnp.arange(more.shape[1]) <= lengths[:, None]
    return answer_hidden(decoder, params, asked, more, there)[:, 1:]


class Listener:
    """Hears every answer of an evaluation (`evaluate.evaluate_qa`) with the reader's states at it.

    Args:
      builder: of the prompts.
    """

    def __init__(self, builder: PromptBuilder):
        self.builder = builder

    def __call__(
        self, arm: str, which: Sequence[int], asked: Sequence[QAExample],
        ids: Sequence[Sequence[int]], states: Float[np.ndarray, "b t d"],
    ) -> None:  # fmt: skip
        """Hears one batch.

        Args:
          arm: what stood for the text.
          which: numbers of the questions.
          asked: the questions.
          ids: what was said, with its stop.
          states: at those tokens, right-padded.
        """
        raise NotImplementedError

    def heard(self, ids, states) -> tuple[list[tuple[str, list[int]]], Bool[np.ndarray, "b t"]]:
        """`pieces` of every answer, and which of its tokens have any."""
        said = [pieces(self.builder, row) for row in ids]
        mask = np.zeros(states.shape[:2], bool)
        for row, (_, begins) in zip(mask, said, strict=True):
            row[: len(begins) - 1] = True
        return said, mask


class Collector(Listener):
    """Answers to learn from."""

    def __init__(self, builder: PromptBuilder):
        super().__init__(builder)
        self.batches: list[Spoken] = []

    def __call__(self, arm, which, asked, ids, states):
        said, mask = self.heard(ids, states)
        f1 = np.zeros((*mask.shape, mask.shape[1]), np.float32)
        for i, (pieced, example) in enumerate(zip(said, asked, strict=True)):
            count = len(pieced[1]) - 1
            for first in range(count):
                for last in range(first, count):
                    text = span_text(pieced, first, last)
                    f1[i, first, last] = metrics.f1(text, example.answers)
        self.batches.append(Spoken(np.asarray(states, np.float32), mask, f1))

    @property
    def spoken(self) -> Spoken:
        """All of them."""
        return Spoken(*(np.concatenate(x) for x in zip(*self.batches, strict=True)))


class Cutter(Listener):
    """Answers cut to the span that a head picks, ``said[arm][question]``."""

    def __init__(self, builder: PromptBuilder, head: SpanHead):
        super().__init__(builder)
        self.head, self.said = head, {}

    def __call__(self, arm, which, asked, ids, states):
        said, mask = self.heard(ids, states)
        t, row = mask.shape[1], self.said.setdefault(arm, {})
        if not t:
            row.update(dict.fromkeys(map(int, which), ""))
            return
        best = np.asarray(_best(self.head, jnp.asarray(states), jnp.asarray(mask)))
        for i, pieced, at in zip(which, said, best, strict=True):
            row[int(i)] = span_text(pieced, int(at) // t, int(at) % t) if pieced[0] else ""


@jax.jit
def _best(head: SpanHead, states: Array, mask: Array) -> Int[Array, " b"]:
    return jnp.argmax(span_scores(head, states, mask).reshape(len(mask), -1), axis=1)
