"""Facts hidden in long histories: is their answer found raw, as a gist, or by a policy?

An episode of `data.needles` stands in the middle of filler; the question follows the history. What
is measured is the likelihood of the answer and its rank among wrong answers of the same form, and
whether a policy brought the fact to level of detail 0. The last needs no language model and is also
measured alone, on histories of a million tokens.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from latent_jax.core.errors import DataError
from latent_jax.data import needles
from latent_jax.ops import bootstrap
from latent_jax.systems.megacontext.focus import Focus, RuntimeConfig
from latent_jax.systems.megacontext.layout import Layout, roomy
from latent_jax.systems.megacontext.matcher import Finder
from latent_jax.systems.megacontext.memory import Memory
from latent_jax.systems.megacontext.runtime import Runtime
from latent_jax.systems.megacontext.sight import Node
from latent_jax.systems.megacontext.store import GistTree, TreeSpec
from latent_jax.systems.megacontext.tiling import coarsest

# Characters of the part that a builder writes; the rest of a history is filler.
_PART = 1200


class Episode(NamedTuple):
    """A history with a question.

    Attributes:
      ids: whole blocks of tokens.
      needle: blocks that the answer needs.
      question: tokens that follow.
      answers: continuations, the right one first.
    """

    ids: Int[np.ndarray, " t"]
    needle: list[int]
    question: Int[np.ndarray, " q"]
    answers: list[Int[np.ndarray, " a"]]


def episodes(
    kind: str, text: str, filler: Int[np.ndarray, " f"], tokenizer: Any, block: int, blocks: int,
    rows: int, seed: int = 0, unit: int | None = None,
) -> Iterator[Episode]:  # fmt: skip
    """Episodes of one kind whose facts lie at evenly spread depths.

    Args:
      kind: one of `eval_config.TASKS`.
      text: filler around the facts.
      filler: tokens of the rest; repeated if they are too few.
      tokenizer: of the base.
      block: tokens of a block.
      blocks: of a history.
      rows: how many.
      seed: of the first; the others count up.
      unit: tokens; what stands around a fact ends, and the filler is shifted, by whole ones, so
        that histories share what a reader makes of so many tokens; none: as it comes.

    Raises:
      DataError: a history too short for the part with the facts.
    """
    for row in range(rows):
        built = _built(kind, text, tokenizer, block, seed + row)
        start, stop = built.needles[0]
        # Tokenizers join a space to the word after it.
        start -= built.text[start - 1 : start] == " "
        parts = [built.text[:start], built.text[start:stop], built.text[stop:]]
        pieces = [np.asarray(tokenizer.encode(p) if p else [], np.int32) for p in parts]
        if unit:
            pieces.append(filler[: -sum(map(len, pieces)) % unit])
        part = np.concatenate(pieces)
        total = blocks * block
        if len(part) > total:
            raise DataError(
                f"eval.tasks: {kind} takes {len(part)} tokens and a history of {blocks} blocks "
                f"has {total}: raise eval.task_blocks"
            )
        room = total - len(part)
        # Whole blocks before the part keep a cut at a block's boundary where it is.
        step = unit or block
        before = round((row + 0.5) / rows * room) // step * step
        rest = filler[: len(filler) // unit * unit] if unit else filler
        filled = np.resize(np.roll(rest, -(unit or 17) * row), room)
        ids = np.concatenate([filled[:before], part, filled[before:]])
        first = before + len(pieces[0])
        needle = range(first // block, (first + len(pieces[1]) - 1) // block + 1)
        answers = [built.answer, *built.distractors]
        yield Episode(
            ids, list(needle), np.asarray(tokenizer.encode(built.question), np.int32),
            [np.asarray(tokenizer.encode(a), np.int32) for a in answers],
        )  # fmt: skip


def _built(kind: str, text: str, tokenizer: Any, block: int, seed: int) -> needles.Episode:
    if kind == "straddling":
        return needles.straddling(
            text, _PART, 0.5, lambda s: len(tokenizer.encode(s)), block, seed
        )
    return getattr(needles, kind)(text, _PART, 0.5, seed)


def opened(layout: Layout, blocks: int, needle: Sequence[int], level: int) -> list[Node]:
    """The coarsest tiling before the tail, with what covers the needle opened down to a level."""
    wanted, done = set(needle), []
    todo = coarsest(layout, blocks)[: -layout.protected][::-1]
    while todo:
        now, index = todo.pop()
        width = int(layout.widths[now])
        if now <= level or wanted.isdisjoint(range(index * width, (index + 1) * width)):
            done.append((now, index))
        elif now == 1:
            todo.append((0, index))
        else:
            first = index * layout.branching
            todo += [(now - 1, first + i) for i in range(layout.branching)][::-1]
    return done


def measure(
    memory: Memory, text: str, filler: Int[np.ndarray, " f"], kinds: Sequence[str],
    policies: Sequence[str], budget: int, blocks: int, rows: int, seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Answers behind contexts that hold the fact raw, as a gist, as a policy brings it, or not.

    Args:
      memory: an empty store open for writing.
      text: filler around the facts.
      filler: its tokens.
      kinds: tasks.
      policies: what may look for the fact; ``bm25`` is given the question.
      budget: entries of the working context, W.
      blocks: of a history; whole stretches.
      rows: episodes per kind.
      seed: of the episodes.

    Returns:
      ``task.<kind>.<arm>.nll`` (nats of the whole answer), ``.accuracy`` (the right answer is the
      likeliest) and, for policies, ``.found`` (all of the fact at level of detail 0), with
      intervals.
    """
    model, tokenizer = memory.model, memory.backbone.tokenizer
    layout, size = model.layout, model.layout.block
    made = {
        kind: list(episodes(kind, text, filler, tokenizer, size, blocks, rows, seed))
        for kind in kinds
    }
    for one in (e for kind in kinds for e in made[kind]):
        memory.tree.append(one.ids)
    memory.build(breaks=range(0, len(memory.tree) // size, blocks))  # no episode knows another
    movers = {name: Runtime(memory, RuntimeConfig(budget, name)) for name in policies}
    found: dict[str, Any] = {}
    for number, kind in enumerate(kinds):
        scores: dict[str, list[float]] = {}
        for row, one in enumerate(made[kind]):
            here = memory.stretch((number * rows + row) * blocks)
            contexts = {
                "lod0": opened(layout, blocks, one.needle, 0),
                "gist": opened(layout, blocks, one.needle, 1),
                "dropped": [],
            }
            for name, mover in movers.items():
                mover.look_at(here)
                newer = here.prompt_gists(one.question, blocks * size) if name == "lens" else None
                contexts[name] = mover.nodes(mover.settle(one.question, blocks, row, newer))[0]
                hit = {(0, block) for block in one.needle if block < blocks - layout.protected}
                scores.setdefault(f"{name}.found", []).append(hit <= set(contexts[name]))
            for name, nodes in contexts.items():
                nll = _answers(here, nodes, one, blocks, budget)
                scores.setdefault(f"{name}.nll", []).append(nll[0])
                scores.setdefault(f"{name}.accuracy", []).append(nll.argmin() == 0)
            if progress is not None:
                progress("tasks", number * rows + row + 1, len(kinds) * rows)
        for name, values in scores.items():
            found[f"task.{kind}.{name}"] = float(np.mean(values))
            found[f"task.{kind}.{name}.ci95"] = list(bootstrap.mean_interval(np.asarray(values)))
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
    tokenizer: Any, vocab_size: int, layout: Layout, text: str, filler: Int[np.ndarray, " f"],
    kinds: Sequence[str], policies: Sequence[str], budget: int, tokens: Sequence[int], rows: int,
    seed: int = 0, progress: Callable[[str, int, int], None] | None = None,
    finder: Finder | None = None,
) -> dict[str, Any]:  # fmt: skip
    """How often the allocator alone brings a fact to level of detail 0; no language model.

    Args:
      layout: sizes; levels are added where W cannot hold a history (`roomy`).
      tokens: lengths of the histories.
      policies: without those that would need gists or a language model.
      finder: of the policy ``match``; it reads the filler once.

    Returns:
      ``reach.<kind>.t<tokens>.<policy>``: shares, with intervals.
    """
    found: dict[str, Any] = {}
    for number, length in enumerate(tokens):
        blocks = length // layout.block
        wide = roomy(layout, blocks, budget)
        for kind in kinds:
            hits: dict[str, list[bool]] = {name: [] for name in policies}
            unit = None if finder is None else finder.window
            made = episodes(kind, text, filler, tokenizer, layout.block, blocks, rows, seed, unit)
            for row, one in enumerate(made):
                with tempfile.TemporaryDirectory() as folder:
                    spec = TreeSpec(vocab_size, 1, wide.slots, block=wide.block,
                                    branch=wide.branching)  # fmt: skip
                    with GistTree.create(Path(folder) / "store", spec) as tree:
                        tree.append(one.ids)
                        for name in policies:
                            focus = Focus(tree, wide, RuntimeConfig(budget, name), None, finder)
                            nodes = focus.nodes(focus.settle(one.question, blocks, row))[0]
                            # What lies in the tail is raw whatever a policy does.
                            free = [b for b in one.needle if b < blocks - wide.protected]
                            hits[name].append({(0, b) for b in free} <= set(nodes))
            for name, values in hits.items():
                key = f"reach.{kind}.t{length}.{name}"
                found[key] = float(np.mean(values))
                found[f"{key}.ci95"] = list(bootstrap.mean_interval(np.asarray(values)))
        if progress is not None:
            progress("reach", number + 1, len(tokens))
    return found

