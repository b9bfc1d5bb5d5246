"""Compiled measurements of a model on batches of windows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from latent_jax.ops import vq_metrics
from latent_jax.systems.abstractinator import losses, segment
from latent_jax.systems.abstractinator.model import Abstractinator, Rows
from latent_jax.systems.abstractinator.sample import Choice, say, say_rows
from latent_jax.systems.abstractinator.tokenizer import EOP, PAD


class Measure:
    """Compiled measurements of one model; sums over a batch, to be added up."""

    def __init__(self, model: Abstractinator):
        self.model = model
        self.likelihoods = jax.jit(self._likelihoods)
        self.free_running = jax.jit(self._free_running, static_argnums=4)
        self.digits = jax.jit(
            lambda *text: model.apply(*text, method="pyramid")[-1].digits
        )

    def _likelihoods(self, variables, ids, valid):
        model, config = self.model, self.model.config
        every = model.apply(variables, ids, valid, method="pyramid")
        out = every[0]
        nll, counted, _, _ = losses.reconstruction(model, variables, ids, out)
        sums = {
            "bytes": valid.sum(),
            "covered": out.found.length.sum(),
            "byte_nats": jnp.sum(jnp.where(counted, nll, 0.0)),
        }
        for i, rows in enumerate(every):
            sums[f"rows{i}"] = rows.there.sum()
            sums[f"usage{i}"] = vq_metrics.histogram(rows.digits, rows.codes)
            error = rows.quantised.metrics["quantisation_error"]
            sums[f"mean/rvq.level{i}.quantisation_error"] = jnp.stack(list(error))
            if i:
                nats, known, right = losses.rows_below(model, variables, rows, every[i - 1], i)
                sums[f"nats{i}"] = jnp.sum(jnp.where(known, nats, 0.0), (0, 1, 2))
                sums[f"right{i}"] = (right & known).sum((0, 1, 2))
                sums[f"known{i}"] = known.sum((0, 1, 2))
        sums |= self._next_rows(variables, every[-1])
        for name in config.peers:
            nats = losses.peer_nats(model, variables, ids, valid, name)
            sums[f"nats/{name}"] = jnp.sum(jnp.where(valid, nats, 0.0))
            sums |= self._listed(nats, out, name)
        if config.entropy is not None and config.entropy.head != "gaussian":
            term = losses.entropy_model(model, variables, ids, valid)["entropy_model"]
            sums["nats/entropy_model"] = term.sum
        return sums

    def _listed(self, nats: Float[Array, "b t"], out: Rows, name: str) -> dict[str, Array]:
        """Segments, and their bytes, among as many of the likeliest strings as there are rows.

        Counted are those of at least the probability ``1 / n``, which are among the ``n``
        likeliest: Shannon's code of fixed length, ideal for this model, says these and some more.
        """
        laid, there = segment.grid(nats, out.found, self.model.config.longest(0))
        listed = jnp.sum(jnp.where(there, laid, 0.0), -1) <= out.depth * jnp.log(out.codes)
        listed &= out.there
        return {
            f"listed/{name}": listed.sum(),
            f"listed_bytes/{name}": jnp.sum(jnp.where(listed, out.found.length, 0)),
        }

    def _next_rows(self, variables, out: Rows) -> dict[str, Array]:
        logits, nats, known, row = losses.next_rows(self.model, variables, out)
        rank = jnp.sum(
            logits > jnp.take_along_axis(logits, jnp.maximum(out.digits, 0)[..., None], -1), -1
        )
        right = (jnp.argmax(logits, -1) == out.digits) & known
        log_p = jax.nn.log_softmax(logits)
        expected = -jnp.sum(jnp.exp(log_p) * log_p, -1)
        sums = {
            "digit_nats": jnp.sum(jnp.where(known, nats, 0.0), (0, 1)),
            "expected_nats": jnp.sum(jnp.where(known, expected, 0.0)),
            "right": right.sum((0, 1)),
            "known": known.sum((0, 1)),
            "row_right": jnp.sum(known[..., 0] & (right | ~known).all(-1)),
            "top5": jnp.sum(known & (rank < 5), (0, 1)),
            "top10": jnp.sum(known & (rank < 10), (0, 1)),
        }
        if row is not None:
            terms, seen = losses.values(self.model, variables, out, row)
            means = {"top.mse_pre": terms["top_mse"], "top.vq": terms["top_vq"], **seen}
            sums |= {f"mean/{name}": jnp.stack(list(mean)) for name, mean in means.items()}
        return sums

    def _free_running(self, variables, ids, valid, stages, level=0, other=False):
        """Greedy rows of a level's rows, greedy rows of these, and so on down to bytes.

        Args:
          variables: of the model.
          ids: byte ids.
          valid: which of them are bytes.
          stages: digits of the level from here on are dropped.
          level: whose rows are read.
          other: every window reads the rows of the one before it in the batch, the first those of
            the last: what is right then needs no row of its own.
        """
        model, config = self.model, self.model.config
        out = model.apply(variables, ids, valid, (), level, method="pyramid")
        high, sums = out[level], {}
        kept = jnp.where(jnp.arange(high.depth) < stages, high.digits, -1)
        kept = jnp.where(other, jnp.roll(kept, 1, 0), kept)
        rows = model.apply(variables, kept, level=level, method="append")
        for i in range(level, 0, -1):
            below = out[i - 1]
            b, s, depth = below.digits.shape
            blank = jnp.full((b, rows.shape[1], config.longest(i), depth), -1, jnp.int32)
            said = say_rows(
                model, variables, i, rows, out[i].there, blank, jax.random.key(0),
                Choice.of(depth),
            ).reshape(b, -1, depth)[:, :s]  # fmt: skip
            known = below.digits >= 0
            sums[f"digits{i - 1}"] = known.sum()
            sums[f"digits_right{i - 1}"] = (known & (said == below.digits)).sum()
            rows = model.apply(variables, jnp.where(known, said, -1), None, i - 1, method="append")
        found, said = self._bytes(variables, ids, out[0], rows)
        return {**sums, **found}, said

    def _bytes(
        self, variables, ids: Array, out: Rows, rows: Array
    ) -> tuple[dict[str, Array], Int[Array, "b s l"]]:
        longest = self.model.config.longest(0)
        wanted, counted, is_byte = segment.targets(ids, out.found, longest, EOP)
        blank = jnp.full(wanted.shape, PAD, jnp.int32)
        said = say(
            self.model, variables, rows, out.there, blank, jax.random.key(0), Choice.of(0)
        )
        right = said == wanted
        sums = {
            "bytes": is_byte.sum(),
            "right": (right & is_byte).sum(),
            "segments": out.there.sum(),
            "exact": jnp.sum((right | ~counted).all(-1) & out.there),
        }
        return sums, said
