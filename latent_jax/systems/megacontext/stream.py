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

from latent_jax.backbones.generate import Begun
from latent_jax.ops import bootstrap
from latent_jax.systems.megacontext import telemetry
from latent_jax.systems.megacontext import tiling as tl
from latent_jax.systems.megacontext.allocator import FocusConfig, refocus
from latent_jax.systems.megacontext.focus import RuntimeConfig, before_tail
from latent_jax.systems.megacontext.memory import Memory, Node
from latent_jax.systems.megacontext.runtime import Runtime
from latent_jax.systems.megacontext.telemetry import PARTS
from latent_jax.systems.megacontext.tiling import Tiling
from latent_jax.systems.megacontext.working import WorkingContext

_COMPILES = 2  # blocks whose time is not counted


class Reader:
    """Reads on through a context of one policy, a block at a time.

    Args:
      memory: the history; blocks are appended to its tree by who calls.
      policy: what scores the nodes.
      budget: entries of the working context, W.
      focus: how eagerly the focus moves.

    Attributes:
      seconds: what the last step took, by part.
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
        self.context = WorkingContext(memory, budget)
        self.seconds = dict.fromkeys(PARTS, 0.0)

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
        jax.block_until_ready(stayed)
        began = time.perf_counter()
        scores = jax.block_until_ready(runtime.scores(grown, query, blocks, key))
        looked = time.perf_counter()
        self.tiling, trace = refocus(layout, runtime.config.focus, self.budget, grown, scores)
        jax.block_until_ready(self.tiling)
        self.seconds |= {"focus": looked - began, "allocate": time.perf_counter() - looked}
        self.traces.append(trace)
        self.tilings.append(self.tiling)
        return before_tail(layout, stayed)[0], before_tail(layout, self.tiling)[0]

    def read(self, nodes: list[Node], live: Int[np.ndarray, " t"], start: int) -> Begun:
        """Edits the context and reads the tail behind it, as a runtime does before it decodes.

        Args:
          nodes: the context from now on.
          live: the protected tail.
          start: position of the first of them in the history.
        """
        began = time.perf_counter()
        self.context.edit(nodes, start)
        size = self.layout.block
        begun = self.memory.begin(self.context, live, start, len(live), size)
        jax.block_until_ready(begun)
        self.seconds["refocus"] = time.perf_counter() - began
        return begun

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
      `telemetry.summary`), ``context_bytes`` of the working context on the device and
      ``latency_ms.<part>``, the median of a block by part (`telemetry.PARTS`; decode is measured
      behind the last context only, and is 0 if the base ends its text at once); and
      ``stream.device_bytes``, the most that lay on the first device after a block, with
      ``.per_block``, what a block of the second half added on average (what is kept of encoded
      windows is full by then, if the text is not short), all policies together; and what the focus
      did.
    """
    layout, size = memory.model.layout, memory.model.layout.block
    readers = {name: Reader(memory, name, budget) for name in policies}
    blocks = len(ids) // size
    memory.tree.append(ids[: first * size])
    memory.build()
    spent: dict[str, list[dict[str, float]]] = {name: [] for name in policies}
    held: list[int] = []
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
            tail = live[: layout.protected * size]
            stayed, now = reader.step(tail, jax.random.fold_in(key, cursor))
            begun = reader.read(now, tail, start)
            entries = memory.gather(now, start)
            began = time.perf_counter()
            loss = float(memory.losses([entries], live, start, size, budget)[0])
            reader.seconds |= {"ingest": ingest, "read": time.perf_counter() - began}
            nll[name].append(loss)
            spent[name].append(dict(reader.seconds))
            if cursor == blocks - 1:
                spent[name][-1]["decode"] = _decoded(memory, begun, size)
            if now != stayed:
                before = memory.losses(
                    [memory.gather(stayed, start)], live, start, size, budget
                )
                jumps[name].append(loss - float(before[0]))
        held.append(device_bytes())
        if progress is not None:
            progress("stream", cursor - first + 1, blocks - first)
    found: dict[str, Any] = {"stream.device_bytes": max(held)}
    grown = np.diff(held[len(held) // 2 :])
    found["stream.device_bytes.per_block"] = float(grown.mean()) if grown.size else 0.0
    for name, reader in readers.items():
        found |= _flat(f"stream.{name}", nll[name], jumps[name], spent[name])
        size = sum(x.nbytes for x in reader.context.held.values())
        found[f"stream.{name}.context_bytes"] = size
        if reader.traces:
            told = telemetry.summary(layout, reader.history, budget)
            found |= {f"stream.{name}.{k}": v for k, v in told.items()}
    return found, {name: reader.history for name, reader in readers.items() if reader.traces}


def device_bytes() -> int:
    """Bytes on the first device; where it does not say, as a CPU, those of all arrays there are."""
    device = jax.local_devices()[0]
    stats = device.memory_stats()
    if stats and "bytes_in_use" in stats:
        return int(stats["bytes_in_use"])
    return sum(x.nbytes for x in jax.live_arrays() if device in x.devices())


def _decoded(memory: Memory, begun: Begun, size: int) -> float:
    """Seconds to decode a block behind what was read; the first time compiles."""
    for _ in range(2):
        began = time.perf_counter()
        memory.decode(begun, size, size)
    return time.perf_counter() - began


def _flat(
    name: str, nll: list[float], jumps: list[float], spent: list[dict[str, float]]
) -> dict[str, Any]:
    found: dict[str, Any] = {
        f"{name}.nll": float(np.mean(nll)),
        f"{name}.nll.ci95": list(bootstrap.mean_interval(np.asarray(nll))),
        f"{name}.moved": len(jumps) / len(nll),
    }
    if jumps:
        found[f"{name}.jump"] = float(np.mean(jumps))
        found[f"{name}.jump.p95"] = float(np.quantile(jumps, 0.95))
    warm = spent[_COMPILES:] or spent
    for part in PARTS:
        seconds = spent[-1][part] if part == "decode" else np.median([row[part] for row in warm])
        found[f"{name}.latency_ms.{part}"] = 1e3 * float(seconds)
    return found
