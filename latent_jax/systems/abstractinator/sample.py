"""How digits and bytes are chosen, and segments said place by place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from latent_jax.backbones import sampling
from latent_jax.backbones.sampling import Sampling, SamplingMode
from latent_jax.core.errors import ConfigError
from latent_jax.systems.abstractinator.model import Abstractinator
from latent_jax.systems.abstractinator.tokenizer import EOP, PAD


@dataclasses.dataclass(frozen=True)
class Choice:
    """A `Sampling` for each stage of a row's digits, and one for bytes; it compiles by its modes.

    Example:
      >>> Choice.of(stages=3, temperature=[1.0, 0.5], top_p=0.9).values[1:].tolist()
      [[0.5, 0.8999999761581421], [0.5, 0.8999999761581421], [0.5, 0.8999999761581421]]

    Attributes:
      modes: static part, stages first, bytes last.
      values: temperature and nucleus mass of each.
    """

    modes: tuple[SamplingMode, ...]
    values: Float[Array, "n 2"]

    @classmethod
    def of(
        cls,
        stages: int,
        temperature: float | Sequence[float] = 0.0,
        top_p: float | Sequence[float] | None = None,
    ) -> Choice:
        """One value for all, or one per stage whose last also holds for what follows, and bytes.

        Raises:
          ConfigError: a value out of range, or more than stages and bytes.
        """
        size = stages + 1
        each = zip(
            _spread("temperature", temperature, size), _spread("top_p", top_p, size), strict=True
        )
        parts = [Sampling(temperature=t, top_p=p) for t, p in each]
        values = jnp.asarray([part.values for part in parts], jnp.float32)
        return cls(tuple(part.mode for part in parts), values)

    def pick(
        self, which: int, key: Array, logits: Float[Array, "*b k"]
    ) -> Int[Array, "*b"]:
        """Chooses by a stage's rule (-1: bytes); no row's draw depends on its neighbours."""
        flat = logits.reshape(-1, logits.shape[-1])
        keys = sampling.row_keys(key, jnp.arange(len(flat)))
        chosen = sampling.choose(keys, flat, self.modes[which], *self.values[which])
        return chosen.reshape(logits.shape[:-1])


jax.tree_util.register_dataclass(Choice, data_fields=["values"], meta_fields=["modes"])


def _spread(name: str, given: Any, size: int) -> list[Any]:
    parts = list(given) if isinstance(given, Sequence) else [given]
    if not 1 <= len(parts) <= size:
        raise ConfigError(
            f"generate: {len(parts)} values of {name} for {size - 1} stages and the bytes"
        )
    return parts + parts[-1:] * (size - len(parts))


def digits_by_stage(
    logits_of: Callable[[Int[Array, "b n"]], Float[Array, "b n k"]],
    shape: tuple[int, int],
    key: Array,
    choice: Choice,
) -> Int[Array, "b n"]:
    """Chooses digits stage by stage, each stage's logits given the digits before it."""
    digits = jnp.full(shape, -1, jnp.int32)
    for i in range(shape[1]):
        chosen = choice.pick(i, jax.random.fold_in(key, i), logits_of(digits)[:, i])
        digits = digits.at[:, i].set(chosen)
    return digits


def next_digits(
    model: Abstractinator, variables: Mapping[str, Any], state: Float[Array, "b c"], key: Array,
    choice: Choice,
) -> Int[Array, "b n"]:
    """Digits of the row after a state of the row model."""
    return digits_by_stage(
        lambda digits: model.apply(variables, state, digits, method="top_logits"),
        (len(state), model.config.highest.stages), key, choice,
    )  # fmt: skip


def say(
    model: Abstractinator,
    variables: Mapping[str, Any],
    rows: Float[Array, "b r d"],
    there: Bool[Array, "b r"],
    given: Int[Array, "b s l"],
    key: Array,
    choice: Choice,
) -> Int[Array, "b s l"]:
    """Expands the last ``s`` of ``r`` rows of bytes, free-running.

    Args:
      model: the module.
      variables: its variables.
      rows: quantised rows.
      there: which exist.
      given: ids that are known already; PAD where the model has to speak.
      key: of the sampling.
      choice: how bytes are chosen.

    Returns:
      Bytes, then `EOP` up to the end if the segment is shorter than the longest.
    """
    views = model.apply(variables, rows, there, given.shape[1], method="expand_views")
    known = given.reshape(-1, given.shape[-1])

    def body(place: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
        said, cache = carry
        before = said[:, jnp.maximum(place - 1, 0)]
        logits, cache = model.apply(variables, views, before, place, cache, method="expand_step")
        chosen = choice.pick(-1, jax.random.fold_in(key, place), logits)
        chosen = jnp.where((place > 0) & (before == EOP), EOP, chosen)
        told = known[:, place]
        return said.at[:, place].set(jnp.where(told == PAD, chosen, told)), cache

    start = jnp.full(known.shape, PAD, jnp.int32)
    empty = model.apply(variables, len(known), method="expand_empty")
    said, _ = jax.lax.fori_loop(0, known.shape[-1], body, (start, empty))
    return said.reshape(given.shape)


def say_rows(
    model: Abstractinator,
    variables: Mapping[str, Any],
    level: int,
    rows: Float[Array, "b r d"],
    there: Bool[Array, "b r"],
    given: Int[Array, "b s l n"],
    key: Array,
    choice: Choice,
) -> Int[Array, "b s l n"]:
    """Expands the last ``s`` of ``r`` rows of a level to the digits of the rows below.

    As `say`, with digits in place of bytes and -1 in place of PAD.
    """
    views = model.apply(variables, rows, there, given.shape[1], level, method="expand_views")
    known = given.reshape(-1, *given.shape[2:])

    def body(place: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
        said, cache = carry
        before = said[:, jnp.maximum(place - 1, 0)]
        state, cache = model.apply(
            variables, views, before, place, cache, level, method="expand_step"
        )
        chosen = digits_by_stage(
            lambda digits: model.apply(variables, state, digits, level, method="expand_digits"),
            known.shape[::2], jax.random.fold_in(key, place), choice,
        )  # fmt: skip
        told = known[:, place]
        return said.at[:, place].set(jnp.where(told < 0, chosen, told)), cache

    start = jnp.full(known.shape, -1, jnp.int32)
    empty = model.apply(variables, len(known), level, method="expand_empty")
    said, _ = jax.lax.fori_loop(0, known.shape[1], body, (start, empty))
    return said.reshape(given.shape)
