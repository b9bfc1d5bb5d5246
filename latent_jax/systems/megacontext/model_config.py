"""What a MegaContext model is made of."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from latent_jax.core.config import field
from latent_jax.core.errors import ConfigError
from latent_jax.systems.megacontext.base_lora import BaseLoraConfig
from latent_jax.systems.megacontext.layout import Layout


@dataclass(frozen=True)
class GistConfig:
    """How a block, or a group of gists, becomes the gist above it."""

    kind: Literal["reads", "heads", "embeddings"] = field(
        default="reads",
        help="reads: keys and values by a GistNet, trained; heads: the block's own keys and "
        "values, of which every head keeps as many as it needs (calibrated, not trained); "
        "embeddings: inputs of the base by a GistNet, trained",
    )
    reads: int = field(
        default=4, ge=1, help="attention reads per slot and head, each with a map of its own"
    )
    streams: int = field(
        default=2, ge=1, help="embeddings: layers of the base whose streams a slot reads"
    )
    content: float = field(
        default=8.0, ge=0,
        help="embeddings: how much the first read of a slot prefers words that the base did not "
        "expect at first, in logits",
    )  # fmt: skip
    window: int = field(
        default=8, ge=1, help="blocks that the base encodes together; no gist depends on others"
    )
    lead: int = field(
        default=0, ge=0,
        help="blocks before a window that the base reads with it: without them the first blocks of "
        "a window know nothing of what came before",
    )  # fmt: skip
    place: Literal["centre", "start"] = field(
        default="centre", help="rotary position of a slot within its stretch of the span"
    )
    focus: float = field(
        default=4.0, ge=0, help="how much a slot prefers its own stretch at first, in logits"
    )
    queries: int = field(
        default=512, ge=1, help="heads: queries of other texts that a block's entries answer"
    )
    reach: int = field(
        default=448, ge=1, help="heads: tokens behind a block over which those queries stand"
    )
    again: float = field(
        default=0.1, ge=0, help="heads: weight of the block's own tokens, read a second time"
    )
    ridge: float = field(
        default=0.1, gt=0, help="heads: ridge of the fit, in mean squared attention of an entry"
    )
    calibration: int = field(
        default=16, ge=2,
        help="heads: training windows that lend queries and share out the room; embeddings: that "
        "tell which words are unexpected",
    )
    places: int = field(
        default=128, ge=1, help="heads: most entries of one head in a gist of the upper levels"
    )

    def validate(self) -> None:
        """Refuses text before windows whose entries are made anew for every context, and what
        gists of the text's own entries do not look at.
        """
        if self.kind == "heads":
            given = {f.name: f.default for f in dataclasses.fields(self)}
            unread = [n for n in ("reads", "focus", "place") if getattr(self, n) != given[n]]
            if unread:
                raise ConfigError(
                    f"model.gist.{unread[0]}={getattr(self, unread[0])}: kind=heads has no slots "
                    "that read, and its entries stand where their text does: leave it out"
                )
        if self.lead and self.kind == "embeddings":
            raise ConfigError(
                "model.gist.lead: gists that are input embeddings are read together in every "
                "context, and windows have no lead: set it to 0"
            )


@dataclass(frozen=True)
class PositionConfig:
    """Where entries stand when they are read; gists are trained where their text stood."""

    kind: Literal["original", "ordinal"] = field(
        default="original",
        help="original: where the text stood; ordinal: entries are numbered (ablation)",
    )
    far: int | None = field(
        default=None, ge=1,
        help="original: tokens before the cursor beyond which distance is not told apart; none: "
        "seven eighths of the base's positions",
    )  # fmt: skip
    damped: bool = field(
        default=False,
        help="reads: a slot's keys are damped in each rotary plane by the expectation of its "
        "rotation over the slot's stretch (ablation)",
    )

    def validate(self) -> None:
        """Refuses a distance where there are none."""
        if self.kind == "ordinal" and self.far is not None:
            raise ConfigError(
                f"model.positions.far={self.far}: ordinal positions are no distances in the text: "
                "leave it out"
            )


@dataclass(frozen=True)
class LensConfig:
    """LensNet: what the newest gists make of every node of the working context."""

    width: int = field(default=64, ge=1, help="residual stream")
    heads: int = field(default=4, ge=1, help="attention heads; they divide the width")
    stacks: int = field(default=2, ge=1, le=3, help="dual cross-attentions")
    causal: bool = field(default=False, help="a node is scored by what starts no later (ablation)")
    layers: int = field(default=4, ge=1, help="layers of the base whose values it looks at")
    words: bool = field(
        default=False, help="it also sees how many rare words of the tail each node has (BM25)"
    )

    def validate(self) -> None:
        """Refuses a width that the heads do not divide."""
        if self.width % self.heads:
            raise ConfigError(f"model.lens: heads={self.heads} do not divide width={self.width}")


@dataclass(frozen=True)
class MatcherConfig:
    """Late interaction between a question and the tokens of a history."""

    layers: tuple[int, ...] = field(
        default=(8, 14, 20), ge=1,
        help="layers of the base whose inputs are matched; those behind the last do not run",
    )  # fmt: skip
    width: int = field(default=64, ge=1, help="numbers of a token's stored vector, a byte each")
    window: int = field(default=8, ge=2, help="blocks that the base reads together")
    question: int = field(default=24, ge=1, help="last tokens of a question that are matched")
    rerank: int = field(
        default=0, ge=0,
        help="best candidates that the base reads again, by how likely the question is behind them",
    )  # fmt: skip
    start: str | None = field(
        default=None, help="packaged matcher whose weights to start from; none: whitened states"
    )

    def validate(self) -> None:
        """Refuses layers that are not given in their order."""
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise ConfigError(f"model.matcher.layers={list(self.layers)}: give them in order, once")


@dataclass(frozen=True)
class ModelConfig:
    """What is trained beside the frozen base."""

    layout: Layout = field(
        default_factory=lambda: Layout(slots=(4,)), help="blocks, levels and slots of the tree"
    )
    gist: GistConfig = field(default_factory=GistConfig, help="GistNet")
    positions: PositionConfig = field(
        default_factory=PositionConfig, help="rotary positions of entries"
    )
    lens: LensConfig | None = field(
        default=None, help="a learned focus, trained by a phase with data lens; none: no lens"
    )
    matcher: MatcherConfig | None = field(
        default=None, help="what the policy match asks, trained by a phase with data questions"
    )
    lora: BaseLoraConfig | None = field(
        default=None,
        help="deltas of the base where it reads on behind a working context; none: it is frozen",
    )  # fmt: skip
    remat: bool = field(default=False, help="recompute activations in the backward pass")

    def validate(self) -> None:
        """Refuses positions that gists of a kind cannot have."""
        p, kind = self.positions, self.gist.kind
        if p.kind == "ordinal" and kind == "heads":
            raise ConfigError(
                "model.positions.kind=ordinal: gists of kind heads are the text's own keys, which "
                "stand apart as their tokens did: use original"
            )
        if p.damped and kind != "reads":
            why = {
                "heads": "are keys of single tokens, which have no width",
                "embeddings": "get their keys inside the base",
            }[kind]
            raise ConfigError(
                f"model.positions.damped: gists of kind {kind} {why}: leave it out"
            )
