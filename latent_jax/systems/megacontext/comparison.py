"""Policies compared on a long history: losses behind the contexts that they bring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from latent_jax.ops import bootstrap
from latent_jax.systems.megacontext.allocator import FocusConfig
from latent_jax.systems.megacontext.focus import RuntimeConfig
from latent_jax.systems.megacontext.memory import Memory
from latent_jax.systems.megacontext.oracle import Oracle
from latent_jax.systems.megacontext.policy_names import ENDS, MEASURED
from latent_jax.systems.megacontext.runtime import Runtime


def nll_at_h(
    memory: Memory,
    budgets: Sequence[int],
    names: Sequence[str],
    cursors: Sequence[int],
    horizon: int,
    focus: FocusConfig | None = None,
    iterations: int = 64,
    oracle_steps: int = 8,
    progress: Any = None,
) -> dict[str, Float[np.ndarray, " n"]]:
    """Losses of the text at some places of a history, through the context of every policy.

    Args:
      budgets: sizes W of the working context.
      names: policies; also ``full``, the raw text as one sequence, ``windowed``, all of it as raw
        blocks, and ``dropped``, the tail only.
      cursors: blocks of history before each place; ``horizon`` tokens must follow in the tree.
      horizon: tokens that are predicted.
      focus: how eagerly the focus moves.
      iterations: at most so many of the focus, but for ``oracle``.
      oracle_steps: at most so many of ``oracle``, which measures all actions in each.

    Returns:
      ``{"<policy>.w<W>": losses}``, one per cursor; the three ends have no W.
    """
    layout, size = memory.model.layout, memory.model.layout.block
    focus = RuntimeConfig().focus if focus is None else focus
    runtimes = {
        (name, w): Runtime(memory, RuntimeConfig(w, name, iterations, focus))
        for w in budgets for name in names if name not in (*ENDS, MEASURED)
    }  # fmt: skip
    oracles = {
        w: Oracle(memory, w, focus, oracle_steps) for w in budgets if MEASURED in names
    }
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
            settled = []
            for name in (name for name, size in runtimes if size == w):
                # One at a time: a context of gists of heads is large.
                runtime = runtimes[name, w]
                settled.append(runtime.settle(query, cursor))
                entries = memory.gather(runtime.nodes(settled[-1])[0], start)
                loss = memory.losses([entries], live, start, horizon, w)[0]
                found.setdefault(f"{name}.w{w}", []).append(float(loss))
            if w in oracles:
                found.setdefault(f"{MEASURED}.w{w}", []).append(
                    oracles[w].settle(cursor, live, start, horizon, settled)[0]
                )
        if progress is not None:
            progress("nll_at_h", number + 1, len(cursors))
    return {name: np.asarray(x) for name, x in found.items()}


def policy_table(
    losses: dict[str, Float[np.ndarray, " n"]], budgets: Sequence[int],
    texts: Int[np.ndarray, " n"],
) -> dict[str, Any]:  # fmt: skip
    """Results of `nll_at_h` under stable names, with intervals over the texts.

    Places of one text share its history and its style: they are drawn together, all or none
    (`ops.bootstrap`), and of a single text there is no interval.

    Args:
      losses: of every place, by policy.
      budgets: sizes W that were compared.
      texts: which text each place is in.

    Returns:
      ``nll_at_h.<policy>.w<W>`` and, paired because places differ far more than contexts do,
      ``….minus_full``; ``regret.<policy>.w<W>``, what a policy loses against ``oracle``; and
      ``gain.<policy>.w<W>``, its share of what ``oracle`` gains on ``recency``.
    """
    found: dict[str, Any] = {}
    several = len(np.unique(texts)) > 1

    def paired(name: str, one: Any, other: Any) -> None:
        found[name] = float((one - other).mean())
        if several:
            interval = bootstrap.difference_interval(one, other, clusters=texts)
            found[f"{name}.ci95"] = list(interval)

    for name, x in losses.items():
        found[f"nll_at_h.{name}"] = float(x.mean())
        if "full" in losses and name != "full":
            paired(f"nll_at_h.{name}.minus_full", x, losses["full"])
    for w in budgets:
        best, plain = losses.get(f"{MEASURED}.w{w}"), losses.get(f"recency.w{w}")
        if best is None:
            continue
        for name in (n for n in losses if n.endswith(f".w{w}") and not n.startswith(MEASURED)):
            paired(f"regret.{name}", losses[name], best)
            if plain is not None and plain.mean() > best.mean() and not name.startswith("recency"):
                gained, possible = plain - losses[name], plain - best
                found[f"gain.{name}"] = float(gained.sum() / possible.sum())
                if several:
                    interval = bootstrap.ratio_interval(gained, possible, clusters=texts)
                    found[f"gain.{name}.ci95"] = list(interval)
    return found
