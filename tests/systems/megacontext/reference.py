"""The allocator once more, slowly: plain Python on a list of nodes and a dictionary of places."""

from __future__ import annotations

import dataclasses

import numpy as np

from latent_jax.systems.megacontext.allocator import FocusConfig
from latent_jax.systems.megacontext.layout import Layout, cover_cost
from latent_jax.systems.megacontext.tiling import Tiling, coarsest


@dataclasses.dataclass
class Node:
    level: int
    index: int
    age: int = 0
    last: int = 0
    score: float = 0.0

    @property
    def key(self):
        return self.level, self.index


def width(layout: Layout, level: int) -> int:
    return 1 if level == 0 else layout.branching ** (level - 1)


def price(layout: Layout, level: int) -> int:
    return layout.block if level == 0 else layout.slots[level - 1]


def cost(layout: Layout, nodes: list[Node]) -> int:
    return sum(price(layout, node.level) for node in nodes)


def children(layout: Layout, node: Node) -> list[Node]:
    if node.level == 1:
        return [Node(0, node.index, 0, 1)]
    first = node.index * layout.branching
    return [Node(node.level - 1, first + i, 0, 1) for i in range(layout.branching)]


def parent(layout: Layout, group: list[Node]) -> Node:
    level, index = group[0].key
    mean = float(np.float32(sum(node.score for node in group) / len(group)))
    return Node(level + 1, index if level == 0 else index // layout.branching, 0, -1, mean)


def groups(layout: Layout, nodes: list[Node]) -> list[list[Node]]:
    """Everything that may be collapsed, oldest first."""
    history = sum(width(layout, node.level) for node in nodes)
    there = {node.key: node for node in nodes}
    found = []
    for node in nodes:
        if node.level == 0:
            if node.index < history - layout.protected:
                found.append([node])
        elif node.level < len(layout.slots) and node.index % layout.branching == 0:
            keys = [(node.level, node.index + i) for i in range(layout.branching)]
            if all(key in there for key in keys):
                found.append([there[key] for key in keys])
    return found


def gain(layout: Layout, group: list[Node]) -> int:
    return cost(layout, group) - price(layout, group[0].level + 1)


def replace(nodes: list[Node], old: list[Node], new: list[Node]) -> list[Node]:
    at = next(i for i, node in enumerate(nodes) if node is old[0])
    return nodes[:at] + new + nodes[at + len(old) :]


def rested(config: FocusConfig, group: list[Node], undoes: int) -> bool:
    wait = config.residency
    if any(node.last == undoes for node in group):
        wait = max(wait, config.cooldown)
    return min(node.age for node in group) >= wait


def refocus(layout: Layout, config: FocusConfig, budget: int, nodes: list[Node]):
    """One iteration; returns the nodes and the actions as (kind, level, index, score, delta)."""
    nodes = [dataclasses.replace(node, age=node.age + 1) for node in nodes]
    actions = []

    def collapse(nodes, group):
        made = parent(layout, group)
        actions.append((-1, made.level, made.index, made.score, -gain(layout, group)))
        return replace(nodes, group, [made])

    while cost(layout, nodes) > budget and groups(layout, nodes):
        pool = groups(layout, nodes)
        calm = [group for group in pool if rested(config, group, 1)]
        nodes = collapse(nodes, min(calm or pool, key=lambda g: parent(layout, g).score))

    def wanted(node):
        bar = config.tau_expand + (config.hysteresis if node.last == -1 else 0)
        # fp32, as the jitted allocator compares
        return (
            node.level >= 1 and rested(config, [node], -1)
            and np.float32(node.score) > np.float32(bar)
        )  # fmt: skip

    def given(group):
        bar = config.tau_collapse + (
            config.hysteresis if any(node.last == 1 for node in group) else 0
        )
        return (
            rested(config, group, 1) and not any(wanted(node) for node in group)
            and np.float32(parent(layout, group).score) < -np.float32(bar)
        )  # fmt: skip

    sharpen = sorted((n for n in nodes if wanted(n)), key=lambda n: -n.score)
    blur = sorted(
        (g for g in groups(layout, nodes) if given(g)), key=lambda g: parent(layout, g).score
    )
    left = config.max_actions
    while True:
        for node in sharpen:
            added = cost(layout, children(layout, node)) - price(layout, node.level)
            room = budget - cost(layout, nodes)
            number = next(
                (
                    j
                    for j in range(min(left - 1, len(blur)) + 1)
                    if room + sum(gain(layout, g) for g in blur[:j]) >= added
                ),
                None,
            )
            if left >= 1 and number is not None:
                break
        else:
            return nodes, actions
        for group in blur[:number]:
            nodes = collapse(nodes, group)
        blur = blur[number:]
        actions.append((1, node.level, node.index, node.score, added))
        nodes = replace(nodes, [node], children(layout, node))
        sharpen = [other for other in sharpen if other is not node]
        left -= number + 1


def random_state(layout: Layout, limit: int, rng: np.random.Generator) -> list[Node]:
    """A history of random length, opened at random up to ``limit`` entries."""
    while True:
        history = int(rng.integers(1, 90))
        if cover_cost(layout, history, layout.levels) <= limit:
            break
    nodes = [Node(*pair) for pair in coarsest(layout, history)]
    for _ in range(int(rng.integers(0, 40))):
        node = nodes[int(rng.integers(len(nodes)))]
        if node.level:
            made = children(layout, node)
            if cost(layout, nodes) + cost(layout, made) - price(layout, node.level) <= limit:
                nodes = replace(nodes, [node], made)
    for node in nodes:
        node.age = int(rng.integers(0, 9))
        node.last = int(rng.integers(-1, 2))
        node.score = float(rng.integers(-64, 65)) / 64
    return nodes


def arrays(states: list[list[Node]], capacity: int) -> tuple[Tiling, np.ndarray]:
    """States as one batch of tilings and their scores; the padding's scores are rubbish."""
    shape = (len(states), capacity)
    level, scores = np.full(shape, -1, np.int32), np.full(shape, 77.0, np.float32)
    index, age, last = (np.zeros(shape, np.int32) for _ in range(3))
    for row, nodes in enumerate(states):
        for column, node in enumerate(nodes):
            level[row, column], index[row, column] = node.key
            age[row, column], last[row, column] = node.age, node.last
            scores[row, column] = node.score
    count = np.array([len(nodes) for nodes in states], np.int32)
    return Tiling(level, index, age, last, count), scores
