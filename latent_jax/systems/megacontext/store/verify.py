"""Reading a whole store against its checksums."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from latent_jax.systems.megacontext.store.disk import Disk
from latent_jax.systems.megacontext.store.levels import LevelFiles
from latent_jax.systems.megacontext.store.tokens import runs

_CHUNK = 1 << 22  # bytes looked at in one go


@dataclasses.dataclass
class Verification:
    """What `GistTree.verify` found.

    Attributes:
      blocks: blocks of tokens that were checked.
      gists: gists that were checked.
      tokens: damaged stretches of the history, ``(start, stop)`` in tokens.
      nodes: damaged gists per level; they are pending now.
      problems: damage to anything else, in words.
    """

    blocks: int = 0
    gists: int = 0
    tokens: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    nodes: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is damaged."""
        return not (self.tokens or self.nodes or self.problems)

    def lines(self) -> list[str]:
        """The damage, a line each."""
        found = [f"tokens {a} to {b} are damaged" for a, b in self.tokens]
        for level, nodes in self.nodes.items():
            found += [
                f"level {level}: gists {a} to {a + n - 1} are damaged, and pending now"
                for a, n in runs(nodes)
            ]
        return found + self.problems


def verify(disk: Disk, forget: Callable[[int, int], None]) -> Verification:
    """Checks everything; `forget(level, node)` is called for every damaged gist."""
    report = Verification(problems=list(disk.problems))
    _tokens(disk, report)
    for file in disk.levels:
        damaged = _level(file, report)
        if damaged:
            report.nodes[file.level] = damaged
        for node in damaged:
            forget(file.level, node)
    for table in (disk.documents, disk.versions):
        table.reload()
        report.problems += [
            f"{table.file.path.name}: line {line} is damaged" for line in table.damaged
        ]
    return report


def _tokens(disk: Disk, report: Verification) -> None:
    tokens, block = disk.tokens, disk.spec.block
    step = max(_CHUNK // (block * tokens.dtype.itemsize), 1)
    blocks = -(-tokens.count // block)
    damaged: list[int] = []
    for first in range(0, blocks, step):
        damaged += tokens.blocks(first, min(step, blocks - first))[1]
    report.blocks = blocks
    report.tokens = [
        (first * block, min((first + count) * block, tokens.count))
        for first, count in runs(damaged)
    ]
    for file, wanted in ((tokens.ids, tokens.count), (tokens.sums, tokens.whole_blocks())):
        if file.records() < wanted:
            report.problems.append(_short(file.path.name, file.records(), wanted))


def _level(file: LevelFiles, report: Verification) -> list[int]:
    step = max(_CHUNK // file.record.itemsize, 1)
    damaged: list[int] = []
    for first in range(0, file.extent, step):
        _, heads, agree = file.read(first, min(step, file.extent - first))
        there = heads["version"] != 0
        report.gists += int(there.sum())
        damaged += (first + np.flatnonzero(there & ~agree)).tolist()
    for part in (file.heads_file, file.records):
        if part.records() < file.extent:
            report.problems.append(_short(part.path.name, part.records(), file.extent))
    return damaged


def _short(name: str, found: int, wanted: int) -> str:
    return f"{name} is cut short: {found} of {wanted} records"
