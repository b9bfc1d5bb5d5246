"""Facts hidden in long histories: is their answer found raw, as a gist, or by a policy?

An episode (`episodes`) has its facts in the middle of filler; the question follows the history.
What is measured is the likelihood of the answer and its rank among wrong answers of the same form,
and whether a policy brought the facts to level of detail 0. The last needs no language model and is
also measured alone, on histories of a million tokens.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from latent_jax.ops import bootstrap
from latent_jax.systems.megacontext.episodes import Episode, Filler, episodes
from latent_jax.systems.megacontext.focus import Focus, RuntimeConfig
from latent_jax.systems.megacontext.layout import Layout, roomy
from latent_jax.systems.megacontext.matcher import Finder
from latent_jax.systems.megacontext.memory import Memory
from latent_jax.systems.megacontext.runtime import Runtime
from latent_jax.systems.megacontext.sight import Node
from latent_jax.systems.megacontext.store import GistTree, TreeSpec
from latent_jax.systems.megacontext.tiling import coarsest


def opened(
    layout: Layout, blocks: int, raw: Collection[int] = (), gists: Collection[int] = ()
) -> list[Node]:
    """The coarsest tiling before the tail, with some blocks opened to raw text and some to gists
    of level 1.
    """
    done, both = [], {*raw, *gists}
    todo = coarsest(layout, blocks)[: -layout.protected][::-1]
    while todo:
        now, index = todo.pop()
        width = int(layout.widths[now])
        here = range(index * width, (index + 1) * width)
        if not now or (raw if now == 1 else both).isdisjoint(here):
            done.append((now, index))
        elif now == 1:
            todo.append((0, index))
        else:
            first = index * layout.branching
            todo += [(now - 1, first + i) for i in range(layout.branching)][::-1]
    return done


def measure(
    memory: Memory, filler: Filler, topics: Sequence[Filler], kinds: Sequence[str],
    policies: Sequence[str], budget: int, blocks: int, depths: Sequence[float], seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None, by_depth: bool = False,
    alike: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Answers behind contexts that hold the facts raw, as gists, as a policy brings them, or not.

    Arms: ``lod0``, all facts raw; ``gist``, all as gists of level 1; ``dropped``, nothing but the
    tail; policies; and where an answer needs several facts ``hop<i>``, that one raw and the others
    as gists, in the order of the history.

    Args:
      memory: an empty store open for writing.
      filler: held-out text around the facts.
      topics: two of them where the topic switches.
      kinds: tasks.
      policies: what may look for the facts; ``bm25`` is given the question.
      budget: entries of the working context, W.
      blocks: of a history; whole stretches.
      depths: of the episodes of each kind.
      seed: of the episodes.
      by_depth: results for each depth.
      alike: what stands around facts is filled up to whole nodes of the top level, so that the
        episodes share the filler's gists, which are made once.

    Returns:
      ``task.<kind>.<arm>.nll`` (nats of the whole answer), ``.accuracy`` (the right answer is the
      likeliest) and, for policies, ``.found`` (all facts at level of detail 0),
      ``.found.hop<i>`` where there are several and, where ``recency`` is compared, ``.gain``, the
      share of the nats that raw facts gain on it, with intervals; by depth
      ``task.<kind>.t<tokens>.d<percent>.<arm>.…``.
    """
    model, tokenizer = memory.model, memory.backbone.tokenizer
    layout, size, rows = model.layout, model.layout.block, len(depths)
    unit = math.lcm(int(layout.widths[-1]), model.gist.window) * size if alike else None
    made = {
        kind: list(episodes(kind, filler, topics, tokenizer, size, blocks, depths, seed, unit))
        for kind in kinds
    }
    for one in (e for kind in kinds for e in made[kind]):
        memory.tree.append(one.ids)
    # No episode knows another.
    memory.build(breaks=range(0, len(memory.tree) // size, blocks), alike=alike)
    movers = {name: Runtime(memory, RuntimeConfig(budget, name)) for name in policies}
    found: dict[str, Any] = {}
    for number, kind in enumerate(kinds):
        scores: dict[str, list[float]] = {}
        for row, one in enumerate(made[kind]):
            here = memory.stretch((number * rows + row) * blocks)
            contexts = _fixed(layout, blocks, one)
            for name, mover in movers.items():
                mover.look_at(here)
                newer = here.prompt_gists(one.question, blocks * size) if name == "lens" else None
                contexts[name] = mover.nodes(mover.settle(one.question, blocks, row, newer))[0]
                for part, hit in _found(layout, blocks, one, contexts[name]):
                    scores.setdefault(f"{name}.{part}", []).append(hit)
            for name, nodes in contexts.items():
                nll = _answers(here, nodes, one, blocks, budget)
                scores.setdefault(f"{name}.nll", []).append(nll[0])
                scores.setdefault(f"{name}.accuracy", []).append(nll.argmin() == 0)
            if progress is not None:
                progress("tasks", number * rows + row + 1, len(kinds) * rows)
        place = f"task.{kind}.t{blocks * size}" if by_depth else f"task.{kind}"
        found |= _table(place, scores, depths if by_depth else None)
    return found


def _fixed(layout: Layout, blocks: int, one: Episode) -> dict[str, list[Node]]:
    """Contexts that no policy brings."""
    needle = set(one.needle)
    found = {
        "lod0": opened(layout, blocks, needle),
        "gist": opened(layout, blocks, set(), needle),
        "dropped": [],
    }
    if len(one.hops) > 1:
        for number, hop in enumerate(one.hops, 1):
            found[f"hop{number}"] = opened(layout, blocks, set(hop), needle)
    return found


def _found(
    layout: Layout, blocks: int, one: Episode, nodes: Sequence[Node]
) -> Iterator[tuple[str, bool]]:
    """Whether the facts are raw, all together and each; what lies in the tail always is."""
    raw = {index for level, index in nodes if not level}
    raw |= set(range(blocks - layout.protected, blocks))
    yield "found", raw.issuperset(one.needle)
    if len(one.hops) > 1:
        for number, hop in enumerate(one.hops, 1):
            yield f"found.hop{number}", raw.issuperset(hop)


def _table(
    place: str, scores: dict[str, list[float]], depths: Sequence[float] | None
) -> dict[str, Any]:
    """Means of scores, with intervals; of each depth, if depths are given. Else also what arms
    gain on ``recency``, as a share of what raw facts do.
    """
    found: dict[str, Any] = {}
    for name, values in scores.items():
        groups = {"": np.asarray(values)}
        if depths is not None:
            groups = {
                f".d{100 * d:g}": np.asarray(values)[np.asarray(depths) == d]
                for d in dict.fromkeys(depths)
            }
        for group, members in groups.items():
            found[f"{place}{group}.{name}"] = float(members.mean())
            found[f"{place}{group}.{name}.ci95"] = list(bootstrap.mean_interval(members))
    plain = np.asarray(scores.get("recency.nll", ()))
    for name in [n.removesuffix(".nll") for n in scores if n.endswith(".nll")]:
        if not len(plain) or depths is not None or name in ("lod0", "recency"):
            continue
        gained = plain - np.asarray(scores[f"{name}.nll"])
        possible = plain - np.asarray(scores["lod0.nll"])
        if possible.sum() > 0:
            found[f"{place}.{name}.gain"] = float(gained.sum() / possible.sum())
            found[f"{place}.{name}.gain.ci95"] = list(bootstrap.ratio_interval(gained, possible))
    return found


def _answers(
    memory: Memory, nodes: list[Node], one: Episode, blocks: int, budget: int
) -> Float[np.ndarray, " c"]:
    """Loss of every answer behind a context, nats of the whole answer."""
    layout = memory.model.layout
    start = (blocks - layout.protected) * layout.block
    live = np.concatenate([one.ids[start:], one.question])
    longest = max(map(len, one.answers))
    rows = np.stack([np.pad(np.append(live, a), (0, longest - len(a))) for a in one.answers])
    entries = memory.gather(nodes, start)
    capacity = max(budget, len(entries.positions))
    losses = memory.token_losses([entries] * len(rows), rows, start, capacity)
    counts = np.asarray([len(a) for a in one.answers])[:, None]
    told = losses[:, len(live) - 1 :]
    return np.where(np.arange(told.shape[1]) < counts, told, 0.0).sum(1)


def reach(
    tokenizer: Any, vocab_size: int, layout: Layout, filler: Filler, topics: Sequence[Filler],
    kinds: Sequence[str], policies: Sequence[str], budget: int, tokens: Sequence[int],
    depths: Sequence[float], seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None, finder: Finder | None = None,
    by_depth: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """How often the allocator alone brings the facts to level of detail 0; no language model.

    Args:
      layout: sizes; levels are added where W cannot hold a history (`roomy`).
      filler: as of `measure`, like ``topics``, ``depths`` and ``by_depth``.
      tokens: lengths of the histories.
      policies: without those that would need gists or a language model.
      finder: of the policy ``match``; it reads the filler once.

    Returns:
      ``reach.<kind>.t<tokens>.<policy>``: shares, with intervals, and ``….hop<i>`` of each fact
      where there are several; by depth ``reach.<kind>.t<tokens>.d<percent>.<policy>``.
    """
    found: dict[str, Any] = {}
    for number, length in enumerate(tokens):
        blocks = length // layout.block
        wide = roomy(layout, blocks, budget)
        for kind in kinds:
            hits: dict[str, list[bool]] = {}
            unit = None if finder is None else finder.window
            made = episodes(
                kind, filler, topics, tokenizer, layout.block, blocks, depths, seed, unit
            )
            for row, one in enumerate(made):
                with tempfile.TemporaryDirectory() as folder:
                    spec = TreeSpec(vocab_size, 1, wide.slots, block=wide.block,
                                    branch=wide.branching)  # fmt: skip
                    with GistTree.create(Path(folder) / "store", spec) as tree:
                        tree.append(one.ids)
                        for name in policies:
                            focus = Focus(tree, wide, RuntimeConfig(budget, name), None, finder)
                            nodes = focus.nodes(focus.settle(one.question, blocks, row))[0]
                            for part, hit in _found(wide, blocks, one, nodes):
                                key = f"{name}{part.removeprefix('found')}"
                                hits.setdefault(key, []).append(hit)
            place = f"reach.{kind}.t{length}"
            found |= _table(place, hits, depths if by_depth else None)
        if progress is not None:
            progress("reach", number + 1, len(tokens))
    return found
