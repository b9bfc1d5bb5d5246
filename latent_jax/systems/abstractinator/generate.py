"""Continuing texts by rows: predict a row's digits, append the row, expand it to bytes.

No cache yet: every new row runs the row model over its whole context.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from latent_jax.systems.abstractinator import tokenizer
from latent_jax.systems.abstractinator.model import Abstractinator
from latent_jax.systems.abstractinator.tokenizer import EOP, PAD


class Context(NamedTuple):
    """Rows so far, the newest last; each text fills its buffer from the left.

    Attributes:
      rows: quantised rows.
      count: how many there are.
    """

    rows: Float[Array, "b r d"]
    count: Int[Array, " b"]

    @property
    def there(self) -> Bool[Array, "b r"]:
        """Which rows exist."""
        return jnp.arange(self.rows.shape[1]) < self.count[:, None]


def choose(logits: Float[Array, "*b k"], key: Array, temperature: Float[Array, ""]) -> Array:
    """Greedy at temperature 0, else sampled."""
    drawn = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits, -1))


def push(
    model: Abstractinator, variables: Mapping[str, Any], context: Context, digits: Int[Array, "b n"]
) -> Context:
    """Appends the row of some digits; the oldest row leaves a full buffer."""
    row = model.apply(variables, digits, method="append")
    size = context.rows.shape[1]
    full = (context.count == size)[:, None, None]
    rows = jnp.where(full, jnp.roll(context.rows, -1, 1), context.rows)
    at = jnp.minimum(context.count, size - 1)
    rows = rows.at[jnp.arange(len(at)), at].set(row)
    return Context(rows, jnp.minimum(context.count + 1, size))


def next_digits(
    model: Abstractinator, variables: Mapping[str, Any], context: Context, key: Array,
    temperature: Float[Array, ""],
) -> Int[Array, "b n"]:
    """Digits of the row after the context, stage by stage."""
    state = model.apply(variables, context.rows, context.there, method="top_hidden")
    state = state[jnp.arange(len(state)), context.count]
    stages = model.config.level.stages
    digits = jnp.full((len(state), stages), -1, jnp.int32)
    for i in range(stages):
        logits = model.apply(variables, state, digits, method="top_logits")[:, i]
        chosen = choose(logits, jax.random.fold_in(key, i), temperature)
        digits = digits.at[:, i].set(chosen)
    return digits


def say(
    model: Abstractinator,
    variables: Mapping[str, Any],
    rows: Float[Array, "b s d"],
    there: Bool[Array, "b s"],
    given: Int[Array, "b s l"],
    key: Array,
    temperature: Float[Array, ""],
) -> Int[Array, "b s l"]:
    """Expands rows, free-running.

    Args:
      model: the module.
      variables: its variables.
      rows: quantised rows.
      there: which exist.
      given: ids that are known already; PAD where the model has to speak.
      key: of the sampling.
      temperature: 0 is greedy.

    Returns:
      Bytes, then `EOP` up to the end if the segment is shorter than the longest.
    """

    def body(place: Array, said: Array) -> Array:
        logits = model.apply(variables, rows, there, said, method="expand")[:, :, place]
        chosen = choose(logits, jax.random.fold_in(key, place), temperature)
        over = (place > 0) & (said[:, :, jnp.maximum(place - 1, 0)] == EOP)
        chosen = jnp.where(over, EOP, chosen)
        known = given[:, :, place]
        return said.at[:, :, place].set(jnp.where(known == PAD, chosen, known))

    start = jnp.full(given.shape, PAD, jnp.int32)
    return jax.lax.fori_loop(0, given.shape[-1], body, start)


class Generator:
    """Compiled pieces of generation for one model."""

    def __init__(self, model: Abstractinator):
        self.model = model
        window = model.config.data.window
        self._encode = jax.jit(
            lambda v, ids, valid: model.apply(v, ids, valid, budget=window, method="encode")
        )
        self._row = jax.jit(self._next_row)

    def _next_row(self, variables, context, given, key, temperature):
        """One more row and its bytes."""
        pick, speak = jax.random.split(key)
        digits = next_digits(self.model, variables, context, pick, temperature)
        context = push(self.model, variables, context, digits)
        # The newest row and as many before it as the expander looks back on.
        back = context.count[:, None] - 1 - jnp.arange(self.model.config.level.lookback, -1, -1)
        rows = jnp.take_along_axis(context.rows, jnp.maximum(back, 0)[..., None], 1)
        blank = jnp.full((*rows.shape[:2], given.shape[-1]), PAD, jnp.int32)
        given = blank.at[:, -1].set(given)
        said = say(self.model, variables, rows, back >= 0, given, speak, temperature)
        return context, said[:, -1]

    def start(
        self, variables: Mapping[str, Any], prompts: Sequence[str]
    ) -> tuple[Context, Int[np.ndarray, "b l"]]:
        """Rows of the prompts' closed segments, and the bytes of the one still open.

        A prompt longer than a window keeps its last bytes.
        """
        c = self.model.config
        window, longest = c.data.window, c.segments.most
        ids = np.full((len(prompts), window), PAD, np.int32)
        for row, prompt in zip(ids, prompts, strict=True):
            known = tokenizer.encode(prompt)[-window:]
            row[: len(known)] = known
        out = self._encode(variables, jnp.asarray(ids), jnp.asarray(ids != PAD))
        digits, there = np.asarray(out.digits), np.asarray(out.there)
        found = jax.tree.map(np.asarray, out.found)
        given = np.full((len(prompts), longest), PAD, np.int32)
        count = there.sum(1)
        size = c.budget
        kept = np.full((len(prompts), size, digits.shape[-1]), -1, np.int32)
        for i in range(len(prompts)):
            last = count[i] - 1
            if last >= 0 and found.open[i, last]:
                length = found.length[i, last]
                given[i, :length] = ids[i, found.start[i, last] :][:length]
                count[i] -= 1
            mine = digits[i, max(0, count[i] - size) : count[i]]
            kept[i, : len(mine)] = mine
        rows = self.model.apply(variables, jnp.asarray(kept), method="append")
        return Context(rows, jnp.asarray(np.minimum(count, size), jnp.int32)), given

    def __call__(
        self,
        variables: Mapping[str, Any],
        prompts: Sequence[str],
        max_new_bytes: int,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[str]:
        """Continues texts.

        The segment that a prompt leaves open is taken up again: the row model predicts its row, and
        the expander, made to say the bytes that are there, goes on from them.

        Args:
          variables: of the model.
          prompts: texts, possibly empty.
          max_new_bytes: length of the continuations.
          temperature: of digits and bytes; 0 is greedy.
          seed: of the sampling.

        Returns:
          The continuations, without the prompts.
        """
        context, given = self.start(variables, prompts)
        blank = np.full_like(given, PAD)
        told = [b""] * len(prompts)
        number = 0
        while min(len(t) for t in told) < max_new_bytes:
            key = jax.random.fold_in(jax.random.key(seed), number)
            context, said = self._row(
                variables, context, jnp.asarray(given), key, jnp.float32(temperature)
            )
            known = (given != PAD).sum(1)
            told = [
                t + tokenizer.to_bytes(row[n:])
                for t, row, n in zip(told, np.asarray(said), known, strict=True)
            ]
            given, number = blank, number + 1
        return [t[:max_new_bytes].decode("utf-8", errors="replace") for t in told]
