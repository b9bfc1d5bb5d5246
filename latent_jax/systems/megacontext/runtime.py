"""Reading from a stored history through a working context of fixed size."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from latent_jax.backbones.generate import generate_ids
from latent_jax.backbones.sink import behind, sink_kv
from latent_jax.core.config import field
from latent_jax.core.errors import ConfigError
from latent_jax.systems.megacontext import policies, telemetry
from latent_jax.systems.megacontext import tiling as tl
from latent_jax.systems.megacontext.allocator import FocusConfig, refocus
from latent_jax.systems.megacontext.config import ENDS, POLICIES
from latent_jax.systems.megacontext.gist import Gists
from latent_jax.systems.megacontext.memory import Memory, Node
from latent_jax.systems.megacontext.reading import place
from latent_jax.systems.megacontext.tiling import Tiling

# Prompts are padded to multiples of this, so that few lengths are compiled.
_PROMPT = 64


@dataclass(frozen=True)
class RuntimeConfig:
    """The working context of a runtime."""

    budget: int = field(default=512, ge=1, help="entries of the working context, W")
    policy: str = field(
        default="bm25", help="what scores the nodes: recency, sink_recency, uniform, random, bm25"
    )
    iterations: int = field(default=64, ge=1, help="focus iterations until a question is read")
    focus: FocusConfig = field(
        # Between one question and the next nothing has to rest.
        default_factory=lambda: FocusConfig(residency=1, cooldown=0, hysteresis=0.0),
        help="how eagerly the focus moves",
    )


class Answer(NamedTuple):
    """What was generated, and from what.

    Attributes:
      text: the answer.
      nodes: nodes of the working context, in the order of the history.
      seconds: by part: focus, gather, decode.
    """

    text: str
    nodes: list[Node]
    seconds: dict[str, float]


class Runtime:
    """Holds the focus over one `Memory` and reads through it.

    Args:
      memory: the history with all its gists built.
      config: size and policy of the working context.

    Raises:
      ConfigError: W cannot hold the history, or there is no such policy.
    """

    def __init__(self, memory: Memory, config: RuntimeConfig | None = None):
        self.memory, self.config = memory, config or RuntimeConfig()
        self.layout = memory.model.layout
        if self.config.policy not in POLICIES:
            raise ConfigError(
                f"policy {self.config.policy!r}: a runtime can use {', '.join(POLICIES)}"
            )
        self.policy = policies.make(self.config.policy, self.layout, self.config.budget)
        self._score = jax.jit(self.policy)
        self.history: telemetry.History | None = None

    @property
    def blocks(self) -> int:
        """Whole blocks of the history."""
        return len(self.memory.tree) // self.layout.block

    def overlap(self, query: Int[np.ndarray, " q"], blocks: int) -> Float[np.ndarray, " m"]:
        """BM25 of the first blocks with a query, padded to a power of two."""
        size = self.layout.block
        ids = self.memory.tree.tokens(0, blocks * size).reshape(blocks, size)
        room = 1 << max(blocks - 1, 1).bit_length()
        return np.pad(policies.bm25(ids, query), (0, room - blocks))

    def settle(
        self, query: Int[np.ndarray, " q"], blocks: int | None = None, seed: int = 0
    ) -> Tiling:
        """Focuses on a history of ``blocks`` for a query, until nothing changes any more.

        The actions are kept in ``history`` for telemetry.

        Raises:
          ConfigError: W is too small for the history.
        """
        c = self.config
        blocks = self.blocks if blocks is None else blocks
        tiling = tl.start(self.layout, blocks, c.budget)
        features = {"overlap": jnp.asarray(self.overlap(query, blocks))}
        traces, tilings, key = [], [], jax.random.key(seed)
        for i in range(c.iterations):
            scores = self._score(tiling, features, jax.random.fold_in(key, i))
            tiling, trace = refocus(self.layout, c.focus, c.budget, tiling, scores)
            traces.append(trace)
            tilings.append(tiling)
            if not int(trace.count):
                break
        self.history = telemetry.gather(traces, tilings)
        return tiling

    def nodes(self, tiling: Tiling) -> tuple[list[Node], int]:
        """Nodes before the protected tail, and the first token that is read live."""
        count = int(tiling.count)
        tail = np.asarray(tl.tail(self.layout, tiling))[:count]
        found = zip(np.asarray(tiling.level)[:count], np.asarray(tiling.index)[:count], strict=True)
        kept = [(int(n), int(i)) for (n, i), last in zip(found, tail, strict=True) if not last]
        return kept, (int(tl.blocks(self.layout, tiling)) - int(tail.sum())) * self.layout.block

    def answer(self, prompt: str, max_new_tokens: int = 32) -> Answer:
        """Continues a prompt that follows the history, greedily.

        Raises:
          ConfigError: an empty prompt, or one that is longer than the base's context.
        """
        memory, seconds, began = self.memory, {}, time.perf_counter()
        tokenizer, base = memory.backbone.tokenizer, memory.backbone.config
        asked = np.asarray(tokenizer.encode(prompt), np.int32)
        if not asked.size:
            raise ConfigError("the prompt is empty: ask something")
        tiling = self.settle(asked)
        nodes, start = self.nodes(tiling)
        seconds["focus"], began = time.perf_counter() - began, time.perf_counter()
        entries = memory.gather(nodes, start)
        live = np.concatenate([memory.tree.tokens(start, len(memory.tree)), asked])
        if self.config.budget + len(live) + max_new_tokens > base.max_position:
            raise ConfigError(
                f"the prompt has {len(asked)} tokens: with W={self.config.budget} and the tail it "
                f"does not fit the base's {base.max_position} positions"
            )
        seconds["gather"], began = time.perf_counter() - began, time.perf_counter()
        prefix = behind(
            sink_kv(memory.decoder, memory.base, jnp.int32(memory.sink), 1),
            self._placed(entries),
        )
        room = -len(live) % _PROMPT
        row, mask = np.pad(live, (room, 0))[None], np.arange(len(live) + room)[None] >= room
        out = generate_ids(
            memory.decoder, memory.base, memory.backbone.embed(row), mask,
            max_new_tokens=max_new_tokens, prefix=prefix,
            start=int(memory.positions(np.asarray([start]), start)[0]),
            stop_ids=tokenizer.stop_ids,
        )  # fmt: skip
        ids = np.asarray(out.tokens)[0, : int(out.lengths[0])]
        seconds["decode"] = time.perf_counter() - began
        return Answer(tokenizer.decode(ids), nodes, seconds)

    def _placed(self, entries: Any):
        """Entries as a prefix of W places."""
        budget, count = self.config.budget, len(entries.positions)
        full, mask = entries.padded(budget), np.arange(budget)[None] < count
        found = Gists(full.k[:, None], full.v[:, None])
        return place(self.memory.decoder, found, full.positions[None], mask)


def nll_at_h(
    memory: Memory,
    budgets: Sequence[int],
    names: Sequence[str],
    cursors: Sequence[int],
    horizon: int,
    focus: FocusConfig | None = None,
    iterations: int = 64,
    progress: Any = None,
) -> dict[str, Float[np.ndarray, " n"]]:
    """Losses of the text at some places of a history, through the context of every policy.

    Args:
      budgets: sizes W of the working context.
      names: policies; also ``full``, the raw text as one sequence, ``windowed``, all of it as raw
        blocks, and ``dropped``, the tail only.
      cursors: blocks of history before each place; ``horizon`` tokens must follow in the tree.
      horizon: tokens that are predicted.

    Returns:
      ``{"<policy>.w<W>": losses}``, one per cursor; the three ends have no W.
    """
    layout, size = memory.model.layout, memory.model.layout.block
    focus = RuntimeConfig().focus if focus is None else focus
    runtimes = {
        (name, w): Runtime(memory, RuntimeConfig(w, name, iterations, focus))
        for w in budgets for name in names if name not in ENDS
    }  # fmt: skip
    found: dict[str, list[float]] = {}
    for number, cursor in enumerate(cursors):
        start = (cursor - layout.protected) * size
        live = memory.tree.tokens(start, cursor * size + horizon)
        query = live[: layout.protected * size]
        for name in (x for x in names if x in ENDS):
            if name == "full":
                loss = memory.full_loss(cursor * size + horizon, horizon)
            else:
                past = range(cursor - layout.protected) if name == "windowed" else ()
                entries = memory.gather([(0, i) for i in past], start)
                width = max(len(entries.positions), 1)
                loss = memory.losses([entries], live, start, horizon, width)[0]
            found.setdefault(name, []).append(float(loss))
        for w in budgets:
            these = [key for key in runtimes if key[1] == w]
            contexts = [
                memory.gather(runtimes[k].nodes(runtimes[k].settle(query, cursor))[0], start)
                for k in these
            ]
            losses = memory.losses(contexts, live, start, horizon, w)
            for (name, _), loss in zip(these, losses, strict=True):
                found.setdefault(f"{name}.w{w}", []).append(float(loss))
        if progress is not None:
            progress("nll_at_h", number + 1, len(cursors))
    return {name: np.asarray(x) for name, x in found.items()}
