"""Continuing texts by rows: predict a row's digits, append the row, expand it to bytes.

Row model and expander keep the keys and values of what they have read. A context that is full
drops its older half before the next row and is read anew, so that positions stay those of training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from latent_jax.core.errors import DataError
from latent_jax.nn.transformer import Cache
from latent_jax.systems.abstractinator import tokenizer
from latent_jax.systems.abstractinator.descend import Open, Tail, descend, read_texts
from latent_jax.systems.abstractinator.model import Abstractinator
from latent_jax.systems.abstractinator.sample import Choice, next_digits
from latent_jax.systems.abstractinator.tokenizer import PAD


class Context(NamedTuple):
    """Rows so far, the newest last; each text fills its buffer from the left.

    Attributes:
      rows: quantised rows.
      count: how many there are.
      state: of the row model after them.
      cache: its keys and values.
    """

    rows: Float[Array, "b r d"]
    count: Int[Array, " b"]
    state: Float[Array, "b c"]
    cache: tuple[Cache, ...]

    @property
    def full(self) -> Bool[Array, " b"]:
        """Which have no room for another row."""
        return self.count == self.rows.shape[1]


def read(
    model: Abstractinator,
    variables: Mapping[str, Any],
    rows: Float[Array, "b r d"],
    count: Int[Array, " b"],
) -> Context:
    """A context of rows that are known all at once."""
    return Context(rows, count, *model.apply(variables, rows, count, method="top_start"))


def push(
    model: Abstractinator, variables: Mapping[str, Any], context: Context, digits: Int[Array, "b n"]
) -> Context:
    """Appends the row of some digits to contexts with room for it."""
    row = model.apply(variables, digits, method="append_top")
    state, cache = model.apply(variables, row, context.cache, context.count, method="top_extend")
    rows = context.rows.at[jnp.arange(len(row)), context.count].set(row)
    return Context(rows, context.count + 1, state, cache)


def slide(model: Abstractinator, variables: Mapping[str, Any], context: Context) -> Context:
    """Drops the older half of the rows of contexts that are full; the others keep every bit."""
    size = context.rows.shape[1]
    kept = size // 2
    moved = read(
        model, variables, jnp.roll(context.rows, kept - size, 1),
        jnp.full_like(context.count, kept),
    )  # fmt: skip

    def pick(new: Array, old: Array) -> Array:
        full = context.full.reshape(-1, *[1] * (new.ndim - 1))
        return jnp.where(full, new, old)

    return jax.tree.map(pick, moved, context)


class Generator:
    """Compiled pieces of generation for one model."""

    def __init__(self, model: Abstractinator):
        self.model = model
        self._start = jax.jit(self._read_texts)
        self._slide = jax.jit(lambda v, context: slide(model, v, context))
        self._row = jax.jit(self._next_row)

    def _read_texts(self, variables, ids, valid):
        tails, known, out, done = read_texts(self.model, variables, ids, valid)
        # The newest rows that a context has room for, from its left.
        size = self.model.config.rows(len(tails) - 1)
        count = done.sum(1)
        at = jnp.maximum(count - size, 0)[:, None] + jnp.arange(size)
        kept = at < count[:, None]
        at = jnp.minimum(at, done.shape[1] - 1)
        digits = jnp.take_along_axis(out.digits, at[..., None], 1)
        rows = self.model.apply(
            variables, jnp.where(kept[..., None], digits, -1), method="append_top"
        )
        context = read(self.model, variables, rows, jnp.minimum(count, size).astype(jnp.int32))
        return context, tails, known

    def _next_row(self, variables, context, tails, known, key, choice):
        """One more row and its bytes."""
        pick, speak = jax.random.split(key)
        digits = next_digits(self.model, variables, context.state, pick, choice)
        context = push(self.model, variables, context, digits)
        row = context.rows[jnp.arange(len(digits)), context.count - 1]
        said, tails = descend(self.model, variables, row, tails, known, speak, choice)
        return context, tails, said

    def start(
        self, variables: Mapping[str, Any], prompts: Sequence[str | bytes]
    ) -> tuple[Context, tuple[Tail, ...], Open]:
        """Rows of the prompts' complete segments, and what is open on every level.

        A prompt longer than a window keeps its last bytes.
        """
        window = self.model.config.data.window
        ids = np.full((len(prompts), window), PAD, np.int32)
        for row, prompt in zip(ids, prompts, strict=True):
            known = tokenizer.encode(prompt)[-window:]
            row[: len(known)] = known
        return self._start(variables, jnp.asarray(ids), jnp.asarray(ids != PAD))

    def check(self, prompts: Sequence[str | bytes], max_new_bytes: int) -> None:
        """Refuses what does not fit the windows that the model was trained on.

        Raises:
          DataError: a prompt and its continuation are longer than a window.
        """
        window = self.model.config.data.window
        for prompt in prompts:
            size = len(tokenizer.encode(prompt))
            if size + max_new_bytes > window:
                raise DataError(
                    f"generate: a prompt of {size} bytes and {max_new_bytes} new ones are longer "
                    f"than the context of {window} bytes (data.window): ask for at most "
                    f"{max(window - size, 0)}, or let the context move with --slide"
                )

    def stream(
        self,
        variables: Mapping[str, Any],
        prompts: Sequence[str | bytes],
        max_new_bytes: int,
        choice: Choice,
        seed: int = 0,
    ) -> Iterator[list[bytes]]:
        """Continues texts row by row.

        The segment that a prompt leaves open is taken up again, on every level: the row model
        predicts its row, and the expander, made to say what is there, goes on from it.

        Args:
          variables: of the model.
          prompts: texts, possibly empty.
          max_new_bytes: length of the continuations.
          choice: how digits and bytes are chosen.
          seed: of the sampling.

        Yields:
          The bytes that a row adds to each continuation, until all have their length.
        """
        context, tails, known = self.start(variables, prompts)
        blank = Open(
            jnp.full_like(known.bytes, PAD), tuple(jnp.full_like(d, -1) for d in known.digits)
        )
        left = np.full(len(prompts), max_new_bytes)
        number = 0
        while left.max() > 0:
            if bool(context.full.any()):
                context = self._slide(variables, context)
            key = jax.random.fold_in(jax.random.key(seed), number)
            context, tails, said = self._row(variables, context, tails, known, key, choice)
            told = [
                tokenizer.to_bytes(row.reshape(-1))[:most]
                for row, most in zip(np.asarray(said), left, strict=True)
            ]
            left = left - [len(part) for part in told]
            known, number = blank, number + 1
            yield told

    def __call__(self, *args: Any, **kwargs: Any) -> list[bytes]:
        """The whole continuations, without the prompts; see `stream`."""
        parts = list(self.stream(*args, **kwargs))
        return [b"".join(mine) for mine in zip(*parts, strict=True)]
