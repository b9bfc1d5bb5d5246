"""Pytrees addressed by path strings such as ``"encoder/lora/q/a"``.

One spelling of a path serves freezing, parameter groups, sharding rules, weight loading and
reports: the names along the way joined by ``/``, whatever container each level is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from latent_jax.core.types import PyTree

T = TypeVar("T")


def path_str(path: Sequence[Any]) -> str:
    """Spells a jax key path: ``(DictKey('a'), SequenceKey(0))`` is ``"a/0"``."""
    return "/".join(_entry(entry) for entry in path)


def _entry(entry: Any) -> str:
    for attribute in ("key", "name", "idx"):  # DictKey, GetAttrKey, SequenceKey
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def flatten(tree: PyTree) -> dict[str, Any]:
    """Returns ``{path: leaf}`` in the tree's own order (``None`` holes are left out)."""
    return {path_str(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Builds nested dicts from ``{"a/b": leaf}``.

    Raises:
      ValueError: if one path is both a leaf and a parent of another.
    """
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(f"path {path!r}: {parent!r} is a leaf already")
        if last in node:
            raise ValueError(f"path {path!r} is given twice, or is the parent of another")
        node[last] = leaf
    return tree


def paths(tree: PyTree) -> list[str]:
    """Returns the path of every leaf."""
    return list(flatten(tree))


def map_with_path(fn: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """Like ``jax.tree.map`` with the path string as the first argument of ``fn``."""
    return jax.tree_util.tree_map_with_path(lambda p, *xs: fn(path_str(p), *xs), tree, *rest)


def get(tree: PyTree, path: str) -> Any:
    """Returns the subtree at ``path`` of nested mappings (KeyError names the path)."""
    node = tree
    for part in path.split("/"):
        if not isinstance(node, Mapping) or part not in node:
            raise KeyError(path)
        node = node[part]
    return node


def partition(tree: PyTree, predicate: Callable[[str, Any], bool]) -> tuple[PyTree, PyTree]:
    """Splits a tree in two of the same structure, with ``None`` where the other has the leaf.

    Args:
      tree: the tree to split.
      predicate: ``(path, leaf) -> bool``, True for the first part.

    Example:
      >>> partition({"lora": 1, "base": 2}, lambda path, _: path.startswith("lora"))
      ({'base': None, 'lora': 1}, {'base': 2, 'lora': None})
    """
    first = map_with_path(lambda p, x: x if predicate(p, x) else None, tree)
    second = map_with_path(lambda p, x: None if predicate(p, x) else x, tree)
    return first, second


def merge(first: PyTree, second: PyTree) -> PyTree:
    """Undoes `partition`: takes each leaf from the tree that has it.

    Raises:
      ValueError: if both have a leaf at the same place.

    Example:
      >>> merge({"base": None, "lora": 1}, {"base": 2, "lora": None})
      {'base': 2, 'lora': 1}
    """

    def pick(path: Any, a: Any, b: Any) -> Any:
        if a is not None and b is not None:
            raise ValueError(f"both trees have a leaf at {path_str(path)!r}")
        return b if a is None else a

    return jax.tree_util.tree_map_with_path(pick, first, second, is_leaf=lambda x: x is None)


def count_params(tree: PyTree) -> int:
    """Number of scalars in the tree (arrays or abstract arrays)."""
    return sum(int(np.prod(x.shape, dtype=np.int64)) for x in jax.tree.leaves(tree))


def bytes_of(tree: PyTree) -> int:
    """Bytes the tree's arrays (or abstract arrays) take in memory, over all devices."""
    return sum(
        int(np.prod(x.shape, dtype=np.int64)) * jnp.dtype(x.dtype).itemsize
        for x in jax.tree.leaves(tree)
    )


def count_by_part(tree: PyTree, depth: int = 1) -> dict[str, int]:
    """Number of scalars under each path prefix of ``depth`` names, for a start-up table."""
    counts: dict[str, int] = {}
    for path, leaf in flatten(tree).items():
        part = "/".join(path.split("/")[:depth])
        counts[part] = counts.get(part, 0) + count_params(leaf)
    return counts


def cast_floats(tree: PyTree, dtype: Any) -> PyTree:
    """Casts floating leaves to ``dtype`` and leaves the others alone."""

    def cast(x: Any) -> Any:
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(cast, tree)


def match(table: Iterable[tuple[str, T]], path: str, default: T | None = None) -> T | None:
    """Returns the value of the first row whose regex is found in ``path`` (``re.search``)."""
    for pattern, value in table:
        if re.search(pattern, path):
            return value
    return default


def match_tree(table: Iterable[tuple[str, T]], tree: PyTree, default: T | None = None) -> PyTree:
    """Replaces each leaf by its row's value in a regex table (first match wins).

    Example:
      >>> match_tree([("lora", "train")], {"lora": {"a": 1}, "base": 2}, default="frozen")
      {'base': 'frozen', 'lora': {'a': 'train'}}
    """
    rows = tuple(table)
    return map_with_path(lambda path, _: match(rows, path, default), tree)


def all_finite(tree: PyTree) -> jax.Array:
    """True if every floating leaf is finite (jit-able)."""
    flags = [
        jnp.all(jnp.isfinite(x))
        for x in jax.tree.leaves(tree)
        if jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating)
    ]
    return jnp.all(jnp.stack(flags)) if flags else jnp.asarray(True)
