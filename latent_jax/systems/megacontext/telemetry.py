"""What a focus did over a run: how much it moved, how often it changed its mind, what it used.

Pure NumPy, on a `History` of one iteration per row. Rates are per iteration; when the focus runs
on every block, as it is meant to, that is per block.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Bool, Float, Int

from latent_jax.core.errors import DataError
from latent_jax.core.files import write_bytes
from latent_jax.systems.megacontext.allocator import Trace
from latent_jax.systems.megacontext.layout import Layout
from latent_jax.systems.megacontext.tiling import COLLAPSED, EXPANDED, Tiling

_FORMAT = 1
# Where the time of a block goes, in `runtime` and in `stream`: making gists of what is new
# (ingest), scoring the nodes by a lens or another policy (focus), exchanging them (allocate),
# writing what changed of the context and reading the live tail behind it (refocus), saying the next
# block (decode), and what is read besides (read): a prompt, or a given text whose loss is taken.
PARTS = ("ingest", "focus", "allocate", "read", "refocus", "decode")


class History(NamedTuple):
    """Traces and the tilings after them; see `Trace` and `Tiling` for the columns."""

    kind: Int[np.ndarray, "t a"]
    gist_level: Int[np.ndarray, "t a"]
    gist_index: Int[np.ndarray, "t a"]
    score: Float[np.ndarray, "t a"]
    delta: Int[np.ndarray, "t a"]
    forced: Bool[np.ndarray, "t a"]
    actions: Int[np.ndarray, " t"]
    level: Int[np.ndarray, "t n"]
    index: Int[np.ndarray, "t n"]
    age: Int[np.ndarray, "t n"]
    count: Int[np.ndarray, " t"]


def gather(traces: Trace | Iterable[Trace], tilings: Tiling | Iterable[Tiling]) -> History:
    """Stacks what iterations returned; what a `lax.scan` stacked already is taken as it is."""
    if not isinstance(traces, Trace):
        traces = Trace(*map(np.stack, zip(*traces, strict=True)))
    if not isinstance(tilings, Tiling):
        tilings = Tiling(*map(np.stack, zip(*tilings, strict=True)))
    level, index, age, _, count = map(np.asarray, tilings)
    return History(*map(np.asarray, traces), level, index, age, count)


def costs(layout: Layout, history: History) -> Int[np.ndarray, " t"]:
    """Entries of the context after each iteration."""
    return np.where(history.level >= 0, layout.costs[np.maximum(history.level, 0)], 0).sum(1)


def residencies(history: History) -> dict[int, Int[np.ndarray, " r"]]:
    """Completed residencies by level, in iterations: of every node that left the context.

    Nodes that are still there at the end are left out, since theirs are not complete.
    """
    out: dict[int, list[int]] = {}
    for now, after in zip(_nodes(history), list(_nodes(history))[1:], strict=False):
        for (level, index), age in now.items():
            if (level, index) not in after:
                out.setdefault(level, []).append(age + 1)
    return {level: np.array(found) for level, found in sorted(out.items())}


def flips(history: History, within: int) -> int:
    """Actions that undo one of at most ``within`` iterations before: the sign of thrashing."""
    last: dict[tuple[int, int], tuple[int, int]] = {}
    found = 0
    for t, (kinds, levels, indices) in enumerate(
        zip(history.kind, history.gist_level, history.gist_index, strict=True)
    ):
        for kind, gist in zip(kinds, zip(levels, indices, strict=True), strict=True):
            if kind:
                before = last.get(gist)
                found += before is not None and before[0] == -kind and t - before[1] <= within
                last[gist] = int(kind), t
    return found


def summary(
    layout: Layout, history: History, budget: int, within: int = 8
) -> dict[str, float | list[float]]:
    """Flat results of a run.

    ``swap_rate`` counts the exchange's expands and collapses, ``forced_rate`` the collapses that
    made room for new blocks, which no policy can avoid once the context is full. ``flip_rate``
    counts both. ``swap_share`` is the share of the context's nodes that an iteration replaced.
    Mass is entries moved per iteration, by the level of the gist opened or made.

    Args:
      layout: sizes.
      history: what happened.
      budget: entries of the working context, W.
      within: iterations within which an undone action counts as a flip.

    Raises:
      DataError: there is no iteration.
    """
    steps = len(history.kind)
    if not steps:
        raise DataError("the focus history is empty: run an iteration before measuring it")
    done = history.kind != 0
    found = residencies(history)
    every = np.concatenate(list(found.values())) if found else np.zeros(0, int)
    spent = np.bincount(every) if every.size else np.zeros(1, int)
    removed = _removed(layout, history)
    out: dict[str, float | list[float]] = {
        "swap_rate": float((done & ~history.forced).sum() / steps),
        "forced_rate": float((done & history.forced).sum() / steps),
        "swap_share": float(np.mean(removed / np.maximum(history.count, 1))),
        "flip_rate": flips(history, within) / steps,
        "token_budget_utilization": float((costs(layout, history) / budget).mean()),
        "residency_histogram": spent.tolist(),
    }
    if every.size:
        out["mean_residency"] = float(every.mean())
    out |= {f"mean_residency.lod{level}": float(r.mean()) for level, r in found.items()}
    for name, kind in (("expand", EXPANDED), ("collapse", COLLAPSED)):
        for level in range(1, layout.levels + 1):
            moved = np.abs(history.delta)[(history.kind == kind) & (history.gist_level == level)]
            out[f"{name}_mass.lod{level}"] = float(moved.sum() / steps)
    return out


def save(path: str | Path, layout: Layout, history: History, budget: int) -> Path:
    """Writes a history as one compressed ``.npz`` file.

    Raises:
      RunError: the file cannot be written.
    """
    head = {
        "format": _FORMAT, "budget": budget, "block": layout.block, "protected": layout.protected,
        "branching": layout.branching, "slots": list(layout.slots),
    }  # fmt: skip
    data = io.BytesIO()
    np.savez_compressed(data, head=json.dumps(head), **history._asdict())
    return write_bytes(path, data.getvalue())


def load(path: str | Path) -> tuple[Layout, History, int]:
    """Reads what `save` wrote: layout, history and budget.

    Raises:
      DataError: there is no such file, or it is not a focus history of this format.
    """
    try:
        with np.load(path, allow_pickle=False) as data:
            head = json.loads(str(data["head"]))
            if head.pop("format") != _FORMAT:
                raise DataError(f"{path}: a focus history of another format; this reads {_FORMAT}")
            history = History(*(data[name] for name in History._fields))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; a focus history is a .npz of a run") from None
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise DataError(f"{path}: not a focus history ({error})") from None
    budget = head.pop("budget")
    return Layout(**head | {"slots": tuple(head["slots"])}), history, budget


def _nodes(history: History) -> Iterable[dict[tuple[int, int], int]]:
    """The nodes of each iteration with their ages."""
    for level, index, age, count in zip(
        history.level, history.index, history.age, history.count, strict=True
    ):
        rows = (x[:count].tolist() for x in (level, index, age))
        yield {(lv, i): a for lv, i, a in zip(*rows, strict=True)}


def _removed(layout: Layout, history: History) -> Int[np.ndarray, " t"]:
    """Nodes that the actions of each iteration took out of the context."""
    group = np.where(history.gist_level == 1, 1, layout.branching)
    out = np.where(history.kind == COLLAPSED, group, np.where(history.kind == EXPANDED, 1, 0))
    return out.sum(1)
