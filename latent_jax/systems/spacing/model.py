"""The transformer: gaps so far to a mixture density of the next one, with or without slots."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from latent_jax.nn.transformer import Block
from latent_jax.systems.spacing import kernels
from latent_jax.systems.spacing.config import SpacingModelConfig
from latent_jax.systems.spacing.embedding import GapEmbedding

# Resolution of what slots claim: splines over the octaves of distance.
_CLAIM_KNOTS = 16


class Ablation(NamedTuple):
    """What an evaluation does to the slots; a training step does nothing (see `ablation.none`).

    Attributes:
      visible: slots that may be attended to and read at all.
      keep: share of each slot's own final content that is read, read-out weights staying as they
        were (postfix).
      fill: what is added to that.
      identity: which learned identity each slot gets.
      content: which learned content each slot gets.
      identity_share: factor on the identities.
      content_share: factor on the contents, learned or drawn.
      shift: added to each slot's start.
    """

    visible: Bool[Array, " m"]
    keep: Float[Array, " m"]
    fill: Float[Array, "m w"]
    identity: Int[Array, " m"]
    content: Int[Array, " m"]
    identity_share: Float[Array, ""]
    content_share: Float[Array, ""]
    shift: Float[Array, "m w"]


class Output(NamedTuple):
    """One forward pass; ``p`` counts predictions: every position, or the cuts of a postfix.

    Attributes:
      raw: unnormalised mixture parameters.
      slots: final content of the slots, per cut (one "cut" for a prefix).
      read_out: weight of each slot in the prediction.
    """

    raw: Float[Array, "b p 3k"]
    slots: Float[Array, "b c m w"] | None = None
    read_out: Float[Array, "b c m"] | None = None


def prefix_mask(slots: int, t: int) -> Bool[Array, "s s"]:
    """Slots before the data see slots only: through one that saw all data, data would see ahead."""
    return jnp.tril(jnp.ones((slots + t, slots + t), bool))


def data_mask(t: int, slots: int) -> Bool[Array, "t s"]:
    """Data sees the past, and none of the slots after it: they have seen what follows."""
    return jnp.tril(jnp.ones((t, t + slots), bool))


class SpacingModel(nn.Module):
    """Causal transformer over normalised gaps with a mixture-density head.

    Attributes:
      config: the architecture.
      reach: physical distance that the kernels cover.
      heights: mean, standard deviation, least and greatest ``ln(t / 2 pi)`` of training.
      context: past gaps that the embedding of a position sees.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from latent_jax import SpacingModel
      >>> from latent_jax.systems.spacing.config import SpacingModelConfig
      >>> model = SpacingModel(SpacingModelConfig(layers=1, width=16, heads=2, ff=32))
      >>> gaps, log_height = jnp.ones((2, 40)), jnp.full((2,), 12.0)
      >>> variables = model.init(jax.random.key(0), gaps, log_height)
      >>> model.apply(variables, gaps, log_height).raw.shape  # 8 components
      (2, 40, 24)
    """

    config: SpacingModelConfig
    reach: float | Float[Array, ""] = 160.0
    heights: tuple[float | Float[Array, ""], ...] = (11.5, 1.0, 8.5, 14.5)
    context: int = 255

    @nn.compact
    def __call__(
        self,
        gaps: Float[Array, "b t"],
        log_height: Float[Array, " b"],
        cuts: Int[Array, " c"] | None = None,
        ablation: Ablation | None = None,
        train: bool = False,
    ) -> Output:
        """Predicts the gap after each position, or after each cut.

        Args:
          gaps: unfolded gaps, mean 1.
          log_height: ``ln(t / 2 pi)`` of each window, constant over it.
          cuts: postfix only: index of the last gap that a group of slots may see; default the
            last one.
          ablation: an experiment on the slots.
          train: draw slot dropout and permutations (stream ``sample``).
        """
        c, memory = self.config, self.config.memory
        b, t = gaps.shape
        if not c.embed.height:
            log_height = jnp.full_like(log_height, 2 * np.pi)  # distance 1 per gap
        embedding = GapEmbedding(c, self.reach, self.heights, self.context, name="gaps")
        if memory.read == "claims":
            cuts = jnp.asarray([t - 1]) if cuts is None else cuts
            slots = self._slots(b, cuts.shape[0], ablation, train)
            visible = self._visible(b, ablation, train)
            claims = self._claims(slots, visible)
            held = embedding(gaps, log_height, cuts, claims)
            final = self._exchanged(held, visible)
            return self._read_out(final, visible, ablation)
        x, *line = embedding(gaps, log_height)
        at = self._coordinates(gaps, log_height)
        if memory.kind == "none":
            x = self._blocks(x, at, data_mask(t, 0)[None], 0, None)
            return Output(self._head(x, *line))
        m = memory.slots
        cuts = jnp.asarray([t - 1]) if cuts is None or memory.kind == "prefix" else cuts
        groups = cuts.shape[0]
        slots = self._slots(b, groups, ablation, train)
        visible = self._visible(b, ablation, train)  # b m
        grid = jnp.arange(groups * m)
        group, slot = grid // m, grid % m
        seen = visible[:, slot]
        if memory.kind == "prefix":
            x = jnp.concatenate([slots[:, 0], x], axis=1)
            at = jnp.concatenate([jnp.repeat(at[:, :1], m, 1), at], axis=1)
            mask = prefix_mask(m, t)[None]
            hidden = jnp.concatenate([~seen, jnp.zeros((b, t), bool)], axis=1)
            # A hidden slot still sees itself, so that its row has something to average.
            mask = mask & (~hidden[:, None, :] | jnp.eye(m + t, dtype=bool)[None])
            x = self._blocks(x, at, mask, 0, m)
            return Output(self._head(x[:, m:], *line), x[:, None, :m])
        x = jnp.concatenate([x, slots.reshape(b, groups * m, -1)], axis=1)
        at = jnp.concatenate([at, at[:, cuts[group]]], axis=1)
        data = jnp.arange(t)[None] <= cuts[group][:, None]  # [g*m, t]
        own = group[:, None] == group[None]
        own = own[None] & (seen[:, None, :] | jnp.eye(groups * m, dtype=bool)[None])
        upper = data_mask(t, groups * m)
        lower = jnp.concatenate([jnp.broadcast_to(data, (b, *data.shape)), own], axis=2)
        mask = jnp.concatenate([jnp.broadcast_to(upper, (b, *upper.shape)), lower], axis=1)
        x = self._blocks(x, at, mask, t, groups * m)
        return self._read_out(x[:, t:].reshape(b, groups, m, -1), visible, ablation)

    def _claims(self, slots: Array, visible: Array) -> Array:
        """Share of each past gap, the latest first, that each slot holds, ``[b, groups, m, lags]``.

        A softmax over slots (Locatello et al. 2020): what one claims, the others do not hold. They
        claim by distance in octaves, each of which says about as much of the next gap.
        """
        c = self.config
        octave = jnp.log1p(jnp.arange(self.context)) / np.log1p(self.context)
        key = self.param("claim_key", nn.initializers.normal(2.0), (_CLAIM_KNOTS, c.width))
        key = kernels.basis(octave, _CLAIM_KNOTS, 1.0) @ key
        logits = jnp.einsum("bgmw,jw->bgmj", slots, key) * c.width**-0.5
        logits = jnp.where(visible[:, None, :, None], logits, -1e30)
        claims = jax.nn.softmax(logits, axis=2)
        self.sow("intermediates", "claims", claims)
        return claims

    def _exchanged(self, held: tuple[Array, Array, Array], visible: Array) -> Array:
        """Slots after the blocks in which they attend to each other, ``[b, groups, m, w + 2]``."""
        x, *carried = held
        b, groups, m, w = x.shape
        # A hidden slot sees itself, so that its row has something to average.
        mask = visible[:, None, :] | jnp.eye(m, dtype=bool)
        mask = jnp.repeat(mask, groups, axis=0)
        x = self._blocks(
            x.reshape(b * groups, m, w), jnp.zeros((b * groups, m)), mask, 0, m,
            self.config.attending,
        )  # fmt: skip
        carried = jnp.stack(carried, axis=-1)
        return jnp.concatenate([x.reshape(b, groups, m, w), carried], axis=-1)

    def _read_out(self, final: Array, visible: Array, ablation: Ablation | None) -> Output:
        """The prediction from the slots of each group."""
        c, memory = self.config, self.config.memory
        w, m = c.width, memory.slots
        if memory.norm_cap is not None:
            norm = jnp.linalg.norm(final[..., :w], axis=-1, keepdims=True)
            short = jnp.minimum(1.0, memory.norm_cap / jnp.maximum(norm, 1e-6))
            final = jnp.concatenate([final[..., :w] * short, final[..., w:]], axis=-1)
        if memory.pool == "sum":
            weight = jnp.broadcast_to(visible[:, None], final.shape[:3]).astype(final.dtype)
        else:
            logits = nn.Dense(1, use_bias=False, name="read_out")(final)[..., 0]
            if memory.identity == "fixed":
                logits = logits + self.param("read_out_weight", nn.initializers.zeros, (m,))
            logits = jnp.where(visible[:, None], logits, -1e30)
            weight = jax.nn.softmax(logits, axis=-1)
        read = final
        if ablation is not None:
            read = ablation.keep[:, None] * final + ablation.fill
        pooled = jnp.einsum("bgm,bgmw->bgw", weight, read)
        if memory.read == "attention":
            return Output(self._head(pooled), final, weight)
        rest = range(len(c.attending), c.layers)
        x = self._blocks(pooled[..., :w], None, None, 0, None, rest)
        return Output(self._head(x, pooled[..., w], pooled[..., w + 1]), final, weight)

    def _coordinates(self, gaps: Array, log_height: Array) -> Array:
        kind, t = self.config.positions.kind, gaps.shape[1]
        if kind == "index":
            return jnp.broadcast_to(jnp.arange(t, dtype=jnp.float32), gaps.shape)
        unit = 2 * jnp.pi / log_height[:, None]
        return unit * (jnp.arange(t) if kind == "warped" else jnp.cumsum(gaps, axis=1))

    def frequencies(self) -> Array | np.ndarray:
        """Radians per unit of coordinate of every rotary plane: shared, or per head."""
        c = self.config
        planes = c.width // c.heads // 2
        if c.positions.frequencies == "primes":
            lines = np.log(kernels.prime_powers(c.heads * planes))
            return lines.reshape(planes, c.heads).T.astype(np.float32)
        # Periods from 2 to 1024 gaps; a gap is 2 pi / L long in the other coordinates.
        periods = np.geomspace(np.pi, 2 * np.pi / 1024, planes).astype(np.float32)
        if c.positions.kind == "index":
            return periods
        return periods * self.heights[0] / (2 * np.pi)

    def _blocks(
        self, x: Array, at: Array | None, mask: Array | None, first: int, slots: int | None,
        layers: range | None = None,
    ) -> Array:
        c = self.config
        frequencies = jnp.asarray(self.frequencies())
        for layer in range(c.layers) if layers is None else layers:
            scale = (2 * c.layers) ** -0.5
            attends = layer in c.attending
            block = Block(c.width, c.heads, c.ff, scale, attends, name=f"block_{layer}")
            x = block(x, at, mask, frequencies)
            if slots and c.memory.block_norm:
                part = x[:, first : first + slots]
                rows = part.reshape(x.shape[0], -1, c.memory.slots * c.width)
                scale = jax.lax.rsqrt(jnp.mean(rows**2, -1, keepdims=True) + 1e-6)
                part = (rows * scale).reshape(part.shape)
                x = jnp.concatenate([x[:, :first], part, x[:, first + slots :]], axis=1)
        return x

    def _slots(self, b: int, groups: int, ablation: Ablation | None, train: bool) -> Array:
        """Start of every slot, ``[b, groups, m, w]``."""
        memory, w = self.config.memory, self.config.width
        m = memory.slots
        shape = (b, groups, m, w)
        orthogonal = nn.initializers.orthogonal()
        content, identity = jnp.zeros((m, w)), jnp.zeros((m, w))
        if memory.identity == "anonymous":
            # Drawn: identical slots would stay identical, learned ones would have an identity.
            scale = self.param("slot_scale", nn.initializers.ones, (w,))
            content = scale * jax.random.normal(self.make_rng("sample"), shape)
        elif memory.content == "normal":
            content = self.param("slot_content", orthogonal, (m, w)) * w**0.5
        if memory.identity in ("fixed", "permute_per_batch"):
            identity = self.param("slot_identity", orthogonal, (m, w)) * w**0.5
            if train and memory.identity == "permute_per_batch":
                identity = identity[jax.random.permutation(self.make_rng("sample"), m)]
        if ablation is None:
            return jnp.broadcast_to(content + identity, shape)
        content = ablation.content_share * content[..., ablation.content, :]
        identity = ablation.identity_share * identity[ablation.identity]
        return jnp.broadcast_to(content + identity + ablation.shift, shape)

    def _visible(self, b: int, ablation: Ablation | None, train: bool) -> Array:
        memory = self.config.memory
        visible = jnp.ones((b, memory.slots), bool)
        if ablation is not None:
            visible = visible & ablation.visible
        if train and memory.dropout:
            kept = jax.random.bernoulli(
                self.make_rng("sample"), 1 - memory.dropout, visible.shape
            )
            # A window that lost every slot keeps them all.
            visible = jnp.where(kept.any(1, keepdims=True), kept, visible)
        return visible

    def _head(self, x: Array, line: Array | None = None, spread: Array | None = None) -> Array:
        """Mixture parameters; with a linear prediction, locations and scales are relative to it."""
        c = self.config.head
        relative = line is not None and c.plain
        wide, scale = (1.0, -0.3) if relative else (0.6, -1.0)
        means = np.linspace(-wide, wide, c.components)
        if c.family != "lognormal" and not relative:
            means = means + 1.0
        start = np.concatenate([np.zeros(c.components), means, np.full(c.components, scale)])
        init = nn.initializers.variance_scaling(0.01, "fan_in", "truncated_normal")
        raw = nn.Dense(
            3 * c.components,
            kernel_init=init,
            bias_init=lambda *_: jnp.asarray(start, jnp.float32),
            name="head",
        )(x)
        if not relative:
            return raw
        weight, mean, scale = jnp.split(raw, 3, axis=-1)
        # Far below 1, a softplus is an exponential: adding a logarithm scales it.
        mean = line[..., None] + jnp.exp(spread)[..., None] * mean
        return jnp.concatenate([weight, mean, scale + spread[..., None]], axis=-1)
