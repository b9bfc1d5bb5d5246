"""The focus over a stored history: which nodes a policy brings into the working context.

Needs the tree and no language model, unless the policy is a lens with a prompt to look at.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from latent_jax.core.config import field
from latent_jax.core.errors import ConfigError, StoreError
from latent_jax.systems.megacontext import policies, telemetry
from latent_jax.systems.megacontext import tiling as tl
from latent_jax.systems.megacontext.allocator import FocusConfig, Trace, refocus
from latent_jax.systems.megacontext.layout import Layout
from latent_jax.systems.megacontext.lens import LensNet
from latent_jax.systems.megacontext.matcher import Finder
from latent_jax.systems.megacontext.policy_names import MEASURED, POLICIES, SEARCHING
from latent_jax.systems.megacontext.sight import Node, Sight
from latent_jax.systems.megacontext.store import GistTree
from latent_jax.systems.megacontext.tiling import Tiling


@dataclass(frozen=True)
class RuntimeConfig:
    """The working context of a runtime."""

    budget: int = field(default=512, ge=1, help="entries of the working context, W")
    policy: str = field(default="bm25", help=f"what scores the nodes: {', '.join(POLICIES)}")
    iterations: int = field(default=64, ge=1, help="focus iterations until a question is read")
    focus: FocusConfig = field(
        # Between one question and the next nothing has to rest, and four actions cannot pay for a
        # node of an upper level: of slots 4 and 16 it takes 112 entries, and a raw block gives 28.
        default_factory=lambda: FocusConfig(
            residency=1, cooldown=0, hysteresis=0.0, max_actions=64
        ),
        help="how eagerly the focus moves for a question",
    )
    moving: FocusConfig = field(
        default_factory=FocusConfig,
        help="how eagerly it moves from block to block of what is generated",
    )


class Lens(NamedTuple):
    """A trained lens.

    Attributes:
      net: the module.
      params: its parameters.
      sight: what it looks at.
    """

    net: LensNet
    params: Any
    sight: Sight


class Focus:
    """Moves the focus of one working context.

    Attributes:
      reads: whether a language model is at hand.

    Args:
      tree: the history.
      layout: sizes.
      config: size and policy of the working context.
      lens: for the policy ``lens``.
      finder: for the policy ``match``.

    Raises:
      ConfigError: there is no such policy, it needs losses that only a measurement has, or a lens
        that is not there.
    """

    reads = False

    def __init__(
        self, tree: GistTree, layout: Layout, config: RuntimeConfig, lens: Lens | None = None,
        finder: Finder | None = None,
    ):  # fmt: skip
        self.tree, self.layout, self.config, self.lens = tree, layout, config, lens
        self.finder = finder
        usable = [name for name in POLICIES if name != MEASURED]
        if config.policy not in usable:
            raise ConfigError(f"policy {config.policy!r}: a runtime can use {', '.join(usable)}")
        if config.policy == "attention" and not self.reads:
            raise ConfigError("policy 'attention' asks a language model, which is not here")
        if config.policy == "match" and finder is None:
            raise ConfigError(
                "policy 'match': this run has no matcher; set model.matcher, with a start or "
                "trained (data questions)"
            )
        net = None if lens is None else (lens.net, {"params": lens.params})
        self.policy = policies.make(config.policy, layout, config.budget, net)
        self._score = jax.jit(self.policy)
        self._moves: list[tuple[Trace, Tiling]] = []
        self.seconds = {"focus": 0.0, "allocate": 0.0}

    @property
    def history(self) -> telemetry.History | None:
        """What the focus did since it last settled; none if it never did."""
        if not self._moves:
            return None
        length = max(len(trace.kind) for trace, _ in self._moves)
        traces = [
            Trace(*(np.pad(x, (0, length - len(x))) for x in trace[:-1]), trace.count)
            for trace, _ in self._moves
        ]
        return telemetry.gather(traces, [tiling for _, tiling in self._moves])

    @property
    def blocks(self) -> int:
        """Whole blocks of the history."""
        return len(self.tree) // self.layout.block

    def overlap(
        self, query: Int[np.ndarray, " q"], blocks: int, again: bool = True
    ) -> Float[np.ndarray, " m"]:
        """How well the blocks before the protected tail match a query, in pairs; padded to a power
        of two. The tail is read raw, and may be the query: what stands beside it would always win.
        Damaged blocks match nothing. ``again`` is that of `Finder.rank`.
        """
        size, free = self.layout.block, max(blocks - self.layout.protected, 0)
        ids, damaged = self.tree.readable(0, free * size)
        found = np.zeros(0, np.float32)
        if free and self.config.policy == "match":
            score = self.finder.rank(query, np.maximum(ids, 0), again)
            score[damaged] = score.min()
            found = policies.first_ones(score)
        elif free:
            found = policies.words_of(query, ids.reshape(free, size))
        found[damaged] = 0
        room = 1 << max(blocks - 1, 1).bit_length()
        return np.pad(found, (0, room - free))

    def start(self, blocks: int) -> Tiling:
        """The tiling that `settle` begins with; says at once, and for nothing, what cannot be.

        Raises:
          ConfigError: W is too small for the history.
          StoreError: the history has no whole block.
        """
        if not blocks:
            raise StoreError(
                f"{self.tree.path}: the history of {len(self.tree)} tokens has no whole block of "
                f"{self.layout.block}: ingest text first"
            )
        c = self.config
        return tl.start(self.layout, blocks, c.budget, coarse=c.policy in SEARCHING)

    def settle(
        self, query: Int[np.ndarray, " q"], blocks: int | None = None, seed: int = 0,
        newer: Float[np.ndarray, "k s w"] | None = None, iterations: int | None = None,
    ) -> Tiling:  # fmt: skip
        """Focuses on a history of ``blocks`` for a query, until nothing changes any more.

        A policy that looks for something (`config.SEARCHING`) starts from the coarsest tiling and
        opens the best node, one after another, so that the way to one place is paid for before
        the next is begun; what is left of W goes to the newest text. The others start from the
        newest text sharp and exchange nodes. The actions are kept in ``history`` for telemetry,
        and what looking at the history and allocating took is added to ``seconds``.

        Args:
          query: tokens that ``bm25`` and ``match`` look for.
          blocks: how much of the history there is; all of it by default.
          seed: of the policy ``random``.
          newer: records of gists of what follows the history, for a lens.
          iterations: at most so many; the configuration's by default.

        Raises:
          ConfigError: W is too small for the history.
          StoreError: the history has no whole block.
        """
        c = self.config
        blocks = self.blocks if blocks is None else blocks
        tiling = self.start(blocks)
        began = time.perf_counter()
        features = jax.block_until_ready(self._features(query, blocks, newer))
        self.seconds["focus"] += time.perf_counter() - began
        self._moves = []
        most, key = iterations or c.iterations, jax.random.key(seed)

        def policy(tiling: Tiling, i: int) -> Float[np.ndarray, " n"]:
            here = features | self._seen(tiling, query, blocks)
            return self._score(tiling, here, jax.random.fold_in(key, i))

        if c.policy in SEARCHING:
            single = dataclasses.replace(c.focus, max_actions=1)
            tiling = self._run(tiling, policy, single, most)
            # What is left of the budget goes to the newest text.
            tiling = self._run(tiling, self._newest, single, c.budget)
        else:
            tiling = self._run(tiling, policy, c.focus, most)
        return tiling

    def move(
        self, tiling: Tiling, query: Int[np.ndarray, " q"], seed: int = 0
    ) -> Tiling:
        """Takes in the block after those that a tiling covers, and moves the focus once.

        Args:
          query: as of `settle`.
          seed: of the policy ``random``.
        """
        grown = tl.append(self.layout, tiling)
        blocks, key = int(tl.blocks(self.layout, grown)), jax.random.key(seed)

        def policy(tiling: Tiling, _: int) -> Float[np.ndarray, " n"]:
            return self.scores(tiling, query, blocks, key)

        return self._run(grown, policy, self.config.moving, 1)

    def _run(
        self, tiling: Tiling, score: Callable[[Tiling, int], Float[np.ndarray, " n"]],
        focus: FocusConfig, most: int,
    ) -> Tiling:  # fmt: skip
        """Iterates until nothing changes any more, and keeps what was done."""
        for i in range(most):
            began = time.perf_counter()
            scores = jax.block_until_ready(self._readable(tiling, score(tiling, i)))
            looked = time.perf_counter()
            tiling, trace = refocus(self.layout, focus, self.config.budget, tiling, scores)
            self._moves.append((trace, tiling))
            done = not int(trace.count)  # waits for it
            self.seconds["focus"] += looked - began
            self.seconds["allocate"] += time.perf_counter() - looked
            if done:
                break
        return tiling

    def _readable(
        self, tiling: Tiling, scores: Float[np.ndarray, " n"]
    ) -> Float[np.ndarray, " n"]:
        """Scores that open no block whose tokens are known to be damaged."""
        if not self.tree.damaged:
            return scores
        shut = [level < 2 and index in self.tree.damaged for level, index in tl.nodes(tiling)]
        room = tiling.level.shape[0] - len(shut)
        return jnp.where(np.pad(np.asarray(shut, bool), (0, room)), jnp.minimum(scores, 0), scores)

    def _newest(self, tiling: Tiling, _: int) -> Float[np.ndarray, " n"]:
        """Expands and never collapses, the newest node first."""
        return 1.0 + jnp.arange(tiling.level.shape[0], dtype=jnp.float32)

    def scores(
        self, tiling: Tiling, query: Int[np.ndarray, " q"], blocks: int, key: jax.Array
    ) -> Float[np.ndarray, " n"]:
        """What the policy makes of a tiling of a history of ``blocks``; see `settle`.

        For a focus that moves from block to block: only for a question are candidates read again.
        """
        features = self._features(query, blocks, None, again=False)
        features |= self._seen(tiling, query, blocks)
        return self._readable(tiling, self._score(tiling, features, key))

    def _features(self, query, blocks, newer, again=True) -> dict[str, Any]:
        """What a policy looks at, whatever the tiling."""
        if self.config.policy in ("bm25", "match"):
            return {"overlap": jnp.asarray(self.overlap(query, blocks, again))}
        if self.config.policy == "lens":
            found = {"tail": self.lens.sight.tail(blocks, newer)}
            if self.lens.net.words:
                found["overlap"] = jnp.asarray(self.overlap(query, blocks))
            return found
        return {}

    def _seen(self, tiling, query, blocks) -> dict[str, Any]:
        """What it looks at in a tiling."""
        if self.config.policy != "lens":
            return {}
        found = self.lens.sight.nodes(tl.nodes(tiling))
        room = tiling.level.shape[0] - len(found)
        return {"entry": np.pad(found, [(0, room), (0, 0)])}

    def nodes(self, tiling: Tiling) -> tuple[list[Node], int]:
        """Nodes before the protected tail, and the first token that is read live."""
        return before_tail(self.layout, tiling)


def before_tail(layout: Layout, tiling: Tiling) -> tuple[list[Node], int]:
    """Nodes before the protected tail, and the first token that is read live."""
    found = tl.nodes(tiling)
    level, index = found[-1]
    blocks = (index + 1) * int(layout.widths[level])
    start = max(blocks - layout.protected, 0)
    kept = [(n, i) for n, i in found if n or i < start]
    return kept, start * layout.block
