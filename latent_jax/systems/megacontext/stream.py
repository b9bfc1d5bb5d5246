"""A history that grows while its working context reads it: block by block, as it is meant to run.

Every block is ingested, the focus takes one step, and the base predicts the block after it behind
what stands in the context now. So telemetry, latency and the cost of moving the focus are those of
use and not of a focus that was left to settle.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from latent_jax.ops import bootstrap
from latent_jax.systems.megacontext import telemetry
from latent_jax.systems.megacontext import tiling as tl
from latent_jax.systems.megacontext.allocator import FocusConfig, refocus
from latent_jax.systems.megacontext.focus import RuntimeConfig, before_tail
from latent_jax.systems.megacontext.memory import Memory, Node
from latent_jax.systems.megacontext.runtime import Runtime
from latent_jax.systems.megacontext.tiling import Tiling

PARTS = ("ingest", "focus", "gather", "read")
_COMPILES = 2  # blocks whose time is not counted


class Reader:
    """Reads on through a context of one policy, a block at a time.

    Args:
      memory: the history; blocks are appended to its tree by who calls.
      policy: what scores the nodes.
      budget: entries of the working context, W.
      focus: how eagerly the focus moves.
    """

    def __init__(
        self, memory: Memory, policy: str, budget: int, focus: FocusConfig | None = None
    ):
        self.memory, self.layout, self.budget = memory, memory.model.layout, budget
        focus = FocusConfig() if focus is None else focus
        self.runtime = Runtime(memory, RuntimeConfig(budget, policy, 1, focus))
        self.tiling: Tiling | None = None
        self.traces: list[Any] = []
        self.tilings: list[Tiling] = []

    def step(self, query: Int[np.ndarray, " q"], key: jax.Array) -> tuple[list[Node], list[Node]]:
        """Takes in the newest block and moves the focus once.

        Args:
          query: tokens that ``bm25`` looks for.
          key: of the policy ``random``.

        Returns:
          The nodes before the tail if the focus had only made room, and as they are now.
        """
        layout, runtime, blocks = self.layout, self.runtime, self.runtime.blocks
        if self.tiling is None:
            self.tiling = tl.start(layout, blocks, self.budget)
            found = before_tail(layout, self.tiling)[0]
            return found, found
        grown = tl.append(layout, self.tiling)
        still = jnp.zeros(grown.level.shape)
        stayed, _ = refocus(layout, runtime.config.focus, self.budget, grown, still)
        scores = runtime.scores(grown, query, blocks, key)
        self.tiling, trace = refocus(layout, runtime.config.focus, self.budget, grown, scores)
        self.traces.append(trace)
        self.tilings.append(self.tiling)
        return before_tail(layout, stayed)[0], before_tail(layout, self.tiling)[0]

    @property
    def history(self) -> telemetry.History:
        """What the focus did."""
        return telemetry.gather(self.traces, self.tilings)


def read(
    memory: Memory, ids: Int[np.ndarray, " t"], policies: Sequence[str], budget: int, first: int,
    seed: int = 0, progress: Callable[[str, int, int], None] | None = None,
) -> tuple[dict[str, Any], dict[str, telemetry.History]]:  # fmt: skip
    """Streams a text through the context of each policy.

    Args:
      memory: an empty store open for writing.
      ids: whole blocks; each but the first ones is predicted from what came before.
      policies: what may move the focus.
      budget: entries of the working context, W.
      first: blocks of history before the first prediction.
      seed: of the policy ``random``.

    Returns:
      ``stream.<policy>.…``: ``nll`` of the next block, ``jump`` (what moving the focus adds to it,
      and its 95th percentile over the blocks at which the focus moved), telemetry (see
      `telemetry.summary`) and milliseconds a block by part; and what the focus did.
    """
    layout, size = memory.model.layout, memory.model.layout.block
    readers = {name: Reader(memory, name, budget) for name in policies}
    blocks = len(ids) // size
    memory.tree.append(ids[: first * size])
    memory.build()
    spent: dict[str, list[list[float]]] = {name: [] for name in policies}
    nll: dict[str, list[float]] = {name: [] for name in policies}
    jumps: dict[str, list[float]] = {name: [] for name in policies}
    key = jax.random.key(seed)
    for cursor in range(first, blocks):
        began = time.perf_counter()
        if cursor > first:
            memory.tree.append(ids[(cursor - 1) * size : cursor * size])
            memory.build()
        ingest = time.perf_counter() - began
        start = (cursor - layout.protected) * size
        live = ids[start : (cursor + 1) * size]
        for name, reader in readers.items():
            began = time.perf_counter()
            stayed, now = reader.step(
                live[: layout.protected * size], jax.random.fold_in(key, cursor)
            )
            focused = time.perf_counter()
            entries = memory.gather(now, start)
            gathered = time.perf_counter()
            loss = float(memory.losses([entries], live, start, size, budget)[0])
            done = time.perf_counter()
            nll[name].append(loss)
            spent[name].append([ingest, focused - began, gathered - focused, done - gathered])
            if now != stayed:
                before = memory.losses(
                    [memory.gather(stayed, start)], live, start, size, budget
                )
                jumps[name].append(loss - float(before[0]))
        if progress is not None:
            progress("stream", cursor - first + 1, blocks - first)
    found: dict[str, Any] = {}
    for name, reader in readers.items():
        found |= _flat(f"stream.{name}", nll[name], jumps[name], spent[name])
        if reader.traces:
            told = telemetry.summary(layout, reader.history, budget)
            found |= {f"stream.{name}.{k}": v for k, v in told.items()}
    return found, {name: reader.history for name, reader in readers.items() if reader.traces}


def _flat(
    name: str, nll: list[float], jumps: list[float], spent: list[list[float]]
) -> dict[str, Any]:
    found: dict[str, Any] = {
        f"{name}.nll": float(np.mean(nll)),
        f"{name}.nll.ci95": list(bootstrap.mean_interval(np.asarray(nll))),
        f"{name}.moved": len(jumps) / len(nll),
    }
    if jumps:
        found[f"{name}.jump"] = float(np.mean(jumps))
        found[f"{name}.jump.p95"] = float(np.quantile(jumps, 0.95))
    warm = np.asarray(spent[_COMPILES:] or spent)
    for part, seconds in zip(PARTS, np.median(warm, axis=0), strict=True):
        found[f"{name}.latency_ms.{part}"] = 1e3 * float(seconds)
    return found
