"""Pytrees by path: partition and merge are inverse, and counts agree with jax."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct
from hypothesis import given
from hypothesis import strategies as st

from latent_jax.core import trees


class Pair(NamedTuple):
    mu: Any
    nu: Any


class Node(struct.PyTreeNode):
    params: Any
    step: Any


def test_one_spelling_for_every_container() -> None:
    tree = Node(params={"a": [1, {"b": 2}]}, step=Pair(3, (4,)))
    assert trees.flatten(tree) == {
        "params/a/0": 1, "params/a/1/b": 2, "step/mu": 3, "step/nu/0": 4
    }  # fmt: skip
    assert trees.paths({"x": None, "y": 1}) == ["y"]


def test_optimizer_paths_end_in_the_parameter_path() -> None:
    params = {"lora": {"a": jnp.zeros((2, 3))}, "head": jnp.zeros(4)}
    tx = optax.multi_transform(
        {"on": optax.adam(1e-3), "off": optax.set_to_zero()},
        trees.match_tree([("lora", "on")], params, default="off"),
    )
    found = trees.paths(tx.init(params))
    assert [p for p in found if p.endswith("mu/lora/a")] and not [p for p in found if "head" in p]


_leaves = st.integers(0, 99)
_trees = st.recursive(
    _leaves,
    lambda inner: (
        st.dictionaries(st.text("abc", min_size=1, max_size=2), inner, min_size=1, max_size=3)
        | st.lists(inner, min_size=1, max_size=3)
    ),
    max_leaves=8,
)


@given(_trees, st.sets(st.sampled_from("abc0")))
def test_merge_undoes_partition(tree: Any, chosen: set[str]) -> None:
    first, second = trees.partition(tree, lambda path, x: bool(chosen & set(path)) or x % 3 == 0)
    assert trees.merge(first, second) == tree
    assert not set(trees.paths(first)) & set(trees.paths(second))
    assert len(trees.paths(first)) + len(trees.paths(second)) == len(trees.paths(tree))


@given(st.dictionaries(st.text("abc", min_size=1, max_size=3), _leaves, min_size=1))
def test_unflatten_undoes_flatten(flat: dict[str, int]) -> None:
    nested = {"n": flat, "m": {"k": flat}}
    assert trees.unflatten(trees.flatten(nested)) == nested


def test_what_cannot_be_joined_raises() -> None:
    with pytest.raises(ValueError, match="both trees have a leaf at 'a'"):
        trees.merge({"a": 1}, {"a": 2})
    for flat in ({"a": 1, "a/b": 2}, {"a/b": 1, "a": 2}):
        with pytest.raises(ValueError, match="'a"):
            trees.unflatten(flat)
    with pytest.raises(KeyError, match="a/x"):
        trees.get({"a": {"b": 1}}, "a/x")


def test_counts_of_arrays_and_shapes() -> None:
    tree = {"a": {"x": jnp.zeros((2, 3)), "y": jnp.zeros((), jnp.bfloat16)}, "b": np.zeros(5)}
    abstract = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, tree))
    for each in (tree, abstract):
        assert trees.count_params(each) == 12
    assert trees.bytes_of(tree) == 24 + 2 + 40
    assert trees.count_by_part(tree) == {"a": 7, "b": 5}
    assert trees.get(tree, "a/x").shape == (2, 3)


def test_cast_leaves_integers_alone() -> None:
    out = trees.cast_floats({"w": jnp.ones(2), "n": jnp.arange(2)}, jnp.bfloat16)
    assert out["w"].dtype == jnp.bfloat16 and out["n"].dtype == jnp.int32


def test_first_matching_row_wins() -> None:
    table = [("bias$", "none"), ("^enc/", "slow"), ("kernel", "fast")]
    tree = {"enc": {"kernel": 1, "bias": 2}, "dec": {"kernel": 3, "scale": 4}}
    assert trees.match_tree(table, tree, default="rest") == {
        "enc": {"kernel": "slow", "bias": "none"}, "dec": {"kernel": "fast", "scale": "rest"}
    }  # fmt: skip
    assert trees.match(table, "scale") is None


def test_all_finite_under_jit() -> None:
    check = jax.jit(trees.all_finite)
    good = {"a": jnp.ones(3), "n": jnp.arange(2)}
    assert check(good) and check({"n": jnp.arange(2)})
    assert not check({**good, "b": jnp.array([1.0, jnp.nan])})
    assert not check({**good, "b": jnp.array([jnp.inf])})


def test_map_with_path_takes_several_trees() -> None:
    out = trees.map_with_path(lambda p, a, b: f"{p}:{a + b}", {"x": 1}, {"x": 2})
    assert out == {"x": "x:3"}
    assert dataclasses.is_dataclass(trees.map_with_path(lambda p, x: x, Node({}, 1)))
