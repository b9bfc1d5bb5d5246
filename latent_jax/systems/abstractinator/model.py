"""The levels and the model over the highest one's rows, as one module."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from latent_jax.nn.residual_vq import ResidualVQ
from latent_jax.nn.transformer import Cache
from latent_jax.nn.vq_outputs import Quantized
from latent_jax.systems.abstractinator import router, segment
from latent_jax.systems.abstractinator.compressor import Compressor
from latent_jax.systems.abstractinator.config import AbstractRun, part
from latent_jax.systems.abstractinator.expander import Expander, RowExpander, Views
from latent_jax.systems.abstractinator.foresee import EntropyModel, Foreseen
from latent_jax.systems.abstractinator.segment import Segments
from latent_jax.systems.abstractinator.top import ByteLM, TopLM


class Rows(NamedTuple):
    """Windows as a level has them.

    Attributes:
      rows: quantised rows, with a gradient to the compressor.
      digits: their digits, -1 at missing rows.
      there: which rows exist.
      found: where their bytes, or the rows below, are.
      quantised: everything the quantiser said.
      scores: what the segments were made of, see `Abstractinator.scores`; above level 0 nothing.
    """

    rows: Float[Array, "b s d"]
    digits: Int[Array, "b s n"]
    there: Bool[Array, "b s"]
    found: Segments
    quantised: Quantized
    scores: Float[Array, "b t"] | None = None

    @property
    def depth(self) -> int:
        """Digits of a row."""
        return self.digits.shape[-1]

    @property
    def codes(self) -> int:
        """Codes of each digit's stage."""
        return self.quantised.metrics["usage"].shape[-1]


class Lookback(NamedTuple):
    """What an expander reads in place of a level's rows.

    Attributes:
      rows: those of the text, and others where they were replaced.
      clean: which are those of the text.
    """

    rows: Float[Array, "b s d"]
    clean: Bool[Array, "b s"]


class Abstractinator(nn.Module):
    """Compressors, quantisers, expanders, row model and what else is configured.

    Level 0 reads bytes, level ``i`` the quantised rows of level ``i - 1``, whose quantiser is also
    the one that the expander of level ``i`` says digits of. Nothing flows from a level into the one
    below.

    Attributes:
      config: the run.
    """

    config: AbstractRun

    def setup(self) -> None:
        c = self.config
        for i, level in enumerate(c.levels):
            quantiser = ResidualVQ(level.row_width, level.codes, level.stages, level.vq)
            setattr(self, part("compressor", i), Compressor(level, c.longest(i), c.typical(i)))
            setattr(self, part("quantiser", i), quantiser)
            expander = RowExpander if i else Expander
            setattr(self, part("expander", i), expander(level, c.longest(i)))
        top = c.highest
        self.top = TopLM(c.top, top.codes, top.stages, top.row_width)
        for name, peer in c.peers.items():
            setattr(self, name, ByteLM(peer))
        if c.entropy is not None:
            self.entropy = EntropyModel(c.entropy)
        if c.router is not None:
            self.router = router.Router(c.router)

    def _part(self, kind: str, level: int) -> Any:
        return getattr(self, part(kind, level))

    def segment(
        self,
        ids: Int[Array, "b t"],
        valid: Bool[Array, "b t"],
        budget: int | None = None,
        scores: Float[Array, "b t"] | None = None,
    ) -> Segments:
        """Cuts windows as the run says, by `scores` where they are known already."""
        c = self.config.segments
        scores = self.scores(ids, valid) if scores is None else scores
        marked = None
        if c.rule == "information":
            marked = segment.informative(scores, c.bits, c.most)
        elif scores is not None:
            limit = c.cut if c.rule == "learned" else c.threshold
            marked = segment.surprising(scores, c.delta, limit)
        return segment.segment(ids, valid, c.rule, c.most, budget or self.config.budget, marked)

    def scores(
        self, ids: Int[Array, "b t"], valid: Bool[Array, "b t"]
    ) -> Float[Array, "b t"] | None:
        """What boundaries are made of: bits, or probabilities with a gradient; None by the bytes.

        ``fixed`` and ``space`` need no model.
        """
        rule = self.config.segments.rule
        if rule == "learned":
            return self.router(ids, valid)
        if rule == "information":
            return self.surprises(ids, valid)
        return self.entropies(ids, valid) if rule == "entropy" else None

    def entropies(
        self, ids: Int[Array, "b t"], valid: Bool[Array, "b t"]
    ) -> Float[Array, "b t"]:
        """Bits of the entropy model's prediction of each byte (or per number of its embedding)."""
        found = self.foresee(ids, valid).bits(self.config.gaussian)
        return jax.lax.stop_gradient(found)

    def surprises(
        self, ids: Int[Array, "b t"], valid: Bool[Array, "b t"]
    ) -> Float[Array, "b t"]:
        """Bits of each byte under the entropy model; 0 at padding."""
        log_p = jax.nn.log_softmax(jax.lax.stop_gradient(self.foresee(ids, valid).logits))
        own = jnp.take_along_axis(log_p, jnp.where(valid, ids, 0)[..., None], -1)[..., 0]
        return jnp.where(valid, -own, 0.0) / jnp.log(2.0)

    def foresee(self, ids: Int[Array, "b t"], valid: Bool[Array, "b t"]) -> Foreseen:
        """Predictions of the entropy model."""
        return self.entropy(ids, valid)

    def append(
        self,
        digits: Int[Array, "*b n"],
        through: Float[Array, "*b d"] | None = None,
        level: int = 0,
    ) -> Float[Array, "*b d"]:
        """The rows of digits: the only rows that expanders, levels above and row model ever read.

        Generation appends what this returns for the digits it has chosen; training reads what it
        returns for the digits of the text.

        Args:
          digits: -1 adds nothing.
          through: the same rows as the quantiser made them, whose gradient (to the compressor, and
            to no codebook) the result takes; its values are the digits' alone, to the bit.
          level: whose codes.
        """
        rows = jax.lax.stop_gradient(self._part("quantiser", level).decode(digits))
        if through is None:
            return rows
        return rows + (through - jax.lax.stop_gradient(through))

    def append_top(self, digits: Int[Array, "*b n"]) -> Float[Array, "*b d"]:
        """`append` for the highest level."""
        return self.append(digits, level=len(self.config.levels) - 1)

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
          train: the codebooks move, if their collection may. The rows are those of the codebooks
            before they do.
          budget: segments per window; the run's by default.
        """
        scores = self.scores(ids, valid)
        found = self.segment(ids, valid, budget, scores)
        out = self._compress(0, ids, valid, found, train)._replace(scores=scores)
        if self.config.segments.rule != "learned":
            return out
        rows = router.pass_on(out.rows, scores, found, self.config.segments.most)
        return out._replace(rows=rows)

    def rise(
        self,
        rows: Float[Array, "b s d"],
        there: Bool[Array, "b s"],
        level: int,
        train: bool = False,
    ) -> Rows:
        """Rows of the level below to those of ``level``; see `encode`."""
        children = self.config.longest(level)
        found = segment.segment(
            there, there, f"fixed:{children}", children, -(-there.shape[1] // children)
        )
        return self._compress(level, jax.lax.stop_gradient(rows), there, found, train)

    def _compress(
        self, level: int, read: Array, valid: Array, found: Segments, train: bool
    ) -> Rows:
        vectors = self._part("compressor", level)(read, valid, found)
        quantised = self._part("quantiser", level)(vectors, found.rows, train=train)
        # A code that few rows share moves far toward each of them, which nothing does for a text
        # that is only read: rows of moved codes would flatter the training.
        rows = quantised.quantized
        if not train:
            rows = self.append(quantised.indices, rows, level)
        return Rows(rows, quantised.indices, found.rows, found, quantised)

    def pyramid(
        self,
        ids: Int[Array, "b t"],
        valid: Bool[Array, "b t"],
        moving: tuple[int, ...] = (),
        upto: int | None = None,
    ) -> tuple[Rows, ...]:
        """Rows of every level, lowest first.

        Args:
          ids: byte ids.
          valid: see `encode`.
          moving: levels whose codebooks move.
          upto: the highest level wanted; all by default.
        """
        out = [self.encode(ids, valid, 0 in moving)]
        for i in range(1, len(self.config.levels) if upto is None else upto + 1):
            out.append(self.rise(out[-1].rows, out[-1].there, i, i in moving))
        return tuple(out)

    def expand(
        self,
        rows: Float[Array, "b s d"],
        there: Bool[Array, "b s"],
        said: Array,
        level: int = 0,
    ) -> Array:
        """Logits of what each row's segment says.

        See `Expander`, and above level 0 `RowExpander`: ``said`` are then the digits of the rows
        below.
        """
        if level == 0:
            return self.expander(rows, there, said)
        below = self.append(said, level=level - 1)
        return self._part("expander", level)(rows, there, said, below, self.codes(level - 1))

    def expand_views(
        self, rows: Float[Array, "b r d"], there: Bool[Array, "b r"], last: int, level: int = 0
    ) -> Views:
        """What segments are said from place by place, see `Expander.views`."""
        return self._part("expander", level).views(rows, there, last)

    def expand_empty(self, segments: int, level: int = 0) -> tuple[Cache, ...]:
        """The cache of `expand_step` before the first place."""
        return self._part("expander", level).empty(segments)

    def expand_step(
        self,
        views: Views,
        before: Array,
        place: Int[Array, ""],
        cache: tuple[Cache, ...],
        level: int = 0,
    ) -> tuple[Array, tuple[Cache, ...]]:
        """Logits (above level 0: the state) of one place of each segment, see `Expander.step`.

        ``before`` is what was said at the place before: a byte, or the digits of a row.
        """
        if level:
            before = self.append(before, level=level - 1)
        return self._part("expander", level).step(views, before, place, cache)

    def expand_digits(
        self, state: Float[Array, "n c"], said: Int[Array, "n s"], level: int
    ) -> Float[Array, "n s k"]:
        """Logits of the digits of a row of the level below ``level``."""
        return self._part("expander", level).digits(state, said, self.codes(level - 1))

    def predict(
        self,
        rows: Float[Array, "b s d"],
        there: Bool[Array, "b s"],
        digits: Int[Array, "b s n"],
    ) -> tuple[Float[Array, "b s n k"], Float[Array, "b s d"] | None]:
        """Logits of each row's digits from the rows before it, and the row where one is predicted.

        Nothing flows back into the rows, nor into codebooks.
        """
        return self.top(jax.lax.stop_gradient(rows), there, digits, self.codes(-1))

    def codes(self, level: int) -> Float[Array, "n k d"]:
        """The codes of every stage of a level (-1: the highest), as constants."""
        level = level % len(self.config.levels)
        return jax.lax.stop_gradient(self._part("quantiser", level).codebooks()[0])

    def requantise(self, rows: Float[Array, "b s d"], there: Bool[Array, "b s"]) -> Quantized:
        """Predicted rows through the quantiser of the real ones, which holds still."""
        quantiser = self._part("quantiser", len(self.config.levels) - 1)
        return quantiser(rows, there, frozen=True)

    def peer(
        self, ids: Int[Array, "b t"], valid: Bool[Array, "b t"], name: str = "byte_lm"
    ) -> Float[Array, "b t v"]:
        """Logits of a plain byte model."""
        return getattr(self, name)(ids, valid)

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
        return self.top.logits(hidden, digits, self.codes(-1))

    def __call__(
        self, ids: Int[Array, "b t"], valid: Bool[Array, "b t"]
    ) -> tuple[Rows, ...]:
        """Touches every part, for initialisation."""
        out = self.pyramid(ids, valid)
        said, _, _ = segment.targets(ids, out[0].found, self.config.segments.most, 0)
        self.expand(out[0].rows, out[0].there, said)
        for i in range(1, len(out)):
            said, _ = segment.grid(out[i - 1].digits, out[i].found, self.config.longest(i))
            self.expand(out[i].rows, out[i].there, said, i)
        self.predict(out[-1].rows, out[-1].there, out[-1].digits)
        for name in self.config.peers:
            self.peer(ids, valid, name)
        if self.config.entropy is not None:
            self.foresee(ids, valid)
        return out
