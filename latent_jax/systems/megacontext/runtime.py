"""Reading from a stored history through a working context of fixed size."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from latent_jax.backbones.decoder import KV
from latent_jax.backbones.generate import Begun
from latent_jax.core.errors import ConfigError
from latent_jax.systems.megacontext import tiling as tl
from latent_jax.systems.megacontext.behind import PROMPT
from latent_jax.systems.megacontext.contexts import Entries
from latent_jax.systems.megacontext.focus import Focus, RuntimeConfig, before_tail
from latent_jax.systems.megacontext.memory import Memory, Node
from latent_jax.systems.megacontext.telemetry import PARTS
from latent_jax.systems.megacontext.tiling import Tiling
from latent_jax.systems.megacontext.working import Edit, WorkingContext


class Refocus(NamedTuple):
    """What moving the focus once cost, while something is generated.

    Attributes:
      first: where in the context the first edit was, as a share of it; see `working.Edit`.
      entries: entries that were written.
      seconds: until the next token could be decoded: encoding and placing what changed, and reading
        the live tail again.
    """

    first: float
    entries: int
    seconds: float


class Answer(NamedTuple):
    """What was generated, and from what.

    Attributes:
      text: the answer.
      nodes: nodes of the working context that it was begun from, in the order of the history.
      seconds: by part (`telemetry.PARTS`); read is the first context and the prompt.
      refocuses: one for every block that was generated.
      ids: its tokens, without the one that ended it.
    """

    text: str
    nodes: list[Node]
    seconds: dict[str, float]
    refocuses: list[Refocus]
    ids: Int[np.ndarray, " n"]


class _Clock:
    """Seconds by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = time.perf_counter()

    def lap(self, part: str | None = None) -> float:
        """Since the last lap, which is put down to a part; none: it is measured elsewhere."""
        now = time.perf_counter()
        spent, self._began = now - self._began, now
        if part is not None:
            self.seconds[part] = self.seconds.get(part, 0.0) + spent
        return spent


class Runtime(Focus):
    """Holds the focus over one `Memory` and reads through it.

    Args:
      memory: the history with all its gists built.
      config: size and policy of the working context.

    Raises:
      ConfigError: W cannot hold the history, or the policy cannot be used; see `Focus`.
    """

    reads = True

    def __init__(self, memory: Memory, config: RuntimeConfig | None = None):
        super().__init__(
            memory.tree, memory.model.layout, config or RuntimeConfig(), memory.lens,
            memory.finder,
        )
        self.memory = memory

    def look_at(self, memory: Memory) -> None:
        """Turns to another stretch of the history, with what has been compiled."""
        self.memory, self.tree, self.lens = memory, memory.tree, memory.lens

    def _seen(self, tiling, query, blocks) -> dict[str, Any]:
        if self.config.policy != "attention":
            return super()._seen(tiling, query, blocks)
        layout, size = self.layout, self.layout.block
        nodes, start = before_tail(layout, tiling)
        live = np.maximum(self.tree.readable(start, blocks * size)[0], 0)
        if not np.array_equal(query, live[-len(query) :]):
            live = np.concatenate([live, query])  # a question that follows the history
        left_out = len(live) % size
        found = self.memory.attention(
            nodes, live[left_out:], start + left_out, min(len(query), size), self.config.budget,
            tiling.level.shape[0],
        )
        return {"attention": found}

    def answer(self, prompt: str, max_new_tokens: int = 32, keep: bool = False) -> Answer:
        """Continues a prompt that follows the history, greedily; see `generate`.

        Raises:
          ConfigError: an empty prompt, or more than the base has positions for.
        """
        asked = np.asarray(self.memory.backbone.tokenizer.encode(prompt), np.int32)
        if not asked.size:
            raise ConfigError("the prompt is empty: ask something")
        return self.generate(asked, max_new_tokens, keep)

    def generate(
        self, asked: Int[np.ndarray, " q"], max_new_tokens: int, keep: bool = False
    ) -> Answer:
        """Continues a prompt behind a working context that stays of its size.

        The focus settles for the prompt, which is read live behind the protected tail. Whenever
        a block of the history is complete, it joins the history and gets its gists, the focus
        moves once (the live tail is its query), the context is edited where that changes it,
        and the tail, whose keys and values depend on the context, is read again. Shapes stay
        the same from block to block.

        Args:
          asked: tokens of the prompt.
          max_new_tokens: at most so many.
          keep: append prompt and answer to the tree, which must be open for writing; else they are
            forgotten afterwards.

        Raises:
          ConfigError: more than the base has positions for, or W is too small.
        """
        store, layout, size = self.memory, self.layout, self.layout.block
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {max_new_tokens}: use at least 1")
        start = self.nodes(self.start(self.blocks))[1]  # refuses before anything is read
        length = len(self.tree) + len(asked)
        first = min(max_new_tokens, size - length % size)
        budget = self.config.budget
        store.check_room(start, length - start, first, budget)
        if max_new_tokens > first:
            store.check_room(store.far, layout.protected * size, size, budget)
        for blocks in range(self.blocks + 1, (length + max_new_tokens) // size + 1):
            self.start(blocks)  # it must hold what it will have grown to
        try:
            if not keep:
                self.look_at(store.grown())
            return self._generate(asked, max_new_tokens)
        finally:
            self.look_at(store)

    def _generate(self, asked, max_new_tokens) -> Answer:
        memory, size = self.memory, self.layout.block
        self.seconds = {"focus": 0.0, "allocate": 0.0}
        clock = _Clock()
        newer = memory.prompt_gists(asked) if self.config.policy == "lens" else None
        clock.lap("ingest")
        tiling = self.settle(asked, newer=newer)
        clock.lap()
        nodes, live, start = self.context(tiling)
        context, live = WorkingContext(memory, self.config.budget), np.append(live, asked)
        context.edit(nodes, start)
        begun = memory.begin(context, live, start, -(-len(live) // PROMPT) * PROMPT, size)
        jax.block_until_ready(begun)
        clock.lap("read")
        memory.tree.append(asked)
        said: list[int] = []
        refocuses: list[Refocus] = []
        while True:
            limit = min(max_new_tokens - len(said), size - len(memory.tree) % size)
            new, stopped = memory.decode(begun, size, limit)
            memory.tree.append(np.asarray(new, np.int32))
            said += new
            clock.lap("decode")
            if stopped or len(said) == max_new_tokens:
                break
            tiling, edit, begun = self._moved(tiling, context, clock)
            refocuses.append(Refocus(*edit, clock.lap("refocus")))
        text = memory.backbone.tokenizer.decode(np.asarray(said, np.int32))
        spent = clock.seconds | self.seconds
        seconds = {name: spent.get(name, 0.0) for name in PARTS}
        return Answer(text, nodes, seconds, refocuses, np.asarray(said, np.int32))

    def _moved(
        self, tiling: Tiling, context: WorkingContext, clock: _Clock
    ) -> tuple[Tiling, Edit, Begun]:
        """Takes in what is new of the history, and reads the live tail behind what that makes of
        the context.
        """
        memory, layout, size = self.memory, self.layout, self.layout.block
        memory.build()
        clock.lap("ingest")
        for block in range(int(tl.blocks(layout, tiling)), self.blocks):
            stop = (block + 1) * size
            query = memory.tree.readable(max(stop - layout.protected * size, 0), stop)[0]
            tiling = self.move(tiling, np.maximum(query, 0), block)
        clock.lap()
        nodes, live, start = self.context(tiling)
        edit = context.edit(nodes, start)
        begun = memory.begin(context, live, start, layout.protected * size, size)
        return tiling, edit, jax.block_until_ready(begun)

    def context(self, tiling: Tiling) -> tuple[list[Node], Int[np.ndarray, " t"], int]:
        """Nodes that are read as entries, and what is live behind them, with its first position.

        What is damaged is not there: tokens are live from the last damaged block on, and those
        before it are entries like any other.
        """
        nodes, start = self.nodes(tiling)
        live, begin = self.memory.live(start)
        size = self.layout.block
        nodes += [(0, block) for block in range(start // size, min(begin // size, self.blocks))]
        return self.memory.sound(nodes), live, begin

    def placed(self, entries: Entries) -> KV:
        """Entries as a prefix of W places (more where heads differ; see `Memory.places`)."""
        return self.memory.prefix(entries, self.config.budget)
