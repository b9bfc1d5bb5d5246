"""From rows of the highest level down to bytes, each level reading a few rows it said before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from latent_jax.systems.abstractinator import segment
from latent_jax.systems.abstractinator.model import Abstractinator, Rows
from latent_jax.systems.abstractinator.sample import Choice, say, say_rows
from latent_jax.systems.abstractinator.tokenizer import PAD


class Tail(NamedTuple):
    """The newest rows of a level, as many as its expander looks back on, newest last."""

    rows: Float[Array, "b m d"]
    there: Bool[Array, "b m"]


class Open(NamedTuple):
    """What a text already has of the row that comes next, on every level.

    Attributes:
      bytes: of its first segment; PAD where they are not known.
      digits: per level above 0, of the rows below that are complete; -1 where they are not known.
    """

    bytes: Int[Array, "b l"]
    digits: tuple[Int[Array, "b c n"], ...]


class _Joined(NamedTuple):
    """A level's tail and the rows that come after it, all that exist at the end, in order."""

    rows: Float[Array, "b r d"]
    there: Bool[Array, "b r"]
    new: Bool[Array, "b s"]
    tail: Tail


def _align(there: Bool[Array, "b r"], *values: Array) -> tuple[Array, ...]:
    """Moves what is there to the end, in order; ``there`` itself comes first."""
    order = jnp.argsort(there, axis=1, stable=True)
    at = jnp.arange(len(order))[:, None]
    return tuple(value[at, order] for value in (there, *values))


def _join(tail: Tail, rows: Float[Array, "b s d"], new: Bool[Array, "b s"]) -> _Joined:
    back, count = tail.rows.shape[1], rows.shape[1]
    there, joined, fresh = _align(
        jnp.concatenate([tail.there, new], 1),
        jnp.concatenate([tail.rows, rows], 1),
        jnp.pad(new, ((0, 0), (back, 0))),
    )
    after = Tail(joined[:, count:], there[:, count:])
    return _Joined(joined, there, fresh[:, back:], after)


def _first(new: Bool[Array, "b s"], given: Array, blank: int) -> Array:
    """What is given, at the first new entry of each text."""
    first = new & (jnp.cumsum(new, 1) == 1)
    first = first.reshape(*first.shape, *[1] * (given.ndim - 1))
    return jnp.where(first, given[:, None], blank)


def descend(
    model: Abstractinator,
    variables: Mapping[str, Any],
    row: Float[Array, "b d"],
    tails: tuple[Tail, ...],
    known: Open,
    key: Array,
    choice: Choice,
) -> tuple[Int[Array, "b s l"], tuple[Tail, ...]]:
    """Expands one row of the highest level.

    Args:
      model: the module.
      variables: its variables.
      row: quantised.
      tails: of every level, lowest first.
      known: what there already is of the row's text.
      key: of the sampling.
      choice: how digits and bytes are chosen.

    Returns:
      Ids of the new bytes in order, with specials between them, and the tails after them.
    """
    rows, new, after = row[:, None], jnp.ones((len(row), 1), bool), []
    for level in range(len(tails) - 1, 0, -1):
        at = _join(tails[level], rows, new)
        after.insert(0, at.tail)
        given = _first(at.new, known.digits[level - 1], -1)
        digits = say_rows(
            model, variables, level, at.rows, at.there, given, jax.random.fold_in(key, level),
            choice,
        )  # fmt: skip
        rows = model.apply(variables, digits, None, level - 1, method="append")
        rows = rows.reshape(len(rows), -1, rows.shape[-1])
        # Rows that the text has already are in the tail below, and are not said again.
        new = (at.new[..., None] & (given[..., 0] < 0)).reshape(len(rows), -1)
    at = _join(tails[0], rows, new)
    given = _first(at.new, known.bytes, PAD)
    said = say(
        model, variables, at.rows, at.there, given, jax.random.fold_in(key, 0), choice
    )
    fresh = at.new[..., None] & (given == PAD)
    return jnp.where(fresh, said, PAD), (at.tail, *after)


def read_texts(
    model: Abstractinator,
    variables: Mapping[str, Any],
    ids: Int[Array, "b t"],
    valid: Bool[Array, "b t"],
) -> tuple[tuple[Tail, ...], Open, Rows, Bool[Array, "b s"]]:
    """Compresses texts as far as nothing can be added to a row any more.

    Returns:
      The tails of every level, what is open on every level, the rows of the highest level, and
      which of these are complete.
    """
    c = model.config
    out = model.apply(variables, ids, valid, budget=ids.shape[1], method="encode")
    begun = _rest(ids, out, c.longest(0), PAD)
    done = out.there & ~out.found.open
    tails, digits = [_newest(out.rows, done, c.level.lookback)], []
    for level, above in enumerate(c.above, 1):
        below = out
        out = model.apply(variables, below.rows, done, level, method="rise")
        digits.append(_rest(below.digits, out, c.longest(level), -1))
        done = out.there & ~out.found.open
        tails.append(_newest(out.rows, done, above.lookback))
    return tuple(tails), Open(begun, tuple(digits)), out, done


def _newest(rows: Float[Array, "b s d"], there: Bool[Array, "b s"], size: int) -> Tail:
    more = ((0, 0), (size, 0))
    there, rows = _align(jnp.pad(there, more), jnp.pad(rows, (*more, (0, 0))))
    at = rows.shape[1] - size
    return Tail(rows[:, at:], there[:, at:])


def _rest(values: Array, out: Rows, longest: int, blank: int) -> Array:
    """What lies in each text's open segment, of which there is at most one."""
    laid, there = segment.grid(values, out.found, longest)
    at = jnp.argmax(out.found.open, 1)
    each = jnp.arange(len(at))
    mine = there[each, at] & out.found.open.any(1)[:, None]
    return jnp.where(mine.reshape(*mine.shape, *[1] * (laid.ndim - 3)), laid[each, at], blank)
