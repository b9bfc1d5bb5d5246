"""One level and the model over its rows, as one module."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from latent_jax.nn.residual_vq import ResidualVQ
from latent_jax.nn.transformer import Cache
from latent_jax.nn.vq_outputs import Quantized
from latent_jax.systems.abstractinator import segment
from latent_jax.systems.abstractinator.compressor import Compressor
from latent_jax.systems.abstractinator.config import AbstractRun
from latent_jax.systems.abstractinator.expander import Expander, Views
from latent_jax.systems.abstractinator.segment import Segments
from latent_jax.systems.abstractinator.top import ByteLM, TopLM


class Rows(NamedTuple):
    """A compressed window.

    Attributes:
      rows: quantised rows, with a gradient to the compressor.
      digits: their digits, -1 at missing rows.
      there: which rows exist.
      found: where their bytes are.
      quantised: everything the quantiser said.
    """

    rows: Float[Array, "b s d"]
    digits: Int[Array, "b s n"]
    there: Bool[Array, "b s"]
    found: Segments
    quantised: Quantized


class Abstractinator(nn.Module):
    """Compressor, quantiser, expander, row model and (if configured) the byte peer.

    Attributes:
      config: the run.
    """

    config: AbstractRun

    def setup(self) -> None:
        c = self.config
        level, longest = c.level, c.segments.most
        self.compressor = Compressor(level, longest)
        self.quantiser = ResidualVQ(level.row_width, level.codes, level.stages, level.vq)
        self.expander = Expander(level, longest)
        self.top = TopLM(c.top, level.codes, level.stages)
        if c.byte_lm is not None:
            self.byte_lm = ByteLM(c.byte_lm)
        if c.entropy is not None:
            self.entropy = ByteLM(c.entropy, c.entropy.reach)

    def segment(
        self, ids: Int[Array, "b t"], valid: Bool[Array, "b t"], budget: int | None = None
    ) -> Segments:
        """Cuts windows as the run says."""
        c = self.config.segments
        surprise = None
        if c.rule == "entropy":
            surprise = segment.surprising(self.entropies(ids, valid), c.delta, c.threshold)
        return segment.segment(ids, valid, c.rule, c.most, budget or self.config.budget, surprise)

    def entropies(
        self, ids: Int[Array, "b t"], valid: Bool[Array, "b t"]
    ) -> Float[Array, "b t"]:
        """Bits of the entropy model's prediction of each byte, which boundaries are made of."""
        log_p = jax.nn.log_softmax(jax.lax.stop_gradient(self.foresee(ids, valid)))
        return -jnp.sum(jnp.exp(log_p) * log_p, -1) / jnp.log(2.0)

    def foresee(self, ids: Int[Array, "b t"], valid: Bool[Array, "b t"]) -> Float[Array, "b t v"]:
        """Logits of the entropy model."""
        return self.entropy(ids, valid)

    def append(
        self, digits: Int[Array, "*b n"], through: Float[Array, "*b d"] | None = None
    ) -> Float[Array, "*b d"]:
        """The rows of digits: the only rows that expander and row model ever read.

        Generation appends what this returns for the digits it has chosen; training reads what it
        returns for the digits of the text.

        Args:
          digits: -1 adds nothing.
          through: the same rows as the quantiser made them, whose gradient (to the compressor, and
            to no codebook) the result takes; its values are the digits' alone, to the bit.
        """
        rows = jax.lax.stop_gradient(self.quantiser.decode(digits))
        if through is None:
            return rows
        return rows + (through - jax.lax.stop_gradient(through))

    def encode(
        self,
        ids: Int[Array, "b t"],
        valid: Bool[Array, "b t"],
        train: bool = False,
        budget: int | None = None,
    ) -> Rows:
        """Bytes to quantised rows.

        Args:
          ids: byte ids.
          valid: True at bytes, False at the padding after them.
          train: the codebooks move, if their collection may. The rows are then those of the moved
            codebooks, which are the ones that generation will find.
          budget: segments per window; the run's by default.
        """
        found = self.segment(ids, valid, budget)
        vectors = self.compressor(ids, valid, found)
        quantised = self.quantiser(vectors, found.rows, train=train)
        rows = self.append(quantised.indices, quantised.quantized)
        return Rows(rows, quantised.indices, found.rows, found, quantised)

    def expand(
        self,
        rows: Float[Array, "b s d"],
        there: Bool[Array, "b s"],
        said: Int[Array, "b s l"],
    ) -> Float[Array, "b s l v"]:
        """Logits of the bytes of each row's segment, see `Expander`."""
        return self.expander(rows, there, said)

    def predict(
        self,
        rows: Float[Array, "b s d"],
        there: Bool[Array, "b s"],
        digits: Int[Array, "b s n"],
    ) -> Float[Array, "b s n k"]:
        """Logits of each row's digits from the rows before it; nothing flows back into the rows."""
        return self.top(jax.lax.stop_gradient(rows), there, digits)

    def peer(self, ids: Int[Array, "b t"], valid: Bool[Array, "b t"]) -> Float[Array, "b t v"]:
        """Logits of the plain byte model."""
        return self.byte_lm(ids, valid)

    def expand_views(self, rows: Float[Array, "b s d"], there: Bool[Array, "b s"]) -> Views:
        """What segments are said from place by place, see `Expander.views`."""
        return self.expander.views(rows, there)

    def expand_empty(self, segments: int) -> tuple[Cache, ...]:
        """The cache of `expand_step` before the first place."""
        return self.expander.empty(segments)

    def expand_step(
        self, views: Views, before: Array, place: Int[Array, ""], cache: tuple[Cache, ...]
    ) -> tuple[Float[Array, "n v"], tuple[Cache, ...]]:
        """Logits of one place of each segment, see `Expander.step`."""
        return self.expander.step(views, before, place, cache)

    def top_start(
        self, rows: Float[Array, "b s d"], count: Int[Array, " b"]
    ) -> tuple[Float[Array, "b c"], tuple[Cache, ...]]:
        """State of the row model after some rows, and its cache."""
        return self.top.start(rows, count)

    def top_extend(
        self, row: Float[Array, "b d"], cache: tuple[Cache, ...], count: Int[Array, " b"]
    ) -> tuple[Float[Array, "b c"], tuple[Cache, ...]]:
        """State of the row model after one row more."""
        return self.top.extend(row, cache, count)

    def top_logits(
        self, hidden: Float[Array, "*b c"], digits: Int[Array, "*b n"]
    ) -> Float[Array, "*b n k"]:
        """Logits of a row's digits from such a state."""
        return self.top.logits(hidden, digits)

    def __call__(self, ids: Int[Array, "b t"], valid: Bool[Array, "b t"]) -> Rows:
        """Touches every part, for initialisation."""
        out = self.encode(ids, valid)
        said, _, _ = segment.targets(ids, out.found, self.config.segments.most, 0)
        self.expand(out.rows, out.there, said)
        self.predict(out.rows, out.there, out.digits)
        if self.config.byte_lm is not None:
            self.peer(ids, valid)
        if self.config.entropy is not None:
            self.foresee(ids, valid)
        return out
