"""Where segments start, as pure functions of the bytes.

The semantics, stated once: a segment starts *at* a byte, and whether byte ``t`` starts one depends
on bytes ``0 … t`` alone. So a stream is cut as the whole text is, and future bytes never move past
boundaries. ``fixed:n`` starts one every ``n`` bytes; ``space`` at the first byte after a run of
white space, which thus ends the word before it; ``space:n`` the same where the segment so far has
``n`` bytes, so that short words join the next one; ``entropy`` at the byte that is hard to foresee:
with ``H[t]`` the entropy of a byte model's prediction of byte ``t`` from those before it, where
``H[t] > H[t-1] + delta`` or ``H[t] > threshold``; ``learned`` where a router's probability (see
`router`) is above a threshold. No segment is longer than ``longest``: where a rule would let it
grow, another one starts.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from latent_jax.core.errors import ConfigError

_WHITE = b" \t\n\r\v\f"


class Segments(NamedTuple):
    """Segments of windows of ``t`` bytes, in a fixed budget of ``s`` per window.

    Attributes:
      segment: number of the segment of each byte; ``s`` for padding and for bytes that overflow.
      place: place of each byte in its segment.
      start: first byte of each segment.
      length: its bytes; 0 where there is no such segment.
      open: whether it may go on after the window's last byte, so that its end is not known.
      overflow: valid bytes of each window beyond the budget; nothing else of them is left.
    """

    segment: Int[Array, "b t"]
    place: Int[Array, "b t"]
    start: Int[Array, "b s"]
    length: Int[Array, "b s"]
    open: Bool[Array, "b s"]
    overflow: Int[Array, " b"]

    @property
    def rows(self) -> Bool[Array, "b s"]:
        """Which segments there are."""
        return self.length > 0


class Rule(NamedTuple):
    """A rule by name, and the number behind its colon: 0 of rules that have none, 1 of ``space``.

    Attributes:
      kind: what it is called.
      size: bytes of every segment (``fixed``) or the fewest of a segment that is not the last.
    """

    kind: str
    size: int


def parse_rule(rule: str) -> Rule:
    """A rule's name and number.

    Raises:
      ConfigError: there is no such rule.

    Example:
      >>> parse_rule("fixed:6"), parse_rule("space").size
      (Rule(kind='fixed', size=6), 1)
    """
    kind, _, size = rule.partition(":")
    if kind in ("fixed", "space") and size.isdecimal() and int(size) > 0:
        return Rule(kind, int(size))
    if rule in ("space", "entropy", "information", "learned"):
        return Rule(rule, int(rule == "space"))
    raise ConfigError(
        f"segments.rule = {rule!r}: no such rule; allowed: fixed:N, space or space:N (N >= 1), "
        "entropy, information, learned"
    )


def surprising(
    bits: Float[Array, "b t"], delta: float | None, threshold: float | None
) -> Bool[Array, "b t"]:
    """Bytes whose prediction is uncertain; the first one always is.

    Args:
      bits: entropy of the prediction of each byte; or, learned, its probability of a start.
      delta: bits above the byte before; None is never.
      threshold: bits; None is never.
    """
    out = jnp.arange(bits.shape[1]) == 0
    if delta is not None:
        out = out | (bits > jnp.pad(bits[:, :-1], ((0, 0), (1, 0))) + delta)
    if threshold is not None:
        out = out | (bits > threshold)
    return jnp.broadcast_to(out, bits.shape)


def informative(
    bits: Float[Array, "b t"], budget: float, longest: int
) -> Bool[Array, "b t"]:
    """Bytes with which a segment would hold more than it may; the first one always is.

    Args:
      bits: surprise of each byte, which is its own segment if it alone exceeds the budget.
      budget: bits of a segment.
      longest: most bytes of a segment.

    Example:
      >>> import jax.numpy as jnp
      >>> informative(jnp.asarray([[3.0, 1, 1, 9, 1, 5]]), 6.0, 8)[0].astype(int).tolist()
      [1, 0, 0, 1, 1, 0]
    """

    def step(held: tuple[Array, Array], bit: Array) -> tuple[tuple[Array, Array], Array]:
        total, count = held[0] + bit, held[1] + 1
        begins = (total > budget) | (count > longest)
        return (jnp.where(begins, bit, total), jnp.where(begins, 1, count)), begins

    full = jnp.full(bits.shape[:1], longest)
    _, begins = jax.lax.scan(step, (jnp.zeros_like(bits[:, 0]), full), bits.T)
    return begins.T


@functools.partial(jax.jit, static_argnames=("least", "longest"))
def words(ids: Int[Array, "b t"], least: int, longest: int) -> Bool[Array, "b t"]:
    """First bytes after white space behind at least ``least`` bytes; the first byte always is one.

    Example:
      >>> import jax.numpy as jnp
      >>> words(jnp.asarray([list(b"to be or not")]), 4, 8)[0].astype(int).tolist()
      [1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0]
    """
    white = jnp.isin(ids, jnp.asarray(list(_WHITE)))
    ended = jnp.pad(white[:, :-1], ((0, 0), (1, 0)), constant_values=False) & ~white

    def step(count: Array, end: Array) -> tuple[Array, Array]:
        begins = (end & (count >= least)) | (count == longest)
        return jnp.where(begins, 1, count + 1), begins

    _, begins = jax.lax.scan(step, jnp.full(ids.shape[:1], longest), ended.T)
    return begins.T


def starts(
    ids: Int[Array, "b t"], rule: str, longest: int, surprise: Bool[Array, "b t"] | None = None
) -> Bool[Array, "b t"]:
    """Which bytes start a segment.

    Args:
      ids: byte ids.
      rule: see `parse_rule`.
      longest: most bytes of a segment.
      surprise: `surprising` bytes for ``entropy`` and ``learned``, `informative` ones for
        ``information``.
    """
    at = jnp.arange(ids.shape[1])
    kind, size = parse_rule(rule)
    if kind == "space":
        return words(ids, size, longest)
    natural = jnp.broadcast_to(at % size == 0, ids.shape) if kind == "fixed" else surprise
    begun = jax.lax.cummax(jnp.where(natural, at, 0), axis=1)
    return (at - begun) % longest == 0


def segment(
    ids: Int[Array, "b t"],
    valid: Bool[Array, "b t"],
    rule: str,
    longest: int,
    budget: int,
    surprise: Bool[Array, "b t"] | None = None,
) -> Segments:
    """Cuts windows.

    Args:
      ids: byte ids.
      valid: True at bytes, False at the padding that follows them.
      rule: see `starts`.
      longest: most bytes of a segment.
      budget: segments per window.
      surprise: see `starts`.

    Example:
      >>> import jax.numpy as jnp
      >>> ids = jnp.asarray([list(b"to be or")])
      >>> segment(ids, ids > 0, "space", 8, 4).length.tolist()
      [[3, 3, 2, 0]]
    """
    first = starts(ids, rule, longest, surprise) & valid
    number = jnp.cumsum(first, 1) - 1
    kept = valid & (number < budget)
    number = jnp.where(kept, number, budget)
    member = number[:, None] == jnp.arange(budget)[:, None]
    length = member.sum(-1)
    start = jnp.argmax(member, -1)
    at = jnp.arange(ids.shape[1])
    place = jnp.where(kept, at - jnp.take_along_axis(start, number.clip(0, budget - 1), 1), 0)
    last = (start + length == valid.sum(1, keepdims=True)) & (length > 0)
    overflow = (valid & ~kept).sum(1)
    return Segments(number, place, start, length, last & (length < longest), overflow)


def grid(
    values: Array, found: Segments, longest: int
) -> tuple[Array, Bool[Array, "b s l"]]:
    """Values of bytes, laid out by segment: ``[b, s, longest, …]`` and where there is one."""
    at = found.start[..., None] + jnp.arange(longest)
    there = jnp.arange(longest) < found.length[..., None]
    at = jnp.where(there, at, 0)
    b = values.shape[0]
    flat = values[jnp.arange(b)[:, None], at.reshape(b, -1)]
    return flat.reshape(*at.shape, *values.shape[2:]), there


def targets(
    ids: Int[Array, "b t"], found: Segments, longest: int, eop: int
) -> tuple[Int[Array, "b s l"], Bool[Array, "b s l"], Bool[Array, "b s l"]]:
    """What an expander has to say of each segment: its bytes, then ``eop``.

    ``eop`` is left out where a segment has its greatest length (everyone knows that it is over) and
    where the window ends in it (nobody knows).

    Returns:
      ids with `eop`, which of them are said, and which of these are bytes.
    """
    laid, there = grid(ids, found, longest)
    end = (jnp.arange(longest) == found.length[..., None]) & found.rows[..., None]
    end &= ~found.open[..., None]
    return jnp.where(there, laid, eop), there | end, there
